"""Masked moments and whitening in torch, in fp64."""

import torch
from torch import Tensor

from ppomax.kernels.masking import bits_of, masked
from ppomax.kernels.numerics import wide


@torch.no_grad()
def masked_moments(x: Tensor, mask: Tensor) -> Tensor:
    """(count, mean, m2) [3]; two passes, so that a large mean does not cancel the variance."""
    x = wide(x)
    bits = bits_of(mask, x.dtype)
    kept = masked(x, bits).double()
    count = mask.count_nonzero().double()
    mean = kept.sum() / count.clamp(min=1)
    centred = kept.addcmul_(bits.double(), mean)  # bits are -1 on kept entries, and 0 where kept is 0
    return torch.stack((count, mean, centred.square_().sum()))


@torch.no_grad()
def whiten(
    x: Tensor, mask: Tensor, count: Tensor, mean: Tensor, m2: Tensor, *, shift_mean: bool, unbiased: bool, eps: float
) -> Tensor:
    """(x - mean) / sqrt(m2 / count + eps), plus mean unless shift_mean; with unbiased, m2 / (count - 1)."""
    dtype = wide(x).dtype
    variance = m2 / (count - 1 if unbiased else count).clamp(min=1)
    whitened = (x.double() - mean) * torch.rsqrt(variance + eps)
    if not shift_mean:
        whitened = whitened + mean
    return masked(whitened.to(dtype), bits_of(mask, dtype))
