"""The plan's bytes against what roles really allocate, exactly, and its activations against what autograd keeps."""

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ppomax.engine.config import RunConfig
from ppomax.engine.models.shape import ModelShape
from ppomax.engine.parallel.layout import ParallelLayout
from ppomax.engine.plan.activations import chunks_in_flight, layer_bytes, saved_bytes
from ppomax.engine.plan.weights import num_parameters, stage_parameters, state_bytes

pytestmark = pytest.mark.dist
OnRanks = Callable[..., list[Any]]

# Sizes that are no multiples of 64: padding counts.
SHAPE = ModelShape(
    vocab_size=277,
    hidden_size=40,
    num_layers=4,
    num_heads=4,
    num_query_groups=2,
    head_dim=10,
    ffn_hidden_size=52,
    max_position_embeddings=64,
    rope_theta=10000.0,
    norm_eps=1e-6,
    tie_embeddings=False,
)
TIED = replace(SHAPE, tie_embeddings=True)
SCALAR = replace(SHAPE, scalar=True)
QWEN = replace(SHAPE, qkv_bias=True, qk_norm=True)
KINDS = {
    "language_model": (SHAPE, "bf16", True, False),
    "language_model_fp32": (SHAPE, "fp32", True, False),
    "frozen": (SHAPE, "bf16", False, False),
    "tied": (TIED, "bf16", True, False),
    "tied_frozen_fp32": (TIED, "fp32", False, False),
    "critic": (SCALAR, "bf16", True, False),
    "biases_and_norms": (QWEN, "bf16", True, False),
    "both_heads": (SHAPE, "fp32", True, True),
    "both_heads_tied": (TIED, "bf16", True, True),
}
LAYOUTS = {
    "one_process": ParallelLayout(tp=1, pp=1, dp=1),
    "tp2": ParallelLayout(tp=2, pp=1, dp=1),
    "pp2": ParallelLayout(tp=1, pp=2, dp=1),
    "dp2": ParallelLayout(tp=1, pp=1, dp=2),
    "pp2_vpp2": ParallelLayout(tp=1, pp=2, dp=1, vpp=2),
    "pp2_uneven": ParallelLayout(tp=1, pp=2, dp=1, last_stage_layers=1),
    "tp2_pp2": ParallelLayout(tp=2, pp=2, dp=1),
    "tp2_dp2": ParallelLayout(tp=2, pp=1, dp=2),
    "pp2_dp2": ParallelLayout(tp=1, pp=2, dp=2),
    "tp4": ParallelLayout(tp=4, pp=1, dp=1),  # more than key / value heads
}

SCALARS = 64
"""Bytes of the few numbers that Megatron's optimizer keeps besides; no shard of a buffer is so small."""


def new_storages() -> dict[int, int]:
    """Bytes of every memory of numbers that came into being since `gc.freeze`, by address; what collectives of Python
    objects leave behind is of another type.
    """
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and x.is_floating_point()]
    found = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes() > SCALARS}


def build(shape: ModelShape, layout: ParallelLayout, dtype: str, groups: Any, **options: bool) -> Any:
    from ppomax.engine.models.roles import make_role, random_reader

    parallel = {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp}
    config = RunConfig.model_validate({"model": {"dtype": dtype}, "parallel": parallel})
    return make_role("policy", shape, random_reader(shape, config), config, groups, source="test", **options)


def allocated(layout: ParallelLayout) -> dict[str, dict[str, int]]:
    """Of each kind of role on this rank: bytes by what they are for, and of all tensors that came into being."""
    from ppomax.engine.parallel.device import start
    from ppomax.engine.parallel.groups import make_groups

    start(60)
    groups = make_groups({"policy": layout})["policy"]
    gc.collect()
    gc.freeze()
    result = {}
    for name, (shape, dtype, trained, extra_scalar_head) in KINDS.items():
        before = new_storages()
        role = build(
            shape,
            layout,
            dtype,
            groups,
            trained=trained,
            extra_scalar_head=extra_scalar_head,
            fresh_head=extra_scalar_head,
        )
        new = {pointer: size for pointer, size in new_storages().items() if pointer not in before}
        parameters = {
            parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes()
            for chunk in role.chunks
            for parameter in chunk.parameters()
        }
        gradients = {
            buffer.grad_data.untyped_storage().data_ptr(): buffer.grad_data.untyped_storage().nbytes()
            for module in (role.modules if trained else ())
            for buffer in module.buffers
        }
        numel = sum(parameter.numel() for chunk in role.chunks for parameter in chunk.parameters())
        rest = {pointer: size for pointer, size in new.items() if pointer not in parameters | gradients}
        result[name] = {
            "numel": numel,
            "weights": sum(parameters.values()),
            "gradients": sum(gradients.values()),
            "rest": sum(rest.values()),
        }
        del role
    gc.unfreeze()
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_gradients_and_optimizer_are_what_roles_allocate(on_ranks: OnRanks, layout: str) -> None:
    sizes = LAYOUTS[layout]
    for rank, found in enumerate(on_ranks(sizes.num_ranks, allocated, sizes)):
        for name, (shape, dtype, trained, extra_scalar_head) in KINDS.items():
            stage = sizes.coordinates(rank)[1]
            chunks = stage_parameters(shape, sizes, stage, extra_scalar_head=extra_scalar_head)
            planned = state_bytes(chunks, sizes.dp, dtype, trained=trained)
            expected = {
                "numel": num_parameters(chunks),
                "weights": planned.weights,
                "gradients": planned.gradients,
                "rest": planned.optimizer,
            }
            assert found[name] == expected, f"{name} on rank {rank}"


