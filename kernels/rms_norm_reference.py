"""RMSNorm in torch: y = x / sqrt(mean(x^2) + eps) * weight."""

import torch
from torch import Tensor

from ppomax.kernels.numerics import wide


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """See ppomax.kernels.rms_norm."""
    full = wide(x)
    scale = torch.rsqrt(full.square().mean(dim=-1, keepdim=True) + eps)
    return (full * scale * wide(weight)).to(x.dtype)
