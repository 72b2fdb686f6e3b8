"""SwiGLU by the C kernels, for float32 on a CPU: one pass over memory, where torch takes one for each product."""

import torch
from torch import Tensor

from ppomax.kernels.native import call


def forward(gate_up: Tensor) -> Tensor:
    """y [N, F] of gate_up [N, 2F]."""
    y = torch.empty(gate_up.shape[0], gate_up.shape[1] // 2)
    call("swiglu", gate_up, gate_up.stride(0), y, *y.shape)
    return y


def backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """d loss / d gate_up [N, 2F], from grad = d loss / d y [N, F]."""
    grad_gate_up = torch.empty(gate_up.shape)
    call("swiglu_backward", grad, grad.stride(0), gate_up, gate_up.stride(0), grad_gate_up, *grad.shape)
    return grad_gate_up
