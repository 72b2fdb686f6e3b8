"""Scalar head and clipped value loss in Triton: hidden states are read once and stay in registers.

A few rows at a time: their values, the loss, and g weight as the gradient of the hidden states. The gradient of the
weight is a sum over all rows: a fixed number of programs each take every P-th group of rows and write one partial sum,
which torch adds in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppomax.kernels.numerics import wide_dtype
from ppomax.kernels.numerics_triton import accumulation_type, num_programs, warps_for
from ppomax.kernels.partial_sums_triton import sum_partials
from ppomax.kernels.value_loss_triton import value_token

BYTES = 16384
"""Of hidden states that a program holds at a time: two rows of 4096 bfloat16, what keeps the memory of a GPU busy."""


@triton.jit
def _value_head_loss_kernel(
    HIDDEN,
    stride_hidden,
    WEIGHT,
    OLD_VALUES,
    RETURNS,
    WEIGHTS,
    VALUES,
    GRAD_HIDDEN,
    GRAD_WEIGHT,
    PARTIAL,
    N,
    H,
    clip,
    HAS_CLIP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_column = column < H
    head = tl.load(WEIGHT + column, mask=is_column, other=0.0).to(ACC)
    grad_weight = tl.zeros((BLOCK,), dtype=ACC)
    loss_sum = tl.zeros((ROWS,), dtype=ACC)
    clipped_sum = tl.zeros((ROWS,), dtype=ACC)
    for first in range(program * ROWS, N, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        is_row = row < N
        weight = tl.load(WEIGHTS + row, mask=is_row, other=0.0).to(ACC)
        is_kept = weight != 0
        is_entry = is_row[:, None] & is_column[None, :]
        states = HIDDEN + row[:, None] * stride_hidden + column[None, :]
        hidden = tl.load(states, mask=is_kept[:, None] & is_entry, other=0.0).to(ACC)
        old_value = tl.load(OLD_VALUES + row, mask=is_kept, other=0.0).to(ACC)
        target = tl.load(RETURNS + row, mask=is_kept, other=0.0).to(ACC)
        value = tl.where(is_kept, tl.sum(hidden * head[None, :], axis=1), 0.0)
        loss, grad, is_clipped = value_token(value, old_value, target, clip, HAS_CLIP)
        # Of a row that is not read value, loss and gradient are 0.
        grad = weight * grad
        loss_sum += weight * loss
        clipped_sum += tl.where(is_clipped, weight, 0.0)
        grad_weight += tl.sum(grad[:, None] * hidden, axis=0)
        tl.store(VALUES + row, value, mask=is_row)
        grad_hidden = tl.where(is_kept[:, None], grad[:, None] * head[None, :], 0.0)
        tl.store(
            GRAD_HIDDEN + row[:, None] * H + column[None, :], grad_hidden, mask=is_row[:, None] & is_column[None, :]
        )
    tl.store(GRAD_WEIGHT + program * H + column, grad_weight, mask=is_column)
    tl.store(PARTIAL + program * 2, tl.sum(loss_sum, axis=0))
    tl.store(PARTIAL + program * 2 + 1, tl.sum(clipped_sum, axis=0))


def value_head_loss(
    hidden: Tensor, weight: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, *, clip: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See value_head_loss_reference.value_head_loss."""
    N, H = hidden.shape
    dtype, device = wide_dtype(hidden, weight, old_values, returns, weights), hidden.device
    block = triton.next_power_of_2(H)
    rows = max(1, min(8, BYTES // (block * hidden.element_size())))
    programs = min(triton.cdiv(N, rows), num_programs(device))
    values = torch.empty(N, dtype=dtype, device=device)
    grad_hidden = torch.empty((N, H), dtype=hidden.dtype, device=device)
    grad_weight = torch.empty((programs, H), dtype=dtype, device=device)
    partial = torch.empty((programs, 2), dtype=dtype, device=device)
    if N > 0:
        _value_head_loss_kernel[(programs,)](
            hidden,
            hidden.stride(0),
            weight.contiguous(),
            *(x.contiguous() for x in (old_values, returns, weights)),
            values,
            grad_hidden,
            grad_weight,
            partial,
            N,
            H,
            0.0 if clip is None else clip,
            HAS_CLIP=clip is not None,
            ROWS=rows,
            BLOCK=block,
            ACC=accumulation_type(hidden, weight, old_values, returns, weights),
            num_warps=warps_for(block),
        )
    return sum_partials(partial), values, grad_hidden, grad_weight.sum(dim=0).to(weight.dtype)
