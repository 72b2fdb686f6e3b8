"""The experience of PPO in one kernel: each row is read once, from its end, and its results are written once.

A second kernel of one program merges the rows' moments.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppomax.kernels.gae_triton import at_last, block_advantages, decay_of, next_kept, next_value
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
    token_kl,
    token_reward,
    with_stride,
)
from ppomax.kernels.whiten_triton import block_moments, merge_moments, merged, store_moments


@triton.jit
def _experience_kernel(
    SCORES,
    LOGPROBS,
    stride_logprobs,
    REF_LOGPROBS,
    stride_ref_logprobs,
    VALUES,
    stride_values,
    MASK,
    stride_mask,
    STEP_REWARDS,
    stride_step_rewards,
    KL_GIVEN,
    stride_kl_given,
    BOOTSTRAP,
    CU_SEQLENS,
    REWARDS,
    KL,
    ADVANTAGES,
    RETURNS,
    stride_out,
    PARTS,
    B,
    T,
    kl_coef,
    one_minus_gamma,
    decay,
    ESTIMATOR: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first, length, end = row_span(CU_SEQLENS, row, B, T)
    score = tl.load(SCORES + row, mask=row < B, other=0.0).to(ACC)
    bootstrap = tl.full((), 0.0, ACC)
    if BOOTSTRAP is not None:
        bootstrap = tl.load(BOOTSTRAP + row, mask=row < B, other=0.0).to(ACC)
    LOGPROBS += row * stride_logprobs + first
    REF_LOGPROBS += row * stride_ref_logprobs + first
    VALUES += row * stride_values + first
    MASK += row * stride_mask + first
    if STEP_REWARDS is not None:
        STEP_REWARDS += row * stride_step_rewards + first
    if KL_GIVEN is not None:
        KL_GIVEN += row * stride_kl_given + first
    REWARDS += row * stride_out + first
    KL += row * stride_out + first
    ADVANTAGES += row * stride_out + first
    RETURNS += row * stride_out + first
    later = tl.full((), 0.0, ACC)
    nearest = tl.full((), NOWHERE, tl.int32)
    count = tl.full((), 0.0, tl.float64)
    mean = tl.full((), 0.0, tl.float64)
    m2 = tl.full((), 0.0, tl.float64)
    num_blocks = tl.cdiv(length, BLOCK)
    for done in range(0, num_blocks):
        start = (num_blocks - 1 - done) * BLOCK
        t = falling(start, BLOCK)
        inside = t < length
        position = start + BLOCK - 1 - tl.arange(0, BLOCK)
        kept = load_kept(MASK, t, end, BLOCK)
        values = load_falling(VALUES, t, inside, BLOCK, ACC)
        kl = token_kl(LOGPROBS, REF_LOGPROBS, KL_GIVEN, t, inside, kept, ESTIMATOR, BLOCK, ACC)
        following = next_kept(MASK, t, position, end, nearest, BLOCK)
        is_last = kept & (following == NOWHERE)
        rewards = token_reward(kl, STEP_REWARDS, t, inside, kept, is_last, score, kl_coef, BLOCK, ACC)
        next_values = next_value(VALUES, following, bootstrap, BLOCK)
        advantages = block_advantages(rewards, values, next_values, kept, one_minus_gamma, decay, later)
        store_falling(REWARDS, t, rewards, inside, BLOCK)
        store_falling(KL, t, kl, inside, BLOCK)
        store_falling(ADVANTAGES, t, tl.where(kept, advantages, 0.0), inside, BLOCK)
        store_falling(RETURNS, t, tl.where(kept, advantages + values, 0.0), inside, BLOCK)
        later = at_last(advantages, BLOCK)
        nearest = tl.minimum(nearest, tl.min(tl.where(kept, position, NOWHERE), axis=0))
        count, mean, m2 = merge_moments(count, mean, m2, *block_moments(advantages, kept))
    store_moments(PARTS, row, tl.num_programs(0), count, mean, m2)


def experience(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    response_mask: Tensor,
    *,
    kl_coef: float,
    kl_estimator: str,
    gamma: float,
    lam: float,
    step_rewards: Tensor | None,
    bootstrap: Tensor | None,
    kl: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See experience_reference.experience."""
    num_rows, longest = shape_of(response_mask, cu_seqlens, max_seqlen)
    rewards, kl_out, advantages, returns = (new_output(logprobs) for _ in range(4))
    programs = num_programs(num_rows, cu_seqlens)
    parts = torch.empty((3, programs), dtype=torch.float64, device=logprobs.device)
    block = block_for(num_rows, longest)
    _experience_kernel[(programs,)](
        scores.contiguous(),
        *with_stride(logprobs),
        *with_stride(ref_logprobs),
        *with_stride(values),
        *with_stride(response_mask),
        *with_stride(step_rewards),
        *with_stride(kl),
        None if bootstrap is None else bootstrap.contiguous(),
        cu_seqlens,
        *(rewards, kl_out, advantages, *with_stride(returns)),
        parts,
        num_rows,
        response_mask.shape[-1],
        kl_coef,
        1 - gamma,
        decay_of(gamma * lam),
        ESTIMATOR=kl_estimator,
        BLOCK=block,
        ACC=accumulation_type(logprobs),
        num_warps=row_warps(block),
    )
    return rewards, kl_out, advantages, returns, merged(parts)
