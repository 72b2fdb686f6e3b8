"""Rotary position embedding by the C kernel, for float32 on a CPU."""

import torch
from torch import Tensor

from ppomax.kernels.native import call


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool) -> Tensor:
    """x [N, heads, D] rotated by the angles of cos and sin [N, D/2], or by the negative angles."""
    y = torch.empty(x.shape)
    strides = x.stride(0), x.stride(1)
    call("rope", x, *strides, cos, cos.stride(0), sin, sin.stride(0), y, *x.shape, -1.0 if inverse else 1.0)
    return y
