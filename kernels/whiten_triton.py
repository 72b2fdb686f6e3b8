"""Masked moments and whitening in Triton.

Moments are formed in fp64 from the start (two passes over a block, which stays in registers), as (count, mean, m2) of
a part, and merged after Chan et al. (1979): parts [3, P] in memory first, then by one program in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppomax.kernels.numerics import rows_of, wide_dtype
from ppomax.kernels.numerics_triton import accumulation_type
from ppomax.kernels.numerics_triton import num_programs as programs_of

BLOCK = 1024


@triton.jit
def merge_moments(count, mean, m2, other_count, other_mean, other_m2):
    """Moments of two parts together; parts may be empty."""
    total = count + other_count
    weight = other_count / tl.maximum(total, 1.0)
    delta = other_mean - mean
    return total, mean + delta * weight, m2 + other_m2 + delta * delta * count * weight


@triton.jit
def block_moments(x, kept):
    """(count, mean, m2) in fp64 of a block's kept entries."""
    x = tl.where(kept, x, 0.0).to(tl.float64)
    count = tl.sum(kept.to(tl.int32), axis=0).to(tl.float64)
    mean = tl.sum(x, axis=0) / tl.maximum(count, 1.0)
    centred = tl.where(kept, x - mean, 0.0)
    return count, mean, tl.sum(centred * centred, axis=0)


@triton.jit
def store_moments(PARTS, part, num_parts, count, mean, m2):
    tl.store(PARTS + part, count)
    tl.store(PARTS + num_parts + part, mean)
    tl.store(PARTS + 2 * num_parts + part, m2)


@triton.jit
def _merge_parts_kernel(PARTS, OUT, num_parts, BLOCK: tl.constexpr):
    count = tl.full((), 0.0, tl.float64)
    mean = tl.full((), 0.0, tl.float64)
    m2 = tl.full((), 0.0, tl.float64)
    for start in range(0, num_parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        inside = part < num_parts
        counts = tl.load(PARTS + part, mask=inside, other=0.0)
        means = tl.load(PARTS + num_parts + part, mask=inside, other=0.0)
        m2s = tl.load(PARTS + 2 * num_parts + part, mask=inside, other=0.0)
        block_count = tl.sum(counts, axis=0)
        block_mean = tl.sum(counts * means, axis=0) / tl.maximum(block_count, 1.0)
        d = means - block_mean
        block_m2 = tl.sum(m2s + counts * d * d, axis=0)
        count, mean, m2 = merge_moments(count, mean, m2, block_count, block_mean, block_m2)
    store_moments(OUT, 0, 1, count, mean, m2)


@triton.jit
def _moments_kernel(X, stride_x, MASK, stride_mask, PARTS, num_blocks, blocks_a_row, C, BLOCK: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    count = tl.full((), 0.0, tl.float64)
    mean = tl.full((), 0.0, tl.float64)
    m2 = tl.full((), 0.0, tl.float64)
    for block in range(program, num_blocks, programs):
        row = (tl.full((), 0, tl.int64) + block) // blocks_a_row
        column = (block - row * blocks_a_row) * BLOCK + tl.arange(0, BLOCK)
        inside = column < C
        kept = tl.load(MASK + row * stride_mask + column, mask=inside, other=0) != 0
        x = tl.load(X + row * stride_x + column, mask=inside, other=0.0)
        count, mean, m2 = merge_moments(count, mean, m2, *block_moments(x.to(tl.float64), kept))
    store_moments(PARTS, program, programs, count, mean, m2)


@triton.jit
def _whiten_kernel(
    X,
    stride_x,
    MASK,
    stride_mask,
    COUNT,
    MEAN,
    M2,
    OUT,
    blocks_a_row,
    C,
    eps,
    SHIFT_MEAN: tl.constexpr,
    UNBIASED: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    divisor = tl.load(COUNT)
    if UNBIASED:
        divisor -= 1.0
    scale = (1.0 / tl.sqrt(tl.load(M2) / tl.maximum(divisor, 1.0) + eps)).to(ACC)
    mean = tl.load(MEAN)
    # In two parts the mean keeps its fp64 precision: x - mean is exact to the rounding of x.
    coarse = mean.to(ACC)
    fine = (mean - coarse).to(ACC)
    block = tl.program_id(0).to(tl.int64)
    row = block // blocks_a_row
    column = (block - row * blocks_a_row) * BLOCK + tl.arange(0, BLOCK)
    inside = column < C
    kept = tl.load(MASK + row * stride_mask + column, mask=inside, other=0) != 0
    x = tl.load(X + row * stride_x + column, mask=inside, other=0.0).to(ACC)
    out = ((x - coarse) - fine) * scale
    if not SHIFT_MEAN:
        out += coarse
    tl.store(OUT + row * C + column, tl.where(kept, out, 0.0), mask=inside)


def masked_moments(x: Tensor, mask: Tensor) -> Tensor:
    """See whiten_reference.masked_moments."""
    x, mask = _rows(x, mask)
    blocks_a_row = triton.cdiv(x.shape[1], BLOCK)
    num_blocks = x.shape[0] * blocks_a_row
    programs = min(num_blocks, programs_of(x.device))
    parts = torch.empty((3, programs), dtype=torch.float64, device=x.device)
    strides = x.stride(0), mask.stride(0)
    _moments_kernel[(programs,)](
        x, strides[0], mask, strides[1], parts, num_blocks, blocks_a_row, x.shape[1], BLOCK=BLOCK, num_warps=4
    )
    return merged(parts)


def merged(parts: Tensor) -> Tensor:
    """Moments [3] of parts [3, P], P > 0."""
    out = torch.empty(3, dtype=torch.float64, device=parts.device)
    block = min(BLOCK, triton.next_power_of_2(parts.shape[1]))
    _merge_parts_kernel[(1,)](parts, out, parts.shape[1], BLOCK=block, num_warps=4)
    return out


def whiten(
    x: Tensor, mask: Tensor, count: Tensor, mean: Tensor, m2: Tensor, *, shift_mean: bool, unbiased: bool, eps: float
) -> Tensor:
    """See whiten_reference.whiten."""
    out = torch.empty(x.shape, dtype=wide_dtype(x), device=x.device)
    x, mask = _rows(x, mask)
    blocks_a_row = triton.cdiv(x.shape[1], BLOCK)
    _whiten_kernel[(x.shape[0] * blocks_a_row,)](
        x,
        x.stride(0),
        mask,
        mask.stride(0),
        count,
        mean,
        m2,
        out,
        blocks_a_row,
        x.shape[1],
        eps,
        SHIFT_MEAN=shift_mean,
        UNBIASED=unbiased,
        BLOCK=BLOCK,
        ACC=accumulation_type(x),
        num_warps=4,
    )
    return out


def _rows(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """x and mask as [rows, columns]: as one row where both are contiguous."""
    if x.is_contiguous() and mask.is_contiguous():
        return x.view(1, -1), mask.view(1, -1)
    return (rows_of(x), rows_of(mask)) if x.dim() else (x.view(1, 1), mask.view(1, 1))
