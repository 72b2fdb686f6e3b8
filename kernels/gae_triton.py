"""GAE in Triton: one program walks one row from its end, a block of tokens at a time, each block by parallel scans.

Blocks are turned around after they are loaded, so that scans run forward. Carried from block to block are the
advantage of the nearest kept token and where that token is.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from ppomax.kernels.numerics_triton import accumulation_type
from ppomax.kernels.token_rewards_triton import (
    NOWHERE,
    block_for,
    falling,
    load_falling,
    load_kept,
    new_output,
    num_programs,
    row_span,
    row_warps,
    shape_of,
    store_falling,
    with_stride,
)


@triton.jit
def _nearest(later, t):
    return tl.minimum(later, t)


@triton.jit
def next_kept(MASK, t, position, end, nearest, BLOCK: tl.constexpr):
    """[BLOCK]: the kept token after each of the falling positions of a row, NOWHERE if there is none.

    t: the positions as `falling` gives them; nearest: the first kept token after this block.
    """
    candidate = tl.where(load_kept(MASK, t + 1, end, BLOCK), position + 1, NOWHERE)
    return tl.minimum(tl.associative_scan(candidate, 0, _nearest), nearest)


@triton.jit
def next_value(VALUES, following, bootstrap, BLOCK: tl.constexpr):
    """[BLOCK]: the values of the tokens `following` in a row, bootstrap where there is none."""
    # In two dimensions as all other loads, so that the compiler leaves four neighbours to a thread throughout.
    following = tl.reshape(following, (BLOCK // 4, 4))
    exists = following != NOWHERE
    values = tl.load(VALUES + following, mask=exists, other=0.0).to(bootstrap.dtype)
    return tl.reshape(tl.where(exists, values, bootstrap), (BLOCK,))


@triton.jit
def _joined(decay, offset, next_decay, next_offset):
    """First x -> 2^decay x + offset, then the next."""
    return decay + next_decay, tl.exp2(next_decay) * offset + next_offset


@triton.jit
def block_advantages(rewards, values, next_values, kept, one_minus_gamma, decay, later):
    """A = delta + gamma lam A_next of a block; later: the advantage of the first kept token after the block.

    Where a token is not kept, A of the kept token after it. decay: log2(gamma lam). It and 1 - gamma keep in float32
    what gamma near 1 would lose, which a long row multiplies.
    """
    # In this order rounding stays relative to the change of the value, however large the value.
    delta = (rewards + ((next_values - values) - one_minus_gamma * next_values)).to(values.dtype)
    decays = tl.where(kept, tl.full((), decay, values.dtype), 0.0)
    decays, offset = tl.associative_scan((decays, tl.where(kept, delta, 0.0)), 0, _joined)
    return offset + tl.exp2(decays) * later


@triton.jit
def at_last(x, BLOCK: tl.constexpr):
    """The last entry of a block."""
    return tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, x, 0.0), axis=0)


@triton.jit
def _gae_kernel(
    REWARDS,
    stride_rewards,
    VALUES,
    stride_values,
    MASK,
    stride_mask,
    BOOTSTRAP,
    CU_SEQLENS,
    ADVANTAGES,
    RETURNS,
    stride_out,
    B,
    T,
    one_minus_gamma,
    decay,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first, length, end = row_span(CU_SEQLENS, row, B, T)
    bootstrap = tl.full((), 0.0, ACC)
    if BOOTSTRAP is not None:
        bootstrap = tl.load(BOOTSTRAP + row, mask=row < B, other=0.0).to(ACC)
    REWARDS += row * stride_rewards + first
    VALUES += row * stride_values + first
    MASK += row * stride_mask + first
    ADVANTAGES += row * stride_out + first
    RETURNS += row * stride_out + first
    later = tl.full((), 0.0, ACC)
    nearest = tl.full((), NOWHERE, tl.int32)
    num_blocks = tl.cdiv(length, BLOCK)
    for done in range(0, num_blocks):
        start = (num_blocks - 1 - done) * BLOCK
        t = falling(start, BLOCK)
        position = start + BLOCK - 1 - tl.arange(0, BLOCK)
        kept = load_kept(MASK, t, end, BLOCK)
        values = load_falling(VALUES, t, t < length, BLOCK, ACC)
        rewards = load_falling(REWARDS, t, t < length, BLOCK, ACC)
        following = next_kept(MASK, t, position, end, nearest, BLOCK)
        next_values = next_value(VALUES, following, bootstrap, BLOCK)
        advantages = block_advantages(rewards, values, next_values, kept, one_minus_gamma, decay, later)
        store_falling(ADVANTAGES, t, tl.where(kept, advantages, 0.0), t < length, BLOCK)
        store_falling(RETURNS, t, tl.where(kept, advantages + values, 0.0), t < length, BLOCK)
        later = at_last(advantages, BLOCK)
        nearest = tl.minimum(nearest, tl.min(tl.where(kept, position, NOWHERE), axis=0))


def decay_of(slope: float) -> float:
    """log2 of gamma lam, finite for 0: the powers that a kernel forms of it are 0 all the same."""
    return math.log2(slope) if slope > 0 else -1e4


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
    num_rows, longest = shape_of(response_mask, cu_seqlens, max_seqlen)
    advantages, returns = new_output(rewards), new_output(rewards)
    block = block_for(num_rows, longest)
    _gae_kernel[(num_programs(num_rows, cu_seqlens),)](
        *with_stride(rewards),
        *with_stride(values),
        *with_stride(response_mask),
        None if bootstrap is None else bootstrap.contiguous(),
        cu_seqlens,
        *(advantages, *with_stride(returns)),
        num_rows,
        response_mask.shape[-1],
        1 - gamma,
        decay_of(gamma * lam),
        BLOCK=block,
        ACC=accumulation_type(rewards),
        num_warps=row_warps(block),
    )
    return advantages, returns
