"""AdamW in torch, in pieces that stay in a processor's cache.

g = grad_scale grad; m = mean of g, v = mean of g^2, both bias-corrected; p <- p - lr (m / (sqrt(v) + eps) + decay p).
"""

import math

import torch
from torch import Tensor

from ppomax.kernels.numerics import wide

PIECE = 2**18
"""Entries that are updated at a time: 1 MiB of fp32."""

SUMMED = 2**12
"""Squares that are summed in fp32."""


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
    correction = math.sqrt(1 - beta2**step)
    for i, tensors in enumerate(zip(params, grads, exp_avg, exp_avg_sq, strict=True)):
        pieces = [x.split(PIECE) for x in tensors]
        copy_pieces = copies[i].split(PIECE) if copies else [None] * len(pieces[0])
        for p, grad, m, v, copy in zip(*pieces, copy_pieces, strict=True):
            g = grad.to(p.dtype)
            g = g if grad_scale is None else g * grad_scale
            new_m = m.lerp(g, 1 - beta1)
            new_v = (v * beta2).addcmul_(g, g, value=1 - beta2)
            denominator = new_v.sqrt().div_(correction).add_(eps)
            new_p = (p * (1 - lr * weight_decay)).addcdiv_(new_m, denominator, value=-lr / (1 - beta1**step))
            _store(m, new_m, is_finite)
            _store(v, new_v, is_finite)
            _store(p, new_p, is_finite)
            if copy is not None:
                _store(copy, new_p.to(copy.dtype), is_finite)
            if zero_grads:
                _store(grad, torch.zeros_like(grad), is_finite)


def _store(target: Tensor, value: Tensor, is_finite: Tensor | None) -> None:
    if is_finite is None:
        target.copy_(value)
    else:
        torch.where(is_finite, value, target, out=target)


def squared_norm(tensors: list[Tensor]) -> Tensor:
    """See ppomax.kernels.adamw; flat tensors with at least one entry."""
    norms = []
    for x in tensors:
        rest = x.numel() % SUMMED
        whole = wide(x[: x.numel() - rest]).view(-1, SUMMED)
        last = wide(x[x.numel() - rest :]).view(1, rest)
        norms += [torch.linalg.vector_norm(part, dim=1).double() for part in (whole, last)]
    return torch.cat(norms).square().sum()