# One query head per key / value head: torch's fused attention on a CPU keeps what a GPU's keeps.
DENSE = replace(SHAPE, num_query_groups=4, hidden_size=64, head_dim=16, ffn_hidden_size=160, vocab_size=280)
NUM_TOKENS = 48


def kept_for_backward(layout: ParallelLayout, recompute: str, sequence_parallel: bool) -> tuple[int, int]:
    """Bytes that the forward pass of one micro-batch keeps, without weights; and of them the rotary factors."""
    from ppomax.engine.data.batches import Rows, make_packs
    from ppomax.engine.models.transformer import build_chunks
    from ppomax.engine.parallel.device import start
    from ppomax.engine.parallel.groups import make_groups

    start(60)
    groups = make_groups({"policy": layout})["policy"]
    # As kernels of GPUs do, SDPA keeps the rotated queries and keys; the CPU's kernel keeps the projection alone.
    config = RunConfig.model_validate({"model": {"recompute": recompute, "attention": "sdpa"}})
    (chunk,) = build_chunks(config.model, DENSE, groups, sequence_parallel=sequence_parallel)
    for parameter in chunk.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    rows = torch.arange(NUM_TOKENS)
    sequence = torch.arange(NUM_TOKENS) % DENSE.vocab_size
    (pack,) = make_packs([sequence], Rows([rows], [sequence], [rows]), [[0]])
    weights = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack_hook(tensor: torch.Tensor) -> torch.Tensor:
        # Ids and positions are of the pack, not of the layers; so are rotary factors, told by their shape.
        if tensor.untyped_storage().data_ptr() not in weights and tensor.is_floating_point():
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    chunk.train()
    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        hidden = chunk(pack)
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    rotary = [x.untyped_storage().nbytes() for x in kept.values() if x.shape == (NUM_TOKENS, DENSE.head_dim // 2)]
    assert hidden.shape == (NUM_TOKENS, DENSE.hidden_size)
    return size, sum(rotary)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, False), (2, True)], ids=["tp1", "tp2", "tp2_sp"])
def test_activations_are_what_autograd_keeps(
    on_ranks: OnRanks, tp: int, sequence_parallel: bool, recompute: str
) -> None:
    layout = ParallelLayout(tp=tp, pp=1, dp=1)
    found = on_ranks(tp, kept_for_backward, layout, recompute, sequence_parallel)
    options: dict[str, Any] = {"itemsize": 4, "sequence_parallel": sequence_parallel}
    saved = saved_bytes(DENSE, layout, 0, tokens=NUM_TOKENS, num_microbatches=1, recompute=recompute, **options)
    # What the loss keeps, and the layer that is being recomputed, come after the forward pass.
    saved -= NUM_TOKENS * 4 * DENSE.hidden_size
    if recompute == "full":
        saved -= int(NUM_TOKENS * layer_bytes(DENSE, tp, recompute="none", **options))
    for size, rotary in found:
        assert size - rotary == saved


def most_in_flight(layout: ParallelLayout, num_microbatches: int) -> int:
    """Forward passes of chunks on this rank that wait for their backward pass, at most."""
    from ppomax.engine.data.batches import Rows, make_packs
    from ppomax.engine.parallel.device import start
    from ppomax.engine.parallel.groups import make_groups
    from ppomax.engine.parallel.pipeline import run_forward_backward

    start(60)
    groups = make_groups({"policy": layout})["policy"]
    role = build(SHAPE, layout, "fp32", groups, trained=True)
    sequence = torch.arange(8)
    sequences = [sequence] * num_microbatches
    rows = Rows(sequences, sequences, sequences)
    packs = make_packs(sequences, rows, [[i] for i in range(num_microbatches)], equal_lengths=True)
    waiting, most = 0, 0

    def count(chunk: Any, inputs: Any, hidden: torch.Tensor) -> None:
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        hidden.register_hook(done)

    def done(grad: torch.Tensor) -> None:
        nonlocal waiting
        waiting -= 1

    for chunk in role.chunks:
        chunk.register_forward_hook(count)
    run_forward_backward(role.modules, groups, packs, lambda hidden, pack: (hidden.sum(), hidden.new_zeros(0)), 0)
    assert waiting == 0
    return most


@pytest.mark.parametrize(
    ("sizes", "num_microbatches"),
    [((4, 1), 6), ((4, 1), 2), ((2, 2), 8), ((2, 2), 2)],
    ids=["pp4", "pp4_few", "pp2_vpp2", "pp2_vpp2_few"],
)
def test_micro_batches_in_flight_are_those_of_megatrons_schedule(
    on_ranks: OnRanks, sizes: tuple[int, int], num_microbatches: int
) -> None:
    layout = ParallelLayout(tp=1, pp=sizes[0], dp=1, vpp=sizes[1])
    found = on_ranks(layout.num_ranks, most_in_flight, layout, num_microbatches)
    assert found == [chunks_in_flight(layout, rank, num_microbatches) for rank in range(layout.pp)]


def run_sft(config: dict[str, Any]) -> None:
    from ppomax.engine.train_sft import run

    run(RunConfig.model_validate(config))


def test_every_rank_of_a_run_is_compared_with_its_own_plan(on_ranks: OnRanks, tiny: Any, tmp_path: Path) -> None:
    on_ranks(2, run_sft, tiny.config("sft", tmp_path / "run", parallel={"pp": 2}))
    first, last = json.loads((tmp_path / "run" / "plan.json").read_text())["ranks"]
    assert [first["rank"], last["rank"]] == [0, 1]
    assert first["measured"] > 0
    assert last["measured"] > 0
    # Two layers of 7808 numbers, their starts padded to 64, and 277 x 32 of embedding or head: 24480, up to 24576; the
    # last norm falls into the padding.
    assert [rank["phases"]["update"]["weights"] for rank in (first, last)] == [4 * 24576] * 2
