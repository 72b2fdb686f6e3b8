"""SwiGLU in Triton: a program takes a tile of one row, 8 entries of gate and of up a thread."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppomax.kernels.numerics_triton import accumulation_type

BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def _forward_kernel(GATE_UP, stride, Y, F, TILES, BLOCK: tl.constexpr, ACC: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    row = program // TILES
    column = program % TILES * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(GATE_UP + row * stride + column, mask=inside, other=0.0).to(ACC)
    up = tl.load(GATE_UP + row * stride + F + column, mask=inside, other=0.0).to(ACC)
    tl.store(Y + row * F + column, gate / (1.0 + tl.exp(-gate)) * up, mask=inside)


@triton.jit
def _backward_kernel(
    GRAD, stride_grad, GATE_UP, stride, GRAD_GATE_UP, F, TILES, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """d gate = grad up s (1 + gate (1 - s)), d up = grad gate s, s = sigmoid(gate)."""
    program = tl.program_id(0).to(tl.int64)
    row = program // TILES
    column = program % TILES * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    grad = tl.load(GRAD + row * stride_grad + column, mask=inside, other=0.0).to(ACC)
    gate = tl.load(GATE_UP + row * stride + column, mask=inside, other=0.0).to(ACC)
    up = tl.load(GATE_UP + row * stride + F + column, mask=inside, other=0.0).to(ACC)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    grad_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(GRAD_GATE_UP + row * 2 * F + column, grad_gate, mask=inside)
    tl.store(GRAD_GATE_UP + row * 2 * F + F + column, grad * gate * sigmoid, mask=inside)


def forward(gate_up: Tensor) -> Tensor:
    """See swiglu_reference.forward."""
    N, F = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty((N, F), dtype=gate_up.dtype, device=gate_up.device)
    tiles = triton.cdiv(F, BLOCK)
    if y.numel() > 0:
        acc = accumulation_type(gate_up)
        _forward_kernel[(N * tiles,)](
            gate_up, gate_up.stride(0), y, F, tiles, BLOCK=BLOCK, ACC=acc, num_warps=NUM_WARPS
        )
    return y


def backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """See swiglu_reference.backward."""
    N, F = grad.shape
    grad_gate_up = torch.empty((N, 2 * F), dtype=gate_up.dtype, device=gate_up.device)
    tiles = triton.cdiv(F, BLOCK)
    if grad.numel() > 0:
        _backward_kernel[(N * tiles,)](
            grad,
            grad.stride(0),
            gate_up,
            gate_up.stride(0),
            grad_gate_up,
            F,
            tiles,
            BLOCK=BLOCK,
            ACC=accumulation_type(gate_up),
            num_warps=NUM_WARPS,
        )
    return grad_gate_up
