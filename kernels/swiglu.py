"""The gated activation of Llama's feed-forward layers (Shazeer 2020)."""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ppomax.kernels.dispatch import implementation
from ppomax.kernels.numerics import rows_of


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the two halves of the last dimension.

    gate_up [..., 2F] float: output of the joint projection, gate first.
    Returns [..., F] in the input's dtype, computed in fp32 and rounded once; differentiable. Only gate_up is kept for
    the gradient.
    Raises ValueError when the last dimension is odd.
    """
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2 or gate_up.shape[-1] == 0:
        raise ValueError(f"swiglu: {tuple(gate_up.shape)}; expected [..., 2F], the columns of gate and up")
    return _forward(rows_of(gate_up)).view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@custom_op("ppomax::swiglu", mutates_args=())
def _forward(gate_up: Tensor) -> Tensor:
    return implementation("swiglu", gate_up).forward(gate_up)


@_forward.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@custom_op("ppomax::swiglu_backward", mutates_args=())
def _backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    return implementation("swiglu", gate_up).backward(rows_of(grad), gate_up)


@_backward.register_fake
def _(grad: Tensor, gate_up: Tensor) -> Tensor:
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _propagate(ctx: Any, grad: Tensor) -> Tensor:
    return _backward(grad, *ctx.saved_tensors)


_forward.register_autograd(_propagate, setup_context=_save)
