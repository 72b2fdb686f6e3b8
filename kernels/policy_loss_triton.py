"""PPO's policy losses in Triton: loss, gradient and metrics of a block of tokens in one read.

`policy_token` and `prepared_advantage` are the definition of the loss for all kernels that end in it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppomax.kernels.numerics import wide_dtype
from ppomax.kernels.numerics_triton import LOG_RATIO_LIMIT, SERIES_LIMIT, accumulation_type, exp_remainder
from ppomax.kernels.partial_sums_triton import sum_partials

BLOCK = 1024
"""Tokens of a program."""


@triton.jit
def bounded(x, low, high):
    """x clamped to [low, high]. NaN stays NaN, which tl.clamp, tl.minimum and tl.maximum turn into a bound on a GPU."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def prepared_advantage(
    advantage, COUNT, MEAN, M2, whiten_eps, advantage_clip, SHIFT_MEAN: tl.constexpr, UNBIASED: tl.constexpr
):
    """Advantages of one token or of a block, whitened by device scalars and clamped to +- advantage_clip.

    advantage: float32 (float64), a scalar or a block. COUNT, MEAN, M2: pointers to float64, all None for no whitening.
    whiten_eps, advantage_clip (inf: none): numbers at run time.
    """
    if COUNT is not None:
        count = tl.load(COUNT)
        mean = tl.load(MEAN)
        variance = tl.load(M2) / tl.maximum(count - 1.0 if UNBIASED else count, 1.0)
        # In float32 a large mean would lose what the advantages have beyond it, so it is subtracted in two parts.
        high = mean.to(advantage.dtype)
        low = (mean - high.to(tl.float64)).to(advantage.dtype)
        advantage = ((advantage - high) - low) / tl.sqrt(variance.to(advantage.dtype) + whiten_eps)
        if not SHIFT_MEAN:
            advantage += high
    return bounded(advantage, -advantage_clip, advantage_clip)


@triton.jit
def policy_token(logprob, old_logprob, advantage, ratio_min, ratio_max, dual_clip, penalty_beta, PENALTY: tl.constexpr):
    """Per token, before any weight: (loss, d loss / d logprob, is_clipped, kl, ratio, is_held).

    logprob, old_logprob, advantage (whitened and clamped: see prepared_advantage): float32 (float64), scalars or
    blocks; no bfloat16. ratio_min, ratio_max, dual_clip (inf: none), penalty_beta: numbers at run time.
    PENALTY: objective "penalty". Results have the shape of logprob; is_clipped and is_held are int1.
    See policy_loss_reference.policy_terms, which gives the same in the same order.
    """
    log_ratio = logprob - old_logprob
    is_free = tl.abs(log_ratio) <= LOG_RATIO_LIMIT
    d = bounded(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = tl.exp(d)
    kl = exp_remainder(d)
    unclipped = -advantage * ratio
    if PENALTY:
        ratio_minus_1 = tl.where(tl.abs(d) < SERIES_LIMIT, kl + d, ratio - 1.0)
        loss = unclipped + penalty_beta * kl
        grad = unclipped + penalty_beta * ratio_minus_1
        is_clipped = ratio < 0  # never
        is_held = is_clipped
    else:
        clipped = -advantage * bounded(ratio, ratio_min, ratio_max)
        is_clipped = clipped > unclipped
        loss = tl.where(is_clipped, clipped, unclipped)
        held_loss = -advantage * dual_clip
        is_held = (advantage < 0) & (loss > held_loss)
        loss = tl.where(is_held, held_loss, loss)
        grad = tl.where(is_clipped | is_held, 0.0, unclipped)
    return loss, tl.where(is_free, grad, 0.0), is_clipped, kl, ratio, is_held


@triton.jit
def _policy_loss_kernel(
    LOGPROBS,
    OLD_LOGPROBS,
    ADVANTAGES,
    WEIGHTS,
    IMPORTANCE,
    COUNT,
    MEAN,
    M2,
    GRAD,
    PARTIAL,
    N,
    ratio_min,
    ratio_max,
    dual_clip,
    advantage_clip,
    penalty_beta,
    whiten_eps,
    PENALTY: tl.constexpr,
    SHIFT_MEAN: tl.constexpr,
    UNBIASED: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    token = program * BLOCK + tl.arange(0, BLOCK)
    inside = token < N
    weight = tl.load(WEIGHTS + token, mask=inside, other=0.0).to(ACC)
    is_kept = weight != 0
    # Masked by is_kept, every entry would be a load of its own: whole blocks are read, and entries dropped by choice.
    logprob = tl.where(is_kept, tl.load(LOGPROBS + token, mask=inside, other=0.0).to(ACC), 0.0)
    old_logprob = tl.where(is_kept, tl.load(OLD_LOGPROBS + token, mask=inside, other=0.0).to(ACC), 0.0)
    advantage = tl.where(is_kept, tl.load(ADVANTAGES + token, mask=inside, other=0.0).to(ACC), 0.0)
    loss_weight = weight
    if IMPORTANCE is not None:
        loss_weight = weight * tl.where(is_kept, tl.load(IMPORTANCE + token, mask=inside, other=0.0).to(ACC), 0.0)
    advantage = prepared_advantage(advantage, COUNT, MEAN, M2, whiten_eps, advantage_clip, SHIFT_MEAN, UNBIASED)
    loss, grad, is_clipped, kl, ratio, is_held = policy_token(
        logprob, old_logprob, advantage, ratio_min, ratio_max, dual_clip, penalty_beta, PENALTY
    )
    tl.store(GRAD + token, tl.where(is_kept, loss_weight * grad, 0.0), mask=inside)
    partial = PARTIAL + program * 5
    tl.store(partial, tl.sum(tl.where(is_kept, loss_weight * loss, 0.0), axis=0))
    tl.store(partial + 1, tl.sum(tl.where(is_clipped, weight, 0.0), axis=0))
    # Of a token that is not read, log-ratio, KL and weight are 0.
    tl.store(partial + 2, tl.sum(weight * kl, axis=0))
    tl.store(partial + 3, tl.sum(weight * ratio, axis=0))
    tl.store(partial + 4, tl.sum(tl.where(is_held, weight, 0.0), axis=0))


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    importance_weights: Tensor | None,
    moments: list[Tensor],
    *,
    ratio_min: float,
    ratio_max: float,
    dual_clip: float,
    advantage_clip: float,
    penalty_beta: float | None,
    shift_mean: bool,
    unbiased: bool,
    whiten_eps: float,
) -> tuple[Tensor, Tensor]:
    """See policy_loss_reference.policy_loss."""
    N = logprobs.numel()
    tensors = (logprobs, old_logprobs, advantages, weights, importance_weights)
    grad = torch.empty_like(logprobs, memory_format=torch.contiguous_format)
    programs = triton.cdiv(N, BLOCK)
    partial = torch.empty((programs, 5), dtype=wide_dtype(*tensors), device=logprobs.device)
    if N > 0:
        _policy_loss_kernel[(programs,)](
            *(None if x is None else x.contiguous() for x in tensors),
            *(moments or (None, None, None)),
            grad,
            partial,
            N,
            ratio_min,
            ratio_max,
            dual_clip,
            advantage_clip,
            0.0 if penalty_beta is None else penalty_beta,
            whiten_eps,
            PENALTY=penalty_beta is not None,
            SHIFT_MEAN=shift_mean,
            UNBIASED=unbiased,
            BLOCK=BLOCK,
            ACC=accumulation_type(*tensors),
            num_warps=4,
        )
    return sum_partials(partial), grad
