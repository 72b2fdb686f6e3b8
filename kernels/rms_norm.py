"""Root-mean-square normalisation of hidden states (Zhang and Sennrich 2019)."""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ppomax.kernels.dispatch import implementation
from ppomax.kernels.numerics import rows_of, wide_dtype


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Scales each vector of the last dimension to root mean square 1, then by weight.

    x [..., H] float: hidden states. weight [H] float: gain. eps: added to the mean square.
    Returns x / sqrt(mean(x^2) + eps) * weight, computed in fp32 throughout and rounded once, in x's dtype;
    differentiable in both.
    Raises ValueError when weight does not have the size of x's last dimension.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: weight {tuple(weight.shape)} must be {tuple(x.shape[-1:])}, the last dimension of x"
        )
    return _forward(rows_of(x), weight.contiguous(), eps)[0].view(x.shape)


@custom_op("ppomax::rms_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return implementation("rms_norm", x, weight).forward(x, weight, eps=eps)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(x.shape[0], dtype=wide_dtype(x))


@custom_op("ppomax::rms_norm_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return implementation("rms_norm", x, weight).backward(rows_of(grad), x, weight, scale)


@_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _propagate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_backward(grad, *ctx.saved_tensors), None


_forward.register_autograd(_propagate, setup_context=_save)
