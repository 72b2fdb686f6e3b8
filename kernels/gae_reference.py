"""GAE in torch without a loop over time.

With the lambda-return G_t = (1 - lam) V_t + lam R_t of a kept token, the returns are R_t = r_t + gamma G_next and
G_t = (1 - lam) V_t + lam r_t + gamma lam G_next: one affine recursion, which masked tokens hand on unchanged. So
G_next is simply G of the next column, wherever the next kept token is; beyond the row it is the bootstrap value.
Rows are turned around, so that the recursion runs forward, x_t = slope_t x_{t-1} + offset_t, and is solved in blocks:
x_t = scale_t (x_before + sum over s <= t of offset_s / scale_s), where scale is the running product of the slopes.
The work is done in fp64: the tensors are small, and sums over thousands of tokens stay exact to fp32 rounding.
"""

import torch
from torch import Tensor

from ppomax.kernels.masking import bits_of, masked
from ppomax.kernels.numerics import wide
from ppomax.kernels.packed_rows import padded, positions, unpadded

STEEP = 1e-4
BLOCK, BLOCK_WHEN_STEEP = 64, 16
"""Columns of a block, and for slopes below STEEP: slope^columns stays above 1e-256."""

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
    rewards = wide(rewards)
    bits = bits_of(response_mask, rewards.dtype)
    return gae_of_kept(masked(rewards, bits), values, bits, gamma=gamma, lam=lam, bootstrap=bootstrap)


def gae_of_kept(
    rewards: Tensor, values: Tensor, bits: Tensor, *, gamma: float, lam: float, bootstrap: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) of rows [B, T]; bits: the mask for the type of rewards, which are 0 outside it already."""
    values = wide(values)
    values = masked(values, bits if values.dtype == rewards.dtype else bits_of(bits != 0, values.dtype))
    kept_rewards, kept_values = rewards.flip(1).double(), values.flip(1).double()
    slope = max(gamma * lam, MIN_SLOPE)
    # Bits are -1 on kept tokens: their slope is gamma lam, that of all others 1.
    slopes = bits.flip(1).double().mul_(1.0 - slope).add_(1.0)
    before = kept_values.new_zeros(len(values)) if bootstrap is None else bootstrap.double()
    block = BLOCK if slope > STEEP else BLOCK_WHEN_STEEP
    lambda_returns = _recursion(slopes, torch.lerp(kept_values, kept_rewards, lam), before, block)

    returns = kept_rewards
    returns[:, 1:].add_(lambda_returns[:, :-1], alpha=gamma)
    returns[:, 0].add_(before, alpha=gamma)
    advantages = torch.sub(returns, kept_values, out=kept_values)
    return (
        masked(advantages.to(rewards.dtype).flip(1), bits),
        masked(returns.to(rewards.dtype).flip(1), bits),
    )


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
    last_scale, last_sum = scale[:, :, -1].t().contiguous(), sums[:, :, -1].t().contiguous()  # [num_blocks, B]
    starts = [before]
    for block_scale, block_sum in zip(last_scale[:-1], last_sum[:-1], strict=True):
        starts.append(block_scale * (block_sum + starts[-1]))
    return sums.add_(torch.stack(starts, dim=1)[:, :, None]).mul_(scale).view(B, num_blocks * block)[:, :T]
