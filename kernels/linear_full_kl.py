"""KL between the whole next-token distributions of two models, straight from their hidden states."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.library import custom_op

from ppomax.kernels.dispatch import implementation
from ppomax.kernels.linear import check_head, chunk_size, logits_buffer, operand, product_into, row_chunks
from ppomax.kernels.numerics import keep, wide_dtype
from ppomax.kernels.shards import (
    first_column,
    gather_shards,
    group_name,
    group_of,
    num_real_columns,
    sum_shards,
)


@torch.no_grad()
def linear_full_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    rows_mask: Tensor | None = None,
    *,
    tp_group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v) of two whole next-token distributions per token; not differentiable.

    hidden [N, H], weight [V/tp, H] float: of p. ref_hidden [N, H'], ref_weight [V/tp, H'] float: of q, sharded alike.
    rows_mask [N] bool: rows that count; the others are not read and give 0. Unset: all.
    Returns kl [N] in nats, float32 (float64 for float64 inputs), never below 0 by more than rounding.
    Every rank of tp_group must call it: one all-gather a chunk of rows and one all-reduce.
    Raises ValueError on shapes that do not fit.
    Source: paper Eq. 19, whose KL is over "the action space of the i-th response token".
    """
    check_head("linear_full_kl", hidden, weight)
    check_head("linear_full_kl", ref_hidden, ref_weight)
    if hidden.shape[0] != ref_hidden.shape[0] or weight.shape[0] != ref_weight.shape[0]:
        raise ValueError(
            f"linear_full_kl: hidden {tuple(hidden.shape)} and ref_hidden {tuple(ref_hidden.shape)} need equal rows,"
            f" weight {tuple(weight.shape)} and ref_weight {tuple(ref_weight.shape)} too"
        )
    if rows_mask is None:
        rows_mask = torch.ones(hidden.shape[0], dtype=torch.bool, device=hidden.device)
    if rows_mask.shape != hidden.shape[:1] or rows_mask.dtype != torch.bool:
        raise ValueError(
            f"linear_full_kl: rows_mask {tuple(rows_mask.shape)} {rows_mask.dtype}; "
            f"expected {tuple(hidden.shape[:1])} bool"
        )
    chunk = chunk_size("linear_full_kl", chunk_rows, weight)
    both = (hidden.contiguous(), weight, ref_hidden.contiguous(), ref_weight)
    return _full_kl(*both, rows_mask, group_name(tp_group), vocab_size, chunk)


@custom_op("ppomax::linear_full_kl", mutates_args=())
def _full_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    rows_mask: Tensor,
    tp_group: str | None,
    vocab_size: int | None,
    chunk_rows: int,
) -> Tensor:
    group = group_of(tp_group)
    first = first_column(weight.shape[0], group)
    num_real = num_real_columns(weight.shape[0], first, vocab_size)
    inputs = (hidden, weight, ref_hidden, ref_weight)
    rows_of_logits, compute = implementation("logprobs", *inputs), implementation("linear_full_kl", *inputs)
    labels = torch.where(rows_mask, 0, -1)
    heads = operand(weight).T, operand(ref_weight).T
    chunks = row_chunks(hidden.shape[0], chunk_rows)
    buffers = [logits_buffer(x, weight, chunks) for x in (hidden, ref_hidden)]
    kl = torch.empty(labels.shape, dtype=buffers[0].dtype, device=hidden.device)
    for rows in chunks:
        states = operand(hidden[rows]), operand(ref_hidden[rows])
        logits = [product_into(b[: len(x)], x, head) for b, x, head in zip(buffers, states, heads, strict=True)]
        statistics = [
            rows_of_logits.shard_statistics(x, labels[rows], temperature=1.0, first=first, num_real=num_real)
            for x in logits
        ]
        shards = gather_shards(torch.stack(statistics), group)  # [tp, 2, 4, rows]
        normalisers = [
            rows_of_logits.combine_statistics(x.contiguous(), labels[rows], temperature=1.0)[2:]
            for x in shards.unbind(dim=1)
        ]
        kl[rows] = compute.kl_terms(*logits, *normalisers[0], *normalisers[1], labels[rows], num_real=num_real)
    return keep(sum_shards(kl, group), rows_mask)


@_full_kl.register_fake
def _(hidden: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=wide_dtype(hidden))
