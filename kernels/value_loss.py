"""The critic's clipped squared error per token, with its gradient formed in the forward pass.

A weighted sum over tokens, as in policy_loss.py.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ppomax.kernels.dispatch import implementation


class ValueLoss(NamedTuple):
    """Scalars on the device of the inputs, sums over `weights`; only loss carries a gradient.

    clip_fraction: tokens whose clipped error is the larger one.
    """

    loss: Tensor
    clip_fraction: Tensor


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, *, clip: float | None
) -> ValueLoss:
    """Weighted sum of 1/2 max((v - R)^2, (clamp(v, v_old - clip, v_old + clip) - R)^2).

    All tensors have one shape, [N] or [B, T], and are float, in units of reward.
    values: v of the critic being trained, the only input that gets a gradient.
    old_values: v_old at rollout time. returns: R.
    weights: loss weight of each token, mask / global number of kept tokens; 0: the token is not read.
    clip: None for the plain squared error. Returns ValueLoss.
    Raises ValueError on unequal shapes and on a clip that is not positive.
    Source: paper Eq. 16; the factor 1/2 and the clipping are the released code's.
    """
    shapes = [tuple(x.shape) for x in (values, old_values, returns, weights)]
    if len(set(shapes)) != 1:
        raise ValueError(f"value_loss: values, old_values, returns, weights have shapes {shapes}; expected one shape")
    if clip is not None and clip <= 0:
        raise ValueError(f"value_loss: clip {clip} must be positive or None")
    return ValueLoss(*_ValueLoss.apply(values, old_values, returns, weights, clip))


class _ValueLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: float | None
    ) -> tuple[Tensor, Tensor]:
        compute = implementation("value_loss", values, old_values, returns, weights)
        loss, clip_fraction, grad = compute.value_loss(values, old_values, returns, weights, clip=clip)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(clip_fraction)
        return loss, clip_fraction

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_loss.to(grad.dtype), None, None, None, None
