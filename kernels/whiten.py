"""Masked mean and variance of advantages, mergeable over parts of a batch, and the whitening built on them."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from ppomax.kernels.dispatch import implementation
from ppomax.kernels.numerics import wide_dtype


class Moments(NamedTuple):
    """Moments of the kept entries, float64 scalars on the device: their number, their mean, the sum of (x - mean)^2."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    mean: Tensor
    m2: Tensor


@torch.no_grad()
def whiten(
    x: Tensor,
    mask: Tensor,
    *,
    moments: Moments | None = None,
    shift_mean: bool = True,
    unbiased: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """Scales x so that its kept entries have variance 1 and, with shift_mean, mean 0; dropped entries become 0.

    x float and mask bool, of one shape ([B, T]): the entries to keep.
    moments: those to whiten by, when x is a part of a larger batch. Unset: those of x.
    shift_mean: False leaves the mean where it is. unbiased: divide by count - 1. eps: added to the variance.
    Returns float32 (float64 for float64 x) of the shape of x, a constant without gradient.
    Raises ValueError on unequal shapes.
    Source: paper p. 14; the biased variance and the place of eps are the released code's.
    """
    _check("whiten", x, mask)
    if moments is None:
        moments = masked_moments(x, mask)
    return _whiten(x, mask, *moments, shift_mean, unbiased, eps)


@torch.no_grad()
def masked_moments(x: Tensor, mask: Tensor) -> Moments:
    """Moments of the entries of x where mask is True, both of one shape; all 0 when there are none."""
    _check("masked_moments", x, mask)
    return Moments(*_masked_moments(x, mask).unbind())


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Moments of two parts together (Chan et al. 1979); an empty part changes nothing."""
    count = a.count + b.count
    divisor = count.clamp(min=1)
    delta = b.mean - a.mean
    mean = torch.where(b.count > 0, a.mean + delta * b.count / divisor, a.mean)
    return Moments(count, mean, a.m2 + b.m2 + delta.square() * a.count * b.count / divisor)


def _check(function: str, x: Tensor, mask: Tensor) -> None:
    if x.shape != mask.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"{function}: x {tuple(x.shape)} and mask {tuple(mask.shape)} {mask.dtype}; expected one shape and bool"
        )


@custom_op("ppomax::whiten", mutates_args=())
def _whiten(
    x: Tensor, mask: Tensor, count: Tensor, mean: Tensor, m2: Tensor, shift_mean: bool, unbiased: bool, eps: float
) -> Tensor:
    if not x.numel():
        return x.new_empty(x.shape, dtype=wide_dtype(x))
    compute = implementation("whiten", x, mask, count, mean, m2)
    return compute.whiten(x, mask, count, mean, m2, shift_mean=shift_mean, unbiased=unbiased, eps=eps)


@_whiten.register_fake
def _(
    x: Tensor, mask: Tensor, count: Tensor, mean: Tensor, m2: Tensor, shift_mean: bool, unbiased: bool, eps: float
) -> Tensor:
    return x.new_empty(x.shape, dtype=wide_dtype(x))


@custom_op("ppomax::masked_moments", mutates_args=())
def _masked_moments(x: Tensor, mask: Tensor) -> Tensor:
    if not x.numel():
        return x.new_zeros(3, dtype=torch.float64)
    return implementation("whiten", x, mask).masked_moments(x, mask)


@_masked_moments.register_fake
def _(x: Tensor, mask: Tensor) -> Tensor:
    return x.new_empty(3, dtype=torch.float64)
