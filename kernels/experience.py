"""From scores, log-probabilities and values to what PPO's update needs, up to the moments of the advantages.

The same as token_rewards, gae and masked_moments one after the other, in one call that a GPU can run as one kernel.
"""

from typing import NamedTuple

from torch import Tensor

from ppomax.kernels.dispatch import implementation
from ppomax.kernels.gae import check_gae
from ppomax.kernels.token_rewards import KlEstimator, check_rewards
from ppomax.kernels.whiten import Moments


class TokenExperience(NamedTuple):
    """rewards, kl, advantages, returns [B, T]: 0 outside the mask. moments: of the kept advantages, float64."""

    rewards: Tensor
    kl: Tensor
    advantages: Tensor
    returns: Tensor
    moments: Moments


def experience(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    response_mask: Tensor,
    *,
    kl_coef: float,
    kl_estimator: KlEstimator = "k1",
    gamma: float,
    lam: float,
    step_rewards: Tensor | None = None,
    bootstrap: Tensor | None = None,
    kl: Tensor | None = None,
) -> TokenExperience:
    """Token rewards (paper Eq. 19), their advantages and returns (Eq. 9), and the moments to whiten the advantages by.

    scores [B] float; logprobs, ref_logprobs [B, T] float, nats; step_rewards, kl [B, T] float: as in token_rewards.
    values [B, T] float; bootstrap [B] float: as in gae.
    response_mask [B, T] bool: True on response tokens; may have gaps.
    Returns TokenExperience, float32 (float64 for float64 logprobs), constants without gradient.
    Raises ValueError as token_rewards and gae do.
    """
    check_rewards("experience", scores, logprobs, ref_logprobs, response_mask, step_rewards, kl, kl_estimator)
    check_gae("experience", values, response_mask, bootstrap, gamma=gamma, lam=lam)
    optional = (step_rewards, bootstrap, kl)
    compute = implementation("experience", scores, logprobs, ref_logprobs, values, response_mask, *optional)
    rewards, kl, advantages, returns, moments = compute.experience(
        scores,
        logprobs,
        ref_logprobs,
        values,
        response_mask,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        gamma=gamma,
        lam=lam,
        step_rewards=step_rewards,
        bootstrap=bootstrap,
        kl=kl,
    )
    return TokenExperience(rewards, kl, advantages, returns, Moments(*moments))
