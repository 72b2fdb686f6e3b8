"""GAE in torch without a loop over time.

With the lambda-return G_t = (1 - lam) V_t + lam R_t of a kept token, the returns are R_t = r_t + gamma G_next and
G_t = (1 - lam) V_t + lam r_t + gamma lam G_next: one affine recursion, which masked tokens hand on unchanged. So
G_next is simply G of the next column, wherever the next kept token is; beyond the row it is the bootstrap value.
Rows are turned around, so that the recursion runs forward, x_t = slope_t x_{t-1} + offset_t, and is solved in blocks:
x_t = scale_t (x_before + sum over s <= t of offset_s / scale_s), where scale is the running product of the slopes.
The work is done in fp64: the tensors are small, and sums over thousands of tokens stay exact to fp32 rounding.
"""

import math

import torch
from torch import Tensor

from ppomax.kernels.masking import bits_of, mask_, masked
from ppomax.kernels.numerics import wide
from ppomax.kernels.packed_rows import padded, positions, unpadded

SMALLEST_SCALE = 1e-250
"""A block is as long as the product of its slopes stays above this: 1024 tokens for slopes of 0.6 and up."""

MIN_SLOPE = 1e-16
"""Smaller slopes are taken as this one: what that adds is below fp64's rounding of what it is added to."""


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor]:
    """See ppomax.kernels.gae."""
    if cu_seqlens is not None and max_seqlen is not None:
        index = positions(cu_seqlens, max_seqlen, len(rewards))
        rows = padded(rewards, index), padded(values, index), padded(response_mask, index)
        results = _gae(*rows, gamma, lam, bootstrap)
        return unpadded(results[0], index, len(rewards)), unpadded(results[1], index, len(rewards))
    return _gae(rewards, values, response_mask, gamma, lam, bootstrap)


def _gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float, bootstrap: Tensor | None
) -> tuple[Tensor, Tensor]:
    rewards = wide(rewards).contiguous()
    bits = bits_of(response_mask.contiguous(), rewards.dtype)
    return gae_of_kept(masked(rewards, bits), values, bits, gamma=gamma, lam=lam, bootstrap=bootstrap)


def gae_of_kept(
    rewards: Tensor, values: Tensor, bits: Tensor, *, gamma: float, lam: float, bootstrap: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) of rows [B, T]; bits: the mask for the type of rewards, which are 0 outside it already."""
    bits = bits.flip(1)
    kept_rewards = rewards.flip(1).double()
    kept_values = _flipped_and_kept(wide(values).contiguous(), bits)
    slope = max(gamma * lam, MIN_SLOPE)
    # Bits are -1 on kept tokens: their slope is gamma lam, that of all others 1.
    slopes = torch.add(kept_values.new_ones(()), bits.double(), alpha=1.0 - slope)
    before = kept_values.new_zeros(len(values)) if bootstrap is None else bootstrap.double()
    offsets = torch.mul(kept_values, 1.0 - lam).add_(kept_rewards, alpha=lam)
    longest = math.inf if slope == 1.0 else math.log(SMALLEST_SCALE) / math.log(slope)
    lambda_returns = _recursion(slopes, offsets, before, int(min(longest, offsets.shape[1])))

    returns = kept_rewards
    returns[:, 1:].add_(lambda_returns[:, :-1], alpha=gamma)
    returns[:, 0].add_(before, alpha=gamma)
    advantages = torch.sub(returns, kept_values, out=kept_values)
    return (mask_(advantages.to(rewards.dtype), bits).flip(1), mask_(returns.to(rewards.dtype), bits).flip(1))


def _flipped_and_kept(values: Tensor, bits: Tensor) -> Tensor:
    """float64 of values [B, T] turned around; bits: of the mask, turned around already, for float32 or float64."""
    if values.element_size() != bits.element_size():
        bits = bits_of(bits != 0, values.dtype)
    return mask_(values.flip(1), bits).double()


def _recursion(slopes: Tensor, offsets: Tensor, before: Tensor, block: int) -> Tensor:
    """x_t = slopes_t x_{t-1} + offsets_t along the rows of [B, T], where x_{-1} is before [B]; overwrites both."""
    B, T = offsets.shape
    num_blocks = -(-T // block)
    missing = num_blocks * block - T
    if missing:
        slopes = torch.nn.functional.pad(slopes, (0, missing), value=1.0)
        offsets = torch.nn.functional.pad(offsets, (0, missing))
    scale = slopes.view(B, num_blocks, block).cumprod_(dim=2)
    sums = offsets.view(B, num_blocks, block).div_(scale).cumsum_(dim=2)
    starts = [before]
    for i in range(num_blocks - 1):
        starts.append(scale[:, i, -1] * (sums[:, i, -1] + starts[-1]))
    return sums.add_(torch.stack(starts, dim=1)[:, :, None]).mul_(scale).view(B, num_blocks * block)[:, :T]
