"""RMSNorm in torch: y = x scale weight with scale = 1 / sqrt(mean(x^2) + eps) of each row."""

import torch
from torch import Tensor

from ppomax.kernels.numerics import wide


def forward(x: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """(y [N, H] in x's dtype, scale [N] float32 or wider) for x [N, H]."""
    full = wide(x)
    scale = torch.rsqrt(full.square().mean(dim=-1) + eps)
    return (full * scale[:, None] * wide(weight)).to(x.dtype), scale


def backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(d loss / d x [N, H], d loss / d weight [H]) in the dtypes of x and weight, from grad = d loss / d y.

    With u = x scale and h = grad weight: dx = scale (h - u mean(h u)), dw = sum over rows of grad u.
    """
    unit = wide(x) * scale[:, None]
    weighted = wide(grad) * wide(weight)
    mean = (weighted * unit).mean(dim=-1, keepdim=True)
    grad_x = scale[:, None] * (weighted - unit * mean)
    return grad_x.to(x.dtype), (wide(grad) * unit).sum(dim=0).to(weight.dtype)
