"""From scores, log-probabilities and values to what PPO's update needs, up to the moments of the advantages.

The same as token_rewards, gae and masked_moments one after the other, in one call that a GPU runs as one kernel (and a
small one that adds up the rows' moments).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from ppomax.kernels.dispatch import implementation
from ppomax.kernels.gae import check_gae
from ppomax.kernels.numerics import wide_dtype
from ppomax.kernels.token_rewards import KlEstimator, check_rewards
from ppomax.kernels.whiten import Moments


class TokenExperience(NamedTuple):
    """rewards, kl, advantages, returns [B, T]: 0 outside the mask. moments: of the kept advantages, float64."""

    rewards: Tensor
    kl: Tensor
    advantages: Tensor
    returns: Tensor
    moments: Moments


@torch.no_grad()
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
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> TokenExperience:
    """Token rewards (paper Eq. 19), their advantages and returns (Eq. 9), and the moments to whiten the advantages by.

    scores [B] float; logprobs, ref_logprobs [B, T] float, nats; step_rewards, kl [B, T] float: as in token_rewards.
    values [B, T] float; bootstrap [B] float: as in gae.
    response_mask [B, T] bool: True on response tokens; may have gaps.
    cu_seqlens, max_seqlen: every [B, T] is a packed [K] instead (packed_rows.py); both or neither.
    Returns TokenExperience, float32 (float64 for float64 logprobs), constants without gradient.
    Raises ValueError as token_rewards and gae do.
    """
    packing = (cu_seqlens, max_seqlen)
    check_rewards("experience", scores, logprobs, ref_logprobs, response_mask, step_rewards, kl, kl_estimator, *packing)
    check_gae("experience", values, response_mask, bootstrap, *packing, gamma=gamma, lam=lam)
    tensors = (scores, logprobs, ref_logprobs, values, response_mask)
    options = (kl_coef, kl_estimator, gamma, lam, step_rewards, bootstrap, kl)
    rewards, kl, advantages, returns, moments = _experience(*tensors, *options, *packing)
    return TokenExperience(rewards, kl, advantages, returns, Moments(*moments.unbind()))


@custom_op("ppomax::experience", mutates_args=())
def _experience(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    response_mask: Tensor,
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
    if not response_mask.numel():
        return *_empty(logprobs), logprobs.new_zeros(3, dtype=torch.float64)
    tensors = (scores, logprobs, ref_logprobs, values, response_mask)
    compute = implementation("experience", *tensors, step_rewards, bootstrap, kl, cu_seqlens)
    return compute.experience(
        *tensors,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        gamma=gamma,
        lam=lam,
        step_rewards=step_rewards,
        bootstrap=bootstrap,
        kl=kl,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
    )


@_experience.register_fake
def _(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    response_mask: Tensor,
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
    return *_empty(logprobs), logprobs.new_empty(3, dtype=torch.float64)


def _empty(logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rewards, kl, advantages, returns = (
        logprobs.new_empty(logprobs.shape, dtype=wide_dtype(logprobs)) for _ in range(4)
    )
    return rewards, kl, advantages, returns
