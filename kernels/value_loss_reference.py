"""The clipped value loss and its analytic gradient in torch.

With e = v - R and c = clamp(v, v_old - clip, v_old + clip) - R: l = max(e^2, c^2) / 2 and
dl/dv = e where v is not clamped or e^2 > c^2, e / 2 on an exact tie of a clamped value, else 0.
"""

import torch
from torch import Tensor

from ppomax.kernels.numerics import keep, total, wide_dtype


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, *, clip: float | None
) -> tuple[Tensor, Tensor]:
    """([loss, clip_fraction], d loss / d values in values' dtype)."""
    dtype = wide_dtype(values, old_values, returns, weights)
    is_kept = weights != 0
    loss, grad, is_clipped = value_terms(
        *(keep(x.to(dtype), is_kept) for x in (values, old_values, returns)), clip=clip
    )
    weight = weights.to(dtype)
    scalars = torch.stack([total(weight * loss), total(weight * is_clipped)])
    return scalars, keep(weight * grad, is_kept).to(values.dtype)


def value_terms(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Per token, before any weight: (loss, d loss / d value, is_clipped), the last one bool.

    float32 or float64 inputs of one shape and dtype.
    """
    error = values - returns
    if clip is None:
        return error.square() / 2, error, torch.zeros_like(error, dtype=torch.bool)
    bounded = torch.clamp(values, old_values - clip, old_values + clip)
    plain, other = error.square(), (bounded - returns).square()
    is_clipped = other > plain
    is_tie = (other == plain) & (bounded != values)
    grad = torch.where(is_tie, error / 2, keep(error, ~is_clipped))
    return torch.maximum(plain, other) / 2, grad, is_clipped
