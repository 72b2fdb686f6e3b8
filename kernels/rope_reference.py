"""Rotary position embedding in torch: (a, b) -> (a cos - b sin, b cos + a sin), a and b the two halves of a head."""

import torch
from torch import Tensor

from ppomax.kernels.numerics import wide


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool) -> Tensor:
    """x [N, heads, D] rotated by the angles of cos and sin [N, D/2], or by the negative angles, in x's dtype."""
    a, b = wide(x).chunk(2, dim=-1)
    cos, sin = wide(cos)[:, None], wide(-sin if inverse else sin)[:, None]  # [N, 1, D/2]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
