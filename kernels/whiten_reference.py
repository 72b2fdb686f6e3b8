"""Masked moments and whitening in torch, in fp64."""

import torch
from torch import Tensor

from ppomax.kernels.numerics import keep, wide


@torch.no_grad()
def masked_moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, m2); two passes, so that a large mean does not cancel the variance."""
    kept = keep(x.double(), mask)
    count = mask.sum(dtype=torch.float64)
    mean = kept.sum() / count.clamp(min=1)
    return count, mean, keep(kept - mean, mask).square().sum()


@torch.no_grad()
def whiten(
    x: Tensor, mask: Tensor, count: Tensor, mean: Tensor, m2: Tensor, *, shift_mean: bool, unbiased: bool, eps: float
) -> Tensor:
    """(x - mean) / sqrt(m2 / count + eps), plus mean unless shift_mean; with unbiased, m2 / (count - 1)."""
    variance = m2 / (count - 1 if unbiased else count).clamp(min=1)
    whitened = (x.double() - mean) * torch.rsqrt(variance + eps)
    if not shift_mean:
        whitened = whitened + mean
    return keep(whitened, mask).to(wide(x).dtype)
