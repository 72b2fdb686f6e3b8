"""Sequences to packs: which sequences share a micro-batch, on which replica, and the packed tensors of one micro-batch.

Everything here is a pure function of lengths that every rank knows, so all ranks agree without talking.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pack:
    """Several sequences end to end: one micro-batch of one replica.

    tokens [N] int64; positions [N] int64: position in its own sequence.
    cu_seqlens [n + 1] int32: start of each sequence, then N; max_seqlen: the longest one.
    rows [M] int64: packed positions at which the head computes something.
    labels [M] int64: the token to take the log-prob of at each row, -1 where there is none.
    index [M] int64: where each row's result goes in the flattened global result.
    sequences: ids of the sequences, in packed order (padding left out).
    """

    tokens: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    rows: Tensor
    labels: Tensor
    index: Tensor
    sequences: tuple[int, ...]

    def to(self, device: torch.device) -> "Pack":
        names = ("tokens", "positions", "cu_seqlens", "rows", "labels", "index")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


@dataclass(frozen=True)
class Rows:
    """What the head computes for each sequence: rows[i], labels[i], index[i] belong to sequence i (see `Pack`)."""

    rows: Sequence[Tensor]
    labels: Sequence[Tensor]
    index: Sequence[Tensor]


def balance(
    lengths: Sequence[int], num_replicas: int, tokens_per_pack: int, *, multiple_of: int = 1
) -> list[list[list[int]]]:
    """Deals units of the given lengths into packs: result[replica][micro-batch] lists unit numbers.

    Every replica gets the same number of packs (possibly empty ones), a multiple of `multiple_of`, of nearly equal
    length. A pack exceeds tokens_per_pack only where a single unit does.
    """
    order = sorted(range(len(lengths)), key=lambda unit: (-lengths[unit], unit))
    num_packs = max(1, -(-sum(lengths) // (tokens_per_pack * num_replicas)))
    num_packs = -(-num_packs // multiple_of) * multiple_of
    while True:
        packs = _longest_first(order, lengths, num_packs * num_replicas)
        fits = all(len(pack) <= 1 or sum(lengths[unit] for unit in pack) <= tokens_per_pack for pack in packs)
        if fits:
            break
        num_packs += multiple_of
    packs.sort(key=lambda pack: (-sum(lengths[unit] for unit in pack), pack))
    # Neighbours in this order are alike: giving each replica one of them balances the replicas micro-batch by micro-
    # batch.
    return [[sorted(pack) for pack in packs[replica::num_replicas]] for replica in range(num_replicas)]


def _longest_first(order: Sequence[int], lengths: Sequence[int], num_packs: int) -> list[list[int]]:
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    loads = [0] * num_packs
    for unit in order:
        lightest = min(range(num_packs), key=loads.__getitem__)
        packs[lightest].append(unit)
        loads[lightest] += lengths[unit]
    return packs


def make_packs(
    sequences: Sequence[Tensor],
    rows: Rows,
    assignment: Sequence[Sequence[int]],
    *,
    multiple_of: int = 1,
    equal_lengths: bool = False,
) -> list[Pack]:
    """The packs of one replica: assignment[micro-batch] lists numbers into `sequences` (each a [length] int64 tensor).

    multiple_of: N is padded to a multiple of it (sequence parallelism). equal_lengths: all packs are padded to the
    longest (pipeline stages exchange tensors of one shape).
    """
    totals = [sum(sequences[i].numel() for i in members) for members in assignment]
    longest = max([*totals, 1])
    packs = []
    for members, total in zip(assignment, totals, strict=True):
        target = longest if equal_lengths else max(total, 1)
        packs.append(_make_pack(sequences, rows, members, padding=-(-target // multiple_of) * multiple_of - total))
    return packs


def _make_pack(sequences: Sequence[Tensor], rows: Rows, members: Sequence[int], padding: int) -> Pack:
    parts = [sequences[i] for i in members]
    lengths = [part.numel() for part in parts]
    starts = [0, *accumulate(lengths)]
    own_rows, labels, index = ([part[i] for i in members] for part in (rows.rows, rows.labels, rows.index))
    num_rows = [part.numel() for part in own_rows]
    empty = torch.zeros(0, dtype=torch.int64)
    # One operation for all sequences, here and below, instead of one for each.
    picked = torch.cat([empty, *own_rows]) + _repeated(starts[: len(members)], num_rows)
    # Padding becomes sequences of its own, none longer than the longest real one.
    piece = max([*lengths, 1]) if lengths else padding
    while padding > 0:
        length = min(piece, padding)
        parts.append(torch.zeros(length, dtype=torch.int64))
        lengths.append(length)
        padding -= length
    cu_seqlens = [0, *accumulate(lengths)]
    return Pack(
        tokens=torch.cat(parts),
        positions=torch.arange(cu_seqlens[-1]) - _repeated(cu_seqlens[:-1], lengths),
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
        max_seqlen=max(lengths),
        rows=picked,
        labels=torch.cat([empty, *labels]),
        index=torch.cat([empty, *index]),
        sequences=tuple(members),
    )


def _repeated(values: Sequence[int], counts: Sequence[int]) -> Tensor:
    """[sum of counts] int64: each value as often as its count says."""
    return torch.tensor(values, dtype=torch.int64).repeat_interleave(torch.tensor(counts, dtype=torch.int64))


def response_rows(tokens: Tensor, mask: Tensor) -> Rows:
    """Rows of the kept columns of mask [B, T]: column t is computed at position t, labelled tokens[:, t + 1], index b *
    T + t.
    """
    b, column = mask.nonzero(as_tuple=True)
    counts = mask.sum(1).tolist()
    labels, index = tokens[b, column + 1], b * mask.shape[1] + column
    return Rows(*(x.split(counts) for x in (column, labels, index)))


def end_rows(is_end: Tensor) -> Rows:
    """Rows at the tokens that is_end [B, T] marks: column t is computed at position t + 1, its token, without a label;
    index b * T + t.
    """
    columns = [row.nonzero().squeeze(1) for row in is_end]
    return Rows(
        rows=[column + 1 for column in columns],
        labels=[torch.full_like(column, -1) for column in columns],
        index=[b * is_end.shape[1] + column for b, column in enumerate(columns)],
    )


def last_token_rows(lengths: Sequence[int]) -> Rows:
    """One row per sequence, at its last token, without a label; index is the sequence."""
    last = torch.tensor([length - 1 for length in lengths], dtype=torch.int64)
    return Rows(*(x.split(1) for x in (last, torch.full_like(last, -1), torch.arange(len(lengths)))))


def unpad(tokens: Tensor, lengths: Tensor) -> list[Tensor]:
    """Rows of a right-padded [B, S] tensor without their padding."""
    return [row[:length] for row, length in zip(tokens, lengths.tolist(), strict=True)]
