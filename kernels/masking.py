"""Masking of constants without a branch: torch.where on the CPU mispredicts one on every edge of a mask."""

import torch
from torch import Tensor

INTEGERS = {4: torch.int32, 8: torch.int64}
"""The integer of as many bytes as a float."""


def bits_of(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """For `masked`: integers of the size of the floating-point dtype, all bits set where mask [...] is True, else 0."""
    return mask.to(INTEGERS[dtype.itemsize]).neg_()


def mask_(x: Tensor, bits: Tensor) -> Tensor:
    """`masked` in place."""
    x.view(bits.dtype).bitwise_and_(bits)
    return x


def masked(x: Tensor, bits: Tensor) -> Tensor:
    """x where bits are set and +0 elsewhere, NaN or not, of one shape; a constant for autograd."""
    return x.view(bits.dtype).bitwise_and(bits).view(x.dtype)
