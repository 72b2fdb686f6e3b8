"""Scalar head, clipped value loss and their gradients in torch.

v = hidden weight, l and dl/dv as in value_loss_reference.py, g = weights dl/dv:
d loss / d hidden = g weight^T, d loss / d weight = sum over tokens of g hidden.
"""

import torch
from torch import Tensor

from ppomax.kernels.numerics import keep, total, wide_dtype
from ppomax.kernels.value_loss_reference import value_terms


def value_head_loss(
    hidden: Tensor, weight: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, *, clip: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """([loss, clip_fraction], values [N], d loss / d hidden [N, H], d loss / d weight [H]); weight [H].

    The gradients have the dtypes of hidden and weight.
    """
    dtype = wide_dtype(hidden, weight, old_values, returns, weights)
    is_kept = weights != 0
    states, head = keep(hidden.to(dtype), is_kept[:, None]), weight.to(dtype)
    # With `out`, unlike operators, products keep their type under autocast.
    values = keep(torch.mv(states, head, out=states.new_empty(len(states))), is_kept)
    old, target = (keep(x.to(dtype), is_kept) for x in (old_values, returns))
    loss, grad, is_clipped = value_terms(values, old, target, clip=clip)
    token_weight = weights.to(dtype)
    scalars = torch.stack([total(token_weight * loss), total(token_weight * is_clipped)])
    grad = keep(token_weight * grad, is_kept)
    grad_weight = torch.mv(states.T, grad, out=states.new_empty(states.shape[1]))
    grad_hidden = keep(grad[:, None] * head, is_kept[:, None])
    return scalars, values, grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype)
