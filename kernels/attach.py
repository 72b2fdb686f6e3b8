"""Gives a number that was computed with its gradients the place in autograd's graph that it would have had."""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ppomax.kernels.numerics import wide


def with_gradients(
    value: Tensor, inputs: list[Tensor], gradients: list[Tensor], *, upstream_is_one: bool = False
) -> Tensor:
    """`value`, whose derivative by each of `inputs` is the given constant of `gradients`, of the same shape.

    value: scalar. For losses that form their gradient in the forward pass, where everything it needs is at hand.
    upstream_is_one: the derivative of what is differentiated by `value` must be 1; then no gradient is multiplied.
    """
    return _with_gradients(value, inputs, gradients, upstream_is_one)


@custom_op("ppomax::with_gradients", mutates_args=())
def _with_gradients(value: Tensor, inputs: list[Tensor], gradients: list[Tensor], upstream_is_one: bool) -> Tensor:
    return value.clone()


@_with_gradients.register_fake
def _(value: Tensor, inputs: list[Tensor], gradients: list[Tensor], upstream_is_one: bool) -> Tensor:
    return torch.empty_like(value)


def _save(ctx: Any, inputs: tuple[Tensor, list[Tensor], list[Tensor], bool], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2])
    ctx.upstream_is_one = inputs[3]


def _propagate(ctx: Any, upstream: Tensor) -> tuple[None, list[Tensor], list[None], None]:
    gradients = list(ctx.saved_tensors)
    if ctx.upstream_is_one:
        torch._assert_async(upstream == 1, "a loss whose gradients were formed in its forward pass was scaled after it")
    else:
        gradients = [(wide(gradient) * upstream).to(gradient.dtype) for gradient in gradients]
    return None, gradients, [None] * len(gradients), None


_with_gradients.register_autograd(_propagate, setup_context=_save)
