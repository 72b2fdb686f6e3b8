"""The clipped value loss in Triton: loss, gradient and clip fraction of a block of tokens in one read.

`value_token` is the definition of the loss for all kernels that end in it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppomax.kernels.numerics import wide_dtype
from ppomax.kernels.numerics_triton import accumulation_type
from ppomax.kernels.partial_sums_triton import sum_partials

BLOCK = 1024
"""Tokens of a program."""


@triton.jit
def value_token(value, old_value, target, clip, HAS_CLIP: tl.constexpr):
    """Per token, before any weight: (loss, d loss / d value, is_clipped), the last one int1.

    value, old_value, target: float32 (float64), scalars or blocks; no bfloat16. clip: a number at run time, not used
    without HAS_CLIP. See value_loss_reference.value_terms, which gives the same in the same order.
    """
    error = value - target
    plain = error * error
    if HAS_CLIP:
        # Triton's own default would turn NaN of old_value into a number on a GPU.
        bounded = tl.maximum(value, old_value - clip, propagate_nan=tl.PropagateNan.ALL)
        bounded = tl.minimum(bounded, old_value + clip, propagate_nan=tl.PropagateNan.ALL)
        other = (bounded - target) * (bounded - target)
        is_clipped = other > plain
        is_tie = (other == plain) & (bounded != value)
        loss = 0.5 * tl.maximum(plain, other, propagate_nan=tl.PropagateNan.ALL)
        grad = tl.where(is_clipped, 0.0, tl.where(is_tie, 0.5 * error, error))
    else:
        is_clipped = plain < 0  # never
        loss = 0.5 * plain
        grad = error
    return loss, grad, is_clipped


@triton.jit
def _value_loss_kernel(
    VALUES,
    OLD_VALUES,
    RETURNS,
    WEIGHTS,
    GRAD,
    PARTIAL,
    N,
    clip,
    HAS_CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    token = program * BLOCK + tl.arange(0, BLOCK)
    inside = token < N
    weight = tl.load(WEIGHTS + token, mask=inside, other=0.0).to(ACC)
    is_kept = weight != 0
    # Masked by is_kept, every entry would be a load of its own: whole blocks are read, and entries dropped by choice.
    value = tl.where(is_kept, tl.load(VALUES + token, mask=inside, other=0.0).to(ACC), 0.0)
    old_value = tl.where(is_kept, tl.load(OLD_VALUES + token, mask=inside, other=0.0).to(ACC), 0.0)
    target = tl.where(is_kept, tl.load(RETURNS + token, mask=inside, other=0.0).to(ACC), 0.0)
    loss, grad, is_clipped = value_token(value, old_value, target, clip, HAS_CLIP)
    # Of a token that is not read all of them are 0.
    tl.store(GRAD + token, weight * grad, mask=inside)
    tl.store(PARTIAL + program * 2, tl.sum(weight * loss, axis=0))
    tl.store(PARTIAL + program * 2 + 1, tl.sum(tl.where(is_clipped, weight, 0.0), axis=0))


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, *, clip: float | None
) -> tuple[Tensor, Tensor]:
    """See value_loss_reference.value_loss."""
    N = values.numel()
    tensors = (values, old_values, returns, weights)
    grad = torch.empty_like(values, memory_format=torch.contiguous_format)
    programs = triton.cdiv(N, BLOCK)
    partial = torch.empty((programs, 2), dtype=wide_dtype(*tensors), device=values.device)
    if N > 0:
        _value_loss_kernel[(programs,)](
            *(x.contiguous() for x in tensors),
            grad,
            partial,
            N,
            0.0 if clip is None else clip,
            HAS_CLIP=clip is not None,
            BLOCK=BLOCK,
            ACC=accumulation_type(*tensors),
            num_warps=4,
        )
    return sum_partials(partial), grad
