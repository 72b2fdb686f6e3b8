"""The critic's clipped squared error per token, with its gradient formed in the forward pass.

A weighted sum over tokens, as in policy_loss.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from ppomax.kernels.attach import with_gradients
from ppomax.kernels.dispatch import implementation
from ppomax.kernels.numerics import wide_dtype


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
    clip: None for the plain squared error.
    Returns ValueLoss, float32 (float64 where one of the inputs has it).
    Raises ValueError on unequal shapes and on a clip that is not positive.
    Source: paper Eq. 16; the factor 1/2 and the clipping are the released code's.
    """
    shapes = [tuple(x.shape) for x in (values, old_values, returns, weights)]
    if len(set(shapes)) != 1:
        raise ValueError(f"value_loss: values, old_values, returns, weights have shapes {shapes}; expected one shape")
    check_value_clip("value_loss", clip)
    constants = [x.detach().contiguous() for x in (values, old_values, returns, weights)]
    scalars, grad = _value_loss(*constants, clip)
    loss, clip_fraction = scalars.unbind()
    return ValueLoss(with_gradients(loss, [values], [grad]), clip_fraction)


def check_value_clip(function: str, clip: float | None) -> None:
    """Raises ValueError on a clip that is not positive."""
    if clip is not None and not clip > 0:
        raise ValueError(f"{function}: clip {clip} must be positive or None")


@custom_op("ppomax::value_loss", mutates_args=())
def _value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    tensors = (values, old_values, returns, weights)
    return implementation("value_loss", *tensors).value_loss(*tensors, clip=clip)


@_value_loss.register_fake
def _(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    scalars = values.new_empty(2, dtype=wide_dtype(values, old_values, returns, weights))
    return scalars, torch.empty_like(values, memory_format=torch.contiguous_format)
