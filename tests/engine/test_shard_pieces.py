"""Runs of entries of a tensor as rectangles, and pieces of parameters that are saved in parts."""

import random
from itertools import pairwise

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from ppomax.engine.shard_pieces import pieces_of, rectangles


def test_rectangles_cover_a_run_of_entries_once_and_in_few_pieces() -> None:
    draw = random.Random(0)
    for _ in range(500):
        size = [draw.randint(1, 6) for _ in range(draw.randint(1, 3))]
        whole = torch.arange(torch.Size(size).numel()).view(size)
        begin, end = sorted(draw.randint(0, whole.numel()) for _ in range(2))
        found = []
        for offset, inner in rectangles(size, begin, end):
            piece = whole[tuple(slice(a, a + b) for a, b in zip(offset, inner, strict=True))]
            flat = piece.flatten().tolist()
            assert flat == list(range(flat[0], flat[0] + len(flat)))  # one run in memory: a view of it is enough
            found.append(flat)
        assert len(found) <= (1, 3, 5)[len(size) - 1]
        assert sorted(entry for flat in found for entry in flat) == list(range(begin, end))


def test_the_pieces_of_all_replicas_make_up_every_state_of_a_layer() -> None:
    parameter = torch.arange(20.0).view(4, 5)
    whole = ShardedTensor.from_rank_offsets("w", parameter, (0, 1, 3), replica_id=(0, 0, 1), prepend_axis_num=1)
    saved = torch.full((3, 4, 5), -1.0)
    for begin, end in pairwise((0, 3, 7, 18, 20)):
        state = {"exp_avg": parameter.flatten()[begin:end] * 2}
        for piece in pieces_of(whole, parameter, begin, state):
            assert piece.key == "optimizer.state.exp_avg.w"
            assert piece.global_shape == (3, 4, 5)
            assert piece.replica_id == (0, 0, 0)
            assert piece.data.untyped_storage().data_ptr() == state["exp_avg"].untyped_storage().data_ptr()
            where = tuple(slice(a, a + b) for a, b in zip(piece.global_offset, piece.local_shape, strict=True))
            assert bool((saved[where] == -1).all())
            saved[where] = piece.data
    assert torch.equal(saved[1], parameter * 2)
