"""The critic's scalar head and its clipped value loss in one pass over the hidden states, gradients included.

The loss of value_loss.py on values = hidden @ weight: a weighted sum over tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from ppomax.kernels.attach import with_gradients
from ppomax.kernels.dispatch import implementation
from ppomax.kernels.numerics import rows_of, wide_dtype
from ppomax.kernels.value_loss import check_value_clip


class ValueHeadLoss(NamedTuple):
    """loss and clip_fraction: as in ValueLoss. values [N]: of the head, 0 for tokens of weight 0.

    Only loss carries a gradient.
    """

    loss: Tensor
    clip_fraction: Tensor
    values: Tensor


def value_head_loss(
    hidden: Tensor,
    weight: Tensor,
    old_values: Tensor,
    returns: Tensor,
    weights: Tensor,
    *,
    clip: float | None,
    upstream_is_one: bool = False,
) -> ValueHeadLoss:
    """value_loss(hidden @ weight, old_values, returns, weights), which reads hidden once and writes its gradient once.

    hidden [N, H] float: final hidden states. weight [H] or [1, H] float: of the head, which has no bias.
    old_values, returns, weights [N], clip: as in value_loss; the hidden state of a token of weight 0 is not read.
    Values, loss and the gradient of weight are accumulated in float32 (float64 where one of the inputs has it);
    gradients are rounded once to the dtypes of hidden and weight. Under tensor parallelism every rank holds the whole
    weight and the same hidden states: no collective.
    upstream_is_one: backward starts from loss or from sums with it, not from multiples (put factors into weights); then
    the gradients are handed on as they are, where a product would read and write that of hidden once more.
    Returns ValueHeadLoss, differentiable in hidden and weight.
    Raises ValueError on shapes that do not fit and on a clip that is not positive.
    Source: paper Eq. 16, as value_loss.
    """
    N, H = hidden.shape if hidden.dim() == 2 else (-1, -1)
    shapes = [tuple(x.shape) for x in (old_values, returns, weights)]
    if tuple(weight.shape) not in ((H,), (1, H)) or set(shapes) != {(N,)}:
        raise ValueError(
            f"value_head_loss: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and old_values, returns,"
            f" weights {shapes}; expected [N, H], [H] or [1, H], and [N]"
        )
    check_value_clip("value_head_loss", clip)
    constants = [x.detach() for x in (old_values, returns, weights)]
    head = weight.detach().reshape(-1)
    scalars, values, grad_hidden, grad_weight = _value_head_loss(rows_of(hidden.detach()), head, *constants, clip)
    loss, clip_fraction = scalars.unbind()
    gradients = [grad_hidden, grad_weight.view(weight.shape)]
    loss = with_gradients(loss, [hidden, weight], gradients, upstream_is_one=upstream_is_one)
    return ValueHeadLoss(loss, clip_fraction, values)


@custom_op("ppomax::value_head_loss", mutates_args=())
def _value_head_loss(
    hidden: Tensor, weight: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = (hidden, weight, old_values, returns, weights)
    return implementation("value_head_loss", *tensors).value_head_loss(*tensors, clip=clip)


@_value_head_loss.register_fake
def _(
    hidden: Tensor, weight: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = wide_dtype(hidden, weight, old_values, returns, weights)
    scalars, values = hidden.new_empty(2, dtype=dtype), hidden.new_empty(hidden.shape[0], dtype=dtype)
    return scalars, values, torch.empty_like(hidden, memory_format=torch.contiguous_format), torch.empty_like(weight)
