"""The experience of PPO as its three equations in a row."""

import torch
from torch import Tensor

from ppomax.kernels.gae_reference import gae_of_kept
from ppomax.kernels.masking import bits_of
from ppomax.kernels.packed_rows import padded, padded_or_none, positions, unpadded
from ppomax.kernels.token_rewards_reference import token_rewards
from ppomax.kernels.whiten_reference import moments_of_kept


@torch.no_grad()
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
    """(rewards, kl, advantages, returns, moments [3] of the advantages); see ppomax.kernels.experience."""
    if cu_seqlens is not None and max_seqlen is not None:
        index = positions(cu_seqlens, max_seqlen, len(response_mask))
        *of_tokens, moments = experience(
            scores,
            *(padded(x, index) for x in (logprobs, ref_logprobs, values, response_mask)),
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            gamma=gamma,
            lam=lam,
            step_rewards=padded_or_none(step_rewards, index),
            bootstrap=bootstrap,
            kl=padded_or_none(kl, index),
            cu_seqlens=None,
            max_seqlen=None,
        )
        rewards, kl, advantages, returns = (unpadded(x, index, len(response_mask)) for x in of_tokens)
        return rewards, kl, advantages, returns, moments
    rewards, kl = token_rewards(
        scores,
        logprobs,
        ref_logprobs,
        response_mask,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        step_rewards=step_rewards,
        kl=kl,
        cu_seqlens=None,
        max_seqlen=None,
    )
    bits = bits_of(response_mask.contiguous(), rewards.dtype)
    advantages, returns = gae_of_kept(rewards, values, bits, gamma=gamma, lam=lam, bootstrap=bootstrap)
    return rewards, kl, advantages, returns, moments_of_kept(advantages, bits)
