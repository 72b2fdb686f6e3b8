"""PPO's policy losses and their analytic gradient in torch.

With d = clamp(logp - old_logp, +-20), r = e^d, A the whitened and clamped advantage, w weights times importance
weights, c the dual clip:
    clip     l1 = -A r,  l2 = -A clamp(r, ratio_min, ratio_max),  l = max(l1, l2);  A < 0: l = min(l, -A c)
             dl/dlogp = -A r [l1 >= l2] [not held by dual clip] [|logp - old_logp| <= 20]
    penalty  l = -A r + beta (r - 1 - d),  dl/dlogp = (-A r + beta (r - 1)) [|logp - old_logp| <= 20]
    loss = sum w l
Where r is inside its bounds l1 = l2 and both have the same derivative, so the tie needs no halving.
"""

import torch
from torch import Tensor

from ppomax.kernels import whiten_reference
from ppomax.kernels.numerics import LOG_RATIO_LIMIT, clamped_log_ratio, exp_remainder, keep, total, wide_dtype


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
    """([loss, clip_fraction, approx_kl, mean_ratio, dual_clip_fraction], d loss / d logprobs in logprobs' dtype).

    moments: [count, mean, m2] to whiten by, or empty. The rest: policy_loss.PolicySettings.
    """
    dtype = wide_dtype(logprobs, old_logprobs, advantages, weights, importance_weights)
    is_kept = weights != 0
    new, old, advantage = (keep(x.to(dtype), is_kept) for x in (logprobs, old_logprobs, advantages))
    weight = weights.to(dtype)
    loss_weight = weight if importance_weights is None else weight * keep(importance_weights.to(dtype), is_kept)
    advantage = prepared_advantages(
        advantage,
        is_kept,
        moments,
        shift_mean=shift_mean,
        unbiased=unbiased,
        whiten_eps=whiten_eps,
        advantage_clip=advantage_clip,
    )
    loss, grad, *metrics = policy_terms(
        new, old, advantage, ratio_min=ratio_min, ratio_max=ratio_max, dual_clip=dual_clip, penalty_beta=penalty_beta
    )
    sums = [total(loss_weight * loss), *(total(weight * metric) for metric in metrics)]
    return torch.stack(sums), keep(loss_weight * grad, is_kept).to(logprobs.dtype)


def prepared_advantages(
    advantages: Tensor,
    is_kept: Tensor,
    moments: list[Tensor],
    *,
    shift_mean: bool,
    unbiased: bool,
    whiten_eps: float,
    advantage_clip: float,
) -> Tensor:
    """Advantages whitened by `moments` ([count, mean, m2], or empty: as they are), then clamped to +- advantage_clip.

    Where is_kept is False: 0.
    """
    kept = keep(advantages, is_kept)
    if moments:
        kept = whiten_reference.whiten(
            kept, is_kept, *moments, shift_mean=shift_mean, unbiased=unbiased, eps=whiten_eps
        )
    return kept.clamp(-advantage_clip, advantage_clip)


def policy_terms(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    ratio_min: float,
    ratio_max: float,
    dual_clip: float,
    penalty_beta: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Per token, before any weight: (loss, d loss / d logprob, is_clipped, kl, ratio, is_held).

    float32 or float64 inputs of one shape and dtype, advantages already whitened and clamped; is_clipped and is_held
    are bool. dual_clip inf: none. penalty_beta None: objective "clip".
    """
    is_free = (logprobs - old_logprobs).abs() <= LOG_RATIO_LIMIT
    d = clamped_log_ratio(logprobs, old_logprobs)
    ratio, kl = d.exp(), exp_remainder(d)
    unclipped = -advantages * ratio
    if penalty_beta is not None:
        nothing = torch.zeros_like(is_free)
        grad = unclipped + penalty_beta * torch.expm1(d)
        return unclipped + penalty_beta * kl, keep(grad, is_free), nothing, kl, ratio, nothing
    clipped = -advantages * ratio.clamp(ratio_min, ratio_max)
    is_clipped = clipped > unclipped
    loss = torch.maximum(unclipped, clipped)
    held_loss = -advantages * dual_clip
    is_held = (advantages < 0) & (loss > held_loss)
    grad = keep(unclipped, is_free & ~(is_clipped | is_held))
    return torch.where(is_held, held_loss, loss), grad, is_clipped, kl, ratio, is_held
