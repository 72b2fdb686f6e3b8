"""The experience of PPO as its three equations in a row."""

from torch import Tensor

from ppomax.kernels.gae_reference import gae
from ppomax.kernels.token_rewards_reference import token_rewards
from ppomax.kernels.whiten_reference import masked_moments


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """(rewards, kl, advantages, returns, moments of the advantages); see ppomax.kernels.experience."""
    rewards, kl = token_rewards(
        scores,
        logprobs,
        ref_logprobs,
        response_mask,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        step_rewards=step_rewards,
        kl=kl,
    )
    advantages, returns = gae(rewards, values, response_mask, gamma=gamma, lam=lam, bootstrap=bootstrap)
    return rewards, kl, advantages, returns, masked_moments(advantages, response_mask)
