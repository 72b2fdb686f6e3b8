"""PPO's policy losses and their analytic gradient in torch.

With d = clamp(logp - old_logp, +-20), r = e^d, A the clamped advantage, w weights times importance weights, c the
dual clip: clip     l1 = -A r,  l2 = -A clamp(r, ratio_min, ratio_max),  l = max(l1, l2);  A < 0: l = min(l, -A c)
             dl/dlogp = -A r [l1 >= l2] [not held by dual clip] [|logp - old_logp| <= 20]
    penalty  l = -A r + beta (r - 1 - d),  dl/dlogp = (-A r + beta (r - 1)) [|logp - old_logp| <= 20]
    loss = sum w l
Where r is inside its bounds l1 = l2 and both have the same derivative, so the tie needs no halving.
"""

import torch
from torch import Tensor

from ppomax.kernels.numerics import LOG_RATIO_LIMIT, clamped_log_ratio, exp_remainder, keep, total, wide


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    importance_weights: Tensor | None,
    *,
    ratio_min: float,
    ratio_max: float,
    dual_clip: float | None,
    advantage_clip: float | None,
    penalty_beta: float | None,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """((loss, clip_fraction, approx_kl, mean_ratio, dual_clip_fraction), d loss / d logprobs).

    penalty_beta is None for objective "clip".
    """
    is_kept = weights != 0
    new, old, advantage = (keep(wide(x), is_kept) for x in (logprobs, old_logprobs, advantages))
    weight = wide(weights)
    if advantage_clip is not None:
        advantage = advantage.clamp(-advantage_clip, advantage_clip)
    d = clamped_log_ratio(new, old)
    ratio, kl = d.exp(), exp_remainder(d)

    unclipped = -advantage * ratio
    is_clipped = torch.zeros_like(is_kept)
    is_held = torch.zeros_like(is_kept)
    if penalty_beta is None:
        clipped = -advantage * ratio.clamp(ratio_min, ratio_max)
        loss = torch.maximum(unclipped, clipped)
        is_clipped = clipped > unclipped
        if dual_clip is not None:
            is_held = (advantage < 0) & (loss > -advantage * dual_clip)
            loss = torch.where(is_held, -advantage * dual_clip, loss)
        grad = keep(unclipped, ~(is_clipped | is_held))
    else:
        loss = unclipped + penalty_beta * kl
        grad = unclipped + penalty_beta * torch.expm1(d)

    loss_weight = weight if importance_weights is None else weight * keep(wide(importance_weights), is_kept)
    grad = keep(loss_weight * grad, is_kept & ((new - old).abs() <= LOG_RATIO_LIMIT))
    scalars = (loss_weight * loss, weight * is_clipped, weight * kl, weight * ratio, weight * is_held)
    return tuple(total(x) for x in scalars), grad.to(logprobs.dtype)
