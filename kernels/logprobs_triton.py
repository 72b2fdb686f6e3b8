"""Log-probabilities and entropies in Triton: one program a row, one pass over its logits forward and one backward.

The units are those of logprobs_reference.py. Within a row each of C lanes keeps its own running maximum and sums over
R columns at a time, folded once at the end: 1 + 1/R exponentials an entry, and no exchange between threads in the loop.
Differences from the maximum are taken before they are scaled, so that large logits lose nothing. `scale` is
log2(e) / temperature, from the host: a product of numbers inside a kernel would be rounded to fp32 for fp64 inputs too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppomax.kernels import logprobs_reference
from ppomax.kernels.numerics import wide_dtype
from ppomax.kernels.numerics_triton import accumulation_type

LANE_BYTES = 4096
"""Bytes of logits that lie side by side in a tile of the forward pass: 16 for each thread of 8 warps."""
ROWS = 4
"""Such pieces in a tile."""
GRADIENT_BLOCK = 4096
"""Columns that a program of the backward pass holds at a time."""
COMBINE_BLOCK = 256

IMPOSSIBLE = tl.constexpr(logprobs_reference.IMPOSSIBLE)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def fold_tile(x, inside, m, s, w, scale, IS_TAIL: tl.constexpr):
    """Adds a tile x [R, C] to the running maximum m, sum s of 2^(scale (x - m)) and weighted sum w [C].

    w has the weights x - m, unscaled. With IS_TAIL only the entries where `inside` is True count.
    """
    x = tl.maximum(x, IMPOSSIBLE, propagate_nan=tl.PropagateNan.ALL)
    if IS_TAIL:
        x = tl.where(inside, x, IMPOSSIBLE)
    top = tl.maximum(m, tl.max(x, axis=0))
    shrink = tl.exp2((m - top) * scale)
    z = x - top[None, :]
    e = tl.exp2(z * scale)
    if IS_TAIL:
        e = tl.where(inside, e, 0.0)
    w = shrink * (w + s * (m - top)) + tl.sum(e * z, axis=0)
    s = shrink * s + tl.sum(e, axis=0)
    return top, s, w


@triton.jit
def row_statistics(X, num_real, scale, R: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """(max, sum, weighted sum) of the num_real logits at X; see fold_tile."""
    m = tl.full((C,), IMPOSSIBLE, dtype=ACC)
    s = tl.zeros((C,), dtype=ACC)
    w = tl.zeros((C,), dtype=ACC)
    column = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    num_full = num_real // (R * C) * (R * C)
    for start in range(0, num_full, R * C):
        x = tl.load(X + start + column).to(ACC)
        m, s, w = fold_tile(x, True, m, s, w, scale, False)
    if num_full < num_real:
        inside = num_full + column < num_real
        x = tl.load(X + num_full + column, mask=inside, other=0.0).to(ACC)
        m, s, w = fold_tile(x, inside, m, s, w, scale, True)
    row_max = tl.max(m, axis=0)
    shrink = tl.exp2((m - row_max) * scale)
    weighted = tl.sum(shrink * (w + s * (m - row_max)), axis=0)
    return row_max, tl.sum(shrink * s, axis=0), weighted


@triton.jit
def _statistics_kernel(
    X,
    stride_x,
    LABELS,
    OUT,
    N,
    first,
    num_real,
    inverse_temperature,
    scale,
    R: tl.constexpr,
    C: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(LABELS + row)
    OUT += row
    if label < 0:
        tl.store(OUT, 0.0)
        tl.store(OUT + N, 1.0)
        tl.store(OUT + 2 * N, 0.0)
        tl.store(OUT + 3 * N, 0.0)
        return
    X += row * stride_x
    row_max, total, weighted = row_statistics(X, num_real, scale, R, C, ACC)
    column = label - first
    is_here = (column >= 0) & (column < num_real)
    label_logit = tl.load(X + column, mask=is_here, other=0.0).to(ACC)
    label_logit = tl.maximum(label_logit, IMPOSSIBLE, propagate_nan=tl.PropagateNan.ALL)
    tl.store(OUT, row_max)
    tl.store(OUT + N, total)
    tl.store(OUT + 2 * N, weighted * inverse_temperature)
    tl.store(OUT + 3 * N, tl.where(is_here, label_logit, IMPOSSIBLE))


@triton.jit
def _combine_kernel(
    SHARDS,
    LABELS,
    LOGPROBS,
    ENTROPY,
    ROW_MAX,
    LOG_SUM,
    N,
    num_shards,
    inverse_temperature,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < N
    row_max = tl.full((BLOCK,), IMPOSSIBLE, dtype=ACC)
    label_logit = tl.full((BLOCK,), IMPOSSIBLE, dtype=ACC)
    at = SHARDS + row
    for _ in range(0, num_shards):
        row_max = tl.maximum(row_max, tl.load(at, mask=inside, other=0.0))
        here = tl.load(at + 3 * N, mask=inside, other=0.0)
        label_logit = tl.maximum(label_logit, here, propagate_nan=tl.PropagateNan.ALL)
        at += 4 * N
    at = SHARDS + row
    total = tl.zeros((BLOCK,), dtype=ACC)
    weighted = tl.zeros((BLOCK,), dtype=ACC)
    for _ in range(0, num_shards):
        shift = (tl.load(at, mask=inside, other=0.0) - row_max) * inverse_temperature
        shard_sum = tl.load(at + N, mask=inside, other=1.0)
        shrink = tl.exp(shift)
        total += shrink * shard_sum
        weighted += shrink * (tl.load(at + 2 * N, mask=inside, other=0.0) + shard_sum * shift)
        at += 4 * N
    log_sum = tl.log(total)
    is_kept = tl.load(LABELS + row, mask=inside, other=-1) >= 0
    logprob = (label_logit - row_max) * inverse_temperature - log_sum
    tl.store(LOGPROBS + row, tl.where(is_kept, logprob, 0.0), mask=inside)
    tl.store(ENTROPY + row, tl.where(is_kept, log_sum - weighted / total, 0.0), mask=inside)
    tl.store(ROW_MAX + row, row_max, mask=inside)
    tl.store(LOG_SUM + row, log_sum, mask=inside)


@triton.jit
def _gradient_tile(x, column, label_column, row_max, log2_sum, entropy, g, h, scale, HAS_ENTROPY: tl.constexpr):
    """g 1[label] - p (g + h (log p + H)) of one tile."""
    log2_p = (x - row_max) * scale - log2_sum
    p = tl.exp2(log2_p)
    factor = g
    if HAS_ENTROPY:
        # For a logit of -inf the product with p must be 0, not NaN.
        log2_p = tl.maximum(log2_p, IMPOSSIBLE, propagate_nan=tl.PropagateNan.ALL)
        factor = g + h * (log2_p * LN_2 + entropy)
    return tl.where(column == label_column, g, 0.0) - p * factor


@triton.jit
def _gradient_kernel(
    X,
    stride_x,
    GRAD,
    stride_grad,
    LABELS,
    ROW_MAX,
    LOG_SUM,
    ENTROPY,
    GRAD_LOGPROBS,
    GRAD_ENTROPY,
    first,
    num_columns,
    num_real,
    inverse_temperature,
    scale,
    IS_IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """One row. IS_IN_PLACE: GRAD starts where X does, with entries of the same size or half of it.

    Entry v of a bf16 row then covers half of entry v / 2 of the fp32 row, which belongs to this block only if it is the
    first: a barrier between loads and stores of each block keeps every load before the store that overwrites it.
    """
    row = tl.program_id(0).to(tl.int64)
    GRAD += row * stride_grad
    column = tl.arange(0, BLOCK)
    label = tl.load(LABELS + row)
    if label < 0:
        for start in range(0, num_columns, BLOCK):
            tl.store(GRAD + start + column, tl.zeros((BLOCK,), dtype=ACC), mask=start + column < num_columns)
        return
    X += row * stride_x
    row_max = tl.load(ROW_MAX + row)
    log2_sum = tl.load(LOG_SUM + row) * LOG2_E
    g = tl.full((), 0.0, dtype=ACC)
    h = tl.full((), 0.0, dtype=ACC)
    entropy = tl.full((), 0.0, dtype=ACC)
    if GRAD_LOGPROBS is not None:
        g += tl.load(GRAD_LOGPROBS + row).to(ACC) * inverse_temperature
    if GRAD_ENTROPY is not None:
        h += tl.load(GRAD_ENTROPY + row).to(ACC) * inverse_temperature
        entropy += tl.load(ENTROPY + row)
    label_column = label - first
    num_full = num_real // BLOCK * BLOCK
    for start in range(0, num_full, BLOCK):
        x = tl.load(X + start + column).to(ACC)
        if IS_IN_PLACE:
            tl.debug_barrier()
        grad = _gradient_tile(
            x, start + column, label_column, row_max, log2_sum, entropy, g, h, scale, GRAD_ENTROPY is not None
        )
        tl.store(GRAD + start + column, grad)
    for start in range(num_full, num_columns, BLOCK):
        is_real = start + column < num_real
        x = tl.load(X + start + column, mask=is_real, other=0.0).to(ACC)
        if IS_IN_PLACE:
            tl.debug_barrier()
        grad = _gradient_tile(
            x, start + column, label_column, row_max, log2_sum, entropy, g, h, scale, GRAD_ENTROPY is not None
        )
        tl.store(GRAD + start + column, tl.where(is_real, grad, 0.0), mask=start + column < num_columns)


def shard_statistics(logits: Tensor, labels: Tensor, *, temperature: float, first: int, num_real: int) -> Tensor:
    """See logprobs_reference.shard_statistics."""
    N, num_columns = logits.shape
    statistics = torch.empty(4, N, dtype=wide_dtype(logits), device=logits.device)
    if N > 0:
        C = min(LANE_BYTES // logits.element_size(), triton.next_power_of_2(num_columns))
        R = min(ROWS, triton.next_power_of_2(triton.cdiv(num_columns, C)))
        _statistics_kernel[(N,)](
            logits,
            logits.stride(0),
            labels,
            statistics,
            N,
            first,
            num_real,
            1 / temperature,
            LOG2_E.value / temperature,
            R=R,
            C=C,
            ACC=accumulation_type(logits),
            num_warps=max(1, C * logits.element_size() // 512),
        )
    return statistics


def combine_statistics(shards: Tensor, labels: Tensor, *, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See logprobs_reference.combine_statistics."""
    num_shards, _, N = shards.shape
    logprobs, entropy, row_max, log_sum = (torch.empty(N, dtype=shards.dtype, device=shards.device) for _ in range(4))
    if N > 0:
        _combine_kernel[(triton.cdiv(N, COMBINE_BLOCK),)](
            shards,
            labels,
            logprobs,
            entropy,
            row_max,
            log_sum,
            N,
            num_shards,
            1 / temperature,
            BLOCK=COMBINE_BLOCK,
            ACC=accumulation_type(shards),
            num_warps=4,
        )
    return logprobs, entropy, row_max, log_sum


def logits_gradient(
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    *,
    temperature: float,
    first: int,
    num_real: int,
    out: Tensor,
) -> Tensor:
    """See logprobs_reference.logits_gradient."""
    N, num_columns = logits.shape
    if N > 0:
        _gradient_kernel[(N,)](
            logits,
            logits.stride(0),
            out,
            out.stride(0),
            labels,
            row_max,
            log_sum,
            entropy,
            grad_logprobs,
            grad_entropy,
            first,
            num_columns,
            num_real,
            1 / temperature,
            LOG2_E.value / temperature,
            IS_IN_PLACE=out.untyped_storage()._cdata == logits.untyped_storage()._cdata,
            BLOCK=min(GRADIENT_BLOCK, triton.next_power_of_2(num_columns)),
            ACC=accumulation_type(logits),
            num_warps=8,
        )
    return out
