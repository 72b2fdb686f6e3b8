"""RMSNorm in Triton: a row at a time stays in registers, forward and backward read their inputs once.

The gradient of the weight is a sum over all rows. A fixed number of programs each take every P-th row and write one
partial sum, which torch adds in a fixed order: no atomics, so two runs agree bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppomax.kernels.numerics import wide_dtype
from ppomax.kernels.numerics_triton import accumulation_type, num_programs, warps_for


@triton.jit
def _forward_kernel(X, stride_x, WEIGHT, Y, SCALE, H, eps, BLOCK: tl.constexpr, ACC: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < H
    x = tl.load(X + row * stride_x + column, mask=inside, other=0.0).to(ACC)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / H + eps)
    weight = tl.load(WEIGHT + column, mask=inside, other=0.0).to(ACC)
    tl.store(Y + row * H + column, x * scale * weight, mask=inside)
    tl.store(SCALE + row, scale)


@triton.jit
def _backward_kernel(
    GRAD, stride_grad, X, stride_x, WEIGHT, SCALE, GRAD_X, PARTIAL, N, H, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """dx = scale (g w - x scale^2 mean(g w x)), dw = sum over rows of g x scale."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < H
    weight = tl.load(WEIGHT + column, mask=inside, other=0.0).to(ACC)
    grad_weight = tl.zeros((BLOCK,), dtype=ACC)
    for row in range(program, N, tl.num_programs(0)):
        x = tl.load(X + row * stride_x + column, mask=inside, other=0.0).to(ACC)
        grad = tl.load(GRAD + row * stride_grad + column, mask=inside, other=0.0).to(ACC)
        scale = tl.load(SCALE + row)
        unit = x * scale
        weighted = grad * weight
        mean = tl.sum(weighted * unit, axis=0) / H
        tl.store(GRAD_X + row * H + column, scale * (weighted - unit * mean), mask=inside)
        grad_weight += grad * unit
    tl.store(PARTIAL + program * H + column, grad_weight, mask=inside)


def forward(x: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """See rms_norm_reference.forward."""
    N, H = x.shape
    y = torch.empty((N, H), dtype=x.dtype, device=x.device)
    scale = torch.empty(N, dtype=wide_dtype(x), device=x.device)
    if N > 0:
        block = triton.next_power_of_2(H)
        acc, warps = accumulation_type(x), warps_for(block)
        _forward_kernel[(N,)](x, x.stride(0), weight, y, scale, H, eps, BLOCK=block, ACC=acc, num_warps=warps)
    return y, scale


def backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """See rms_norm_reference.backward."""
    N, H = x.shape
    grad_x = torch.empty((N, H), dtype=x.dtype, device=x.device)
    programs = min(N, num_programs(x.device))
    partial = torch.empty((programs, H), dtype=scale.dtype, device=x.device)
    if N > 0:
        block = triton.next_power_of_2(H)
        _backward_kernel[(programs,)](
            grad,
            grad.stride(0),
            x,
            x.stride(0),
            weight,
            scale,
            grad_x,
            partial,
            N,
            H,
            BLOCK=block,
            ACC=accumulation_type(x),
            num_warps=warps_for(block),
        )
    return grad_x, partial.sum(dim=0).to(weight.dtype)
