"""RMSNorm by the C kernels, for float32 on a CPU: one pass over memory in each direction."""

import torch
from torch import Tensor

from ppomax.kernels.native import call

BLOCK_ROWS = 64
"""NORM_ROWS in cpu_kernels.c."""


def forward(x: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """(y [N, H], scale [N]) for x [N, H]."""
    y, scale = torch.empty(x.shape), torch.empty(x.shape[0])
    call("rms_norm", x, x.stride(0), weight, y, scale, *x.shape, eps)
    return y, scale


def backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(d loss / d x [N, H], d loss / d weight [H]), from grad = d loss / d y."""
    grad_x, parts = torch.empty(x.shape), torch.empty(-(-x.shape[0] // BLOCK_ROWS), x.shape[1])
    call("rms_norm_backward", grad, grad.stride(0), x, x.stride(0), weight, scale, grad_x, parts, *x.shape)
    return grad_x, parts.sum(dim=0)
