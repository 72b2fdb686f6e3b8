"""KL penalty and score as rewards of tokens, in Triton: one program walks one row from its end.

gae_triton and experience_triton walk their rows in the same way, with the functions below.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppomax.kernels.numerics import wide_dtype
from ppomax.kernels.numerics_triton import H100_PROCESSORS, accumulation_type, clamped, exp_remainder

MANY_ROWS_BLOCK = 1024
FEW_ROWS_BLOCK = 4096
"""Most tokens that a program holds: small blocks let programs share a processor, large ones make a row's way short."""

NOWHERE = tl.constexpr(2**31 - 1)
"""The position of a token that a row does not have: after all others."""


@triton.jit
def row_span(CU_SEQLENS, row, B, T):
    """(first entry, length, end of what may be kept) of a row: one of B rows of T, or of B packed rows in T entries.

    Packed row B is the padding after the others: nothing in it is kept.
    """
    if CU_SEQLENS is None:
        first = row * 0
        length = T
        end = T
    else:
        first = tl.load(CU_SEQLENS + row).to(tl.int64)
        next_first = tl.load(CU_SEQLENS + row + 1, mask=row < B, other=0).to(tl.int64)
        length = (tl.where(row < B, next_first, T) - first).to(tl.int32)
        end = tl.where(row < B, length, 0)
    return first, length, end


@triton.jit
def falling(start, BLOCK: tl.constexpr):
    """[BLOCK / 4, 4]: positions start to start + BLOCK - 1, groups of four from the last to the first.

    A thread loads a group in one piece of 16 bytes.
    """
    group = BLOCK // 4 - 1 - tl.arange(0, BLOCK // 4)
    return start + group[:, None] * 4 + tl.arange(0, 4)[None, :]


