"""The clipped value loss and its analytic gradient in torch.

With e = v - R and c = clamp(v, v_old - clip, v_old + clip) - R: l = max(e^2, c^2) / 2 and
dl/dv = e where v is not clamped or e^2 > c^2, e / 2 on an exact tie of a clamped value, else 0.
"""

import torch
from torch import Tensor

from ppomax.kernels.numerics import keep, total, wide


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, *, clip: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, clip_fraction, d loss / d values)."""
    is_kept = weights != 0
    new, old, target = (keep(wide(x), is_kept) for x in (values, old_values, returns))
    weight = wide(weights)
    error = new - target
    is_clipped = torch.zeros_like(is_kept)
    loss, grad = error.square(), error
    if clip is not None:
        bounded = torch.clamp(new, old - clip, old + clip)
        bounded_loss = (bounded - target).square()
        is_clipped = bounded_loss > loss
        is_tie = (bounded_loss == loss) & (bounded != new)
        grad = torch.where(is_tie, error / 2, keep(error, ~is_clipped))
        loss = torch.maximum(loss, bounded_loss)
    return total(weight * loss) / 2, total(weight * is_clipped), keep(weight * grad, is_kept).to(values.dtype)
