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
    return moments_of_kept(masked(x, bits), bits)


def moments_of_kept(x: Tensor, bits: Tensor) -> Tensor:
    """(count, mean, m2) [3] of the entries where bits (of the mask) are set; the others are 0 already."""
    kept = x.double()
    count = bits.count_nonzero().double()
    mean = kept.sum() / count.clamp(min=1)
    # Bits are -1 on kept entries: those become x - mean, the others stay 0.
    centred = torch.addcmul(kept, bits.double(), mean)
    return torch.stack((count, mean, centred.square_().sum()))


@torch.no_grad()
def whiten(
    x: Tensor, mask: Tensor, count: Tensor, mean: Tensor, m2: Tensor, *, shift_mean: bool, unbiased: bool, eps: float
) -> Tensor:
    """(x - mean) / sqrt(m2 / count + eps), plus mean unless shift_mean; with unbiased, m2 / (count - 1)."""
    x, dtype = x.contiguous(), wide(x).dtype
    variance = m2 / (count - 1 if unbiased else count).clamp(min=1)
    whitened = (x.double() - mean) * torch.rsqrt(variance + eps)
    if not shift_mean:
        whitened = whitened + mean
    return masked(whitened.to(dtype), bits_of(mask.contiguous(), dtype))