@triton.jit
def load_falling(X, t, inside, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """[BLOCK]: a row's entries from the last to the first, 0 where not inside; t as `falling` gives it."""
    return tl.reshape(tl.flip(tl.load(X + t, mask=inside, other=0).to(ACC), 1), (BLOCK,))


@triton.jit
def store_falling(X, t, x, inside, BLOCK: tl.constexpr):
    """The inverse of load_falling."""
    tl.store(X + t, tl.flip(tl.reshape(x, (BLOCK // 4, 4)), 1), mask=inside)


@triton.jit
def load_kept(MASK, t, end, BLOCK: tl.constexpr):
    """[BLOCK]: whether entries are before the end of the row and kept, from the last to the first."""
    return load_falling(MASK, t, t < end, BLOCK, tl.int32) != 0


@triton.jit
def token_kl(
    LOGPROBS, REF_LOGPROBS, KL_GIVEN, t, inside, kept, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """[BLOCK]: KL of a row's tokens, 0 where they are not kept, from the last to the first."""
    if ESTIMATOR == "full":
        kl = load_falling(KL_GIVEN, t, inside, BLOCK, ACC)
    else:
        d = load_falling(REF_LOGPROBS, t, inside, BLOCK, ACC) - load_falling(LOGPROBS, t, inside, BLOCK, ACC)
        if ESTIMATOR == "k1":
            kl = -d
        elif ESTIMATOR == "k2":
            kl = d * d * 0.5
        else:
            kl = exp_remainder(clamped(d))
    return tl.where(kept, kl, 0.0)


@triton.jit
def token_reward(kl, STEP_REWARDS, t, inside, kept, is_last, score, kl_coef, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """[BLOCK]: reward of a row's tokens, 0 where they are not kept, from the last to the first."""
    reward = (0.0 - kl_coef * kl).to(ACC)
    if STEP_REWARDS is not None:
        reward += tl.where(kept, load_falling(STEP_REWARDS, t, inside, BLOCK, ACC), 0.0)
    return tl.where(is_last, reward + score, reward)


@triton.jit
def _token_rewards_kernel(
    SCORES,
    LOGPROBS,
    stride_logprobs,
    REF_LOGPROBS,
    stride_ref_logprobs,
    MASK,
    stride_mask,
    STEP_REWARDS,
    stride_step_rewards,
    KL_GIVEN,
    stride_kl_given,
    CU_SEQLENS,
    REWARDS,
    KL,
    stride_out,
    B,
    T,
    kl_coef,
    ESTIMATOR: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first, length, end = row_span(CU_SEQLENS, row, B, T)
    score = tl.load(SCORES + row, mask=row < B, other=0.0).to(ACC)
    LOGPROBS += row * stride_logprobs + first
    REF_LOGPROBS += row * stride_ref_logprobs + first
    MASK += row * stride_mask + first
    if STEP_REWARDS is not None:
        STEP_REWARDS += row * stride_step_rewards + first
    if KL_GIVEN is not None:
        KL_GIVEN += row * stride_kl_given + first
    REWARDS += row * stride_out + first
    KL += row * stride_out + first
    last = tl.full((), -1, tl.int32)
    num_blocks = tl.cdiv(length, BLOCK)
    for done in range(0, num_blocks):
        start = (num_blocks - 1 - done) * BLOCK
        t = falling(start, BLOCK)
        position = start + BLOCK - 1 - tl.arange(0, BLOCK)
        kept = load_kept(MASK, t, end, BLOCK)
        last = tl.maximum(last, tl.max(tl.where(kept, position, -1), axis=0))
        kl = token_kl(LOGPROBS, REF_LOGPROBS, KL_GIVEN, t, t < length, kept, ESTIMATOR, BLOCK, ACC)
        is_last = kept & (position == last)
        reward = token_reward(kl, STEP_REWARDS, t, t < length, kept, is_last, score, kl_coef, BLOCK, ACC)
        store_falling(REWARDS, t, reward, t < length, BLOCK)
        store_falling(KL, t, kl, t < length, BLOCK)


def token_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    *,
    kl_coef: float,
    kl_estimator: str,
    step_rewards: Tensor | None,
    kl: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor]:
    """See ppomax.kernels.token_rewards."""
    num_rows, longest = shape_of(response_mask, cu_seqlens, max_seqlen)
    rewards, kl_out = (new_output(logprobs) for _ in range(2))
    block = block_for(num_rows, longest)
    _token_rewards_kernel[(num_programs(num_rows, cu_seqlens),)](
        scores.contiguous(),
        *with_stride(logprobs),
        *with_stride(ref_logprobs),
        *with_stride(response_mask),
        *with_stride(step_rewards),
        *with_stride(kl),
        cu_seqlens,
        *(rewards, *with_stride(kl_out)),
        num_rows,
        response_mask.shape[-1],
        kl_coef,
        ESTIMATOR=kl_estimator,
        BLOCK=block,
        ACC=accumulation_type(logprobs),
        num_warps=row_warps(block),
    )
    return rewards, kl_out


def shape_of(response_mask: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> tuple[int, int]:
    """(number of rows, length of the longest one) of rows [B, T] or packed [K]."""
    if cu_seqlens is not None and max_seqlen is not None:
        return len(cu_seqlens) - 1, max_seqlen
    return response_mask.shape[0], response_mask.shape[1]


def num_programs(num_rows: int, cu_seqlens: Tensor | None) -> int:
    """One for each row, and one for the padding after packed rows."""
    return num_rows if cu_seqlens is None else num_rows + 1


def new_output(logprobs: Tensor) -> Tensor:
    return torch.empty(logprobs.shape, dtype=wide_dtype(logprobs), device=logprobs.device)


def with_stride(x: Tensor | None) -> tuple[Tensor | None, int]:
    """x [B, T] and the stride of its rows, or packed x [K] and 0; copied where neighbours in a row are apart."""
    if x is None:
        return None, 0
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x, x.stride(0) if x.dim() == 2 else 0


def block_for(num_rows: int, longest: int) -> int:
    """Tokens that a program takes at once."""
    limit = MANY_ROWS_BLOCK if num_rows >= H100_PROCESSORS else FEW_ROWS_BLOCK
    return min(limit, triton.next_power_of_2(max(longest, 4)))


def row_warps(block: int) -> int:
    """8 tokens a thread, 16 in the largest blocks."""
    return min(8, max(1, block // 256))
