"""AdamW in Triton: one launch a tensor reads every input once and writes every result once.

Numbers that change from step to step are floats, which Triton does not compile into a kernel.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppomax.kernels.numerics_triton import accumulation_type, num_programs

BLOCK = 1024
"""Parameters of a program: 8 a thread, so that each thread has eight 16-byte loads under way."""

SUM_BLOCK = 2048
SUM_PROGRAMS = 8
"""Per processor; each thread adds a few squares at a time, and thousands before the programs' sums meet."""


@triton.jit
def _step_kernel(
    PARAM,
    GRAD,
    EXP_AVG,
    EXP_AVG_SQ,
    COPY,
    GRAD_SCALE,
    IS_FINITE,
    N,
    new_share,
    beta2,
    new_share_sq,
    correction_sq,
    eps,
    keep,
    step_size,
    ZERO_GRADS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
    if IS_FINITE is not None:
        inside = inside & (tl.load(IS_FINITE) != 0)
    grad = tl.load(GRAD + i, mask=inside, other=0.0).to(ACC)
    m = tl.load(EXP_AVG + i, mask=inside, other=0.0).to(ACC)
    v = tl.load(EXP_AVG_SQ + i, mask=inside, other=0.0).to(ACC)
    param = tl.load(PARAM + i, mask=inside, other=0.0).to(ACC)
    if GRAD_SCALE is not None:
        grad = grad * tl.load(GRAD_SCALE).to(ACC)
    m += new_share * (grad - m)
    v = v * beta2 + new_share_sq * grad * grad
    param = param * keep - step_size * (m / (tl.sqrt(v) / correction_sq + eps))
    tl.store(EXP_AVG + i, m, mask=inside)
    tl.store(EXP_AVG_SQ + i, v, mask=inside)
    tl.store(PARAM + i, param, mask=inside)
    if COPY is not None:
        tl.store(COPY + i, param, mask=inside)
    if ZERO_GRADS:
        tl.store(GRAD + i, tl.zeros((BLOCK,), dtype=ACC), mask=inside)


@triton.jit
def _square_sums_kernel(X, PARTIAL, N, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """PARTIAL[p] = sum of x^2 over every P-th block from the p-th."""
    program = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BLOCK,), dtype=ACC)
    for start in range(program * BLOCK, N, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(X + i, mask=i < N, other=0.0).to(ACC)
        squares += x * x
    tl.store(PARTIAL + program, tl.sum(squares, axis=0))


def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    copies: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: Tensor | None,
    is_finite: Tensor | None,
    zero_grads: bool,
) -> None:
    """See ppomax.kernels.adamw; flat tensors."""
    beta1, beta2 = betas
    for i, (param, grad, m, v) in enumerate(zip(params, grads, exp_avg, exp_avg_sq, strict=True)):
        if param.numel() == 0:
            continue
        _step_kernel[(triton.cdiv(param.numel(), BLOCK),)](
            param,
            grad,
            m,
            v,
            copies[i] if copies else None,
            grad_scale,
            is_finite,
            param.numel(),
            1 - beta1,
            beta2,
            1 - beta2,
            math.sqrt(1 - beta2**step),
            eps,
            1 - lr * weight_decay,
            lr / (1 - beta1**step),
            ZERO_GRADS=zero_grads,
            BLOCK=BLOCK,
            ACC=accumulation_type(param),
            num_warps=4,
        )


def squared_norm(tensors: list[Tensor]) -> Tensor:
    """See ppomax.kernels.adamw; flat tensors with at least one entry."""
    device, acc = tensors[0].device, accumulation_type(*tensors)
    most = num_programs(device, SUM_PROGRAMS)
    counts = [min(most, triton.cdiv(x.numel(), SUM_BLOCK)) for x in tensors]
    partial = torch.empty(sum(counts), dtype=torch.float64 if acc == tl.float64 else torch.float32, device=device)
    for x, count, part in zip(tensors, counts, partial.split(counts), strict=True):
        _square_sums_kernel[(count,)](x, part, x.numel(), BLOCK=SUM_BLOCK, ACC=acc, num_warps=8)
    return partial.sum(dtype=torch.float64)
