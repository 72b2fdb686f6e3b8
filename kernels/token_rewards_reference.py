"""KL penalty and score as rewards of tokens, in torch."""

import torch
from torch import Tensor

from ppomax.kernels.numerics import clamped_log_ratio, exp_remainder, keep, wide


@torch.no_grad()
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
) -> tuple[Tensor, Tensor]:
    """See ppomax.kernels.token_rewards."""
    logprobs = wide(logprobs)
    if kl is None:
        kl = _sampled_kl(keep(logprobs, response_mask), keep(wide(ref_logprobs), response_mask), kl_estimator)
    kl = keep(kl.to(logprobs.dtype), response_mask)
    rewards = -kl_coef * kl
    if step_rewards is not None:
        rewards = rewards + keep(step_rewards.to(logprobs.dtype), response_mask)
    score = torch.where(_is_last(response_mask), scores.to(logprobs.dtype)[:, None], 0.0)
    return keep(rewards + score, response_mask), kl


def _sampled_kl(logprobs: Tensor, ref_logprobs: Tensor, kl_estimator: str) -> Tensor:
    """k1, k2 or k3 of each token, sampled from the policy."""
    if kl_estimator == "k1":
        return logprobs - ref_logprobs
    if kl_estimator == "k2":
        return (ref_logprobs - logprobs).square() / 2
    return exp_remainder(clamped_log_ratio(ref_logprobs, logprobs))


def _is_last(mask: Tensor) -> Tensor:
    """True at the last kept entry of each row [B, T]; nowhere in an empty row."""
    following = mask.flip(1).cumsum(1).flip(1)  # kept entries from here on
    return mask & (following == 1)
