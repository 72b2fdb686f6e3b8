"""KL penalty and score as rewards of tokens, in torch."""

import torch
from torch import Tensor

from ppomax.kernels.masking import bits_of, masked
from ppomax.kernels.numerics import clamped_log_ratio, exp_remainder, wide
from ppomax.kernels.packed_rows import padded, padded_or_none, positions, unpadded


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
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor]:
    """See ppomax.kernels.token_rewards."""
    if cu_seqlens is not None and max_seqlen is not None:
        index = positions(cu_seqlens, max_seqlen, len(response_mask))
        rewards, kl = token_rewards(
            scores,
            padded(logprobs, index),
            padded(ref_logprobs, index),
            padded(response_mask, index),
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            step_rewards=padded_or_none(step_rewards, index),
            kl=padded_or_none(kl, index),
            cu_seqlens=None,
            max_seqlen=None,
        )
        return unpadded(rewards, index, len(response_mask)), unpadded(kl, index, len(response_mask))
    logprobs = wide(logprobs).contiguous()
    bits = bits_of(response_mask.contiguous(), logprobs.dtype)
    if kl is None:
        kl = _sampled_kl(logprobs, wide(ref_logprobs).contiguous(), kl_estimator)
    kl = masked(kl.to(logprobs.dtype).contiguous(), bits)
    rewards = torch.sub(logprobs.new_zeros(()), kl, alpha=kl_coef)
    if step_rewards is not None:
        rewards += masked(step_rewards.to(logprobs.dtype).contiguous(), bits)
    number = torch.arange(1, response_mask.shape[1] + 1, dtype=bits.dtype, device=bits.device)
    last = (bits & number).amax(dim=1, keepdim=True).long()  # number of the last kept token, 0 in an empty row
    score = torch.where(last > 0, scores.to(logprobs.dtype)[:, None], 0.0)
    return rewards.scatter_add_(1, (last - 1).clamp(min=0), score), kl


def _sampled_kl(logprobs: Tensor, ref_logprobs: Tensor, kl_estimator: str) -> Tensor:
    """k1, k2 or k3 of each token, sampled from the policy."""
    if kl_estimator == "k1":
        return logprobs - ref_logprobs
    if kl_estimator == "k2":
        return (ref_logprobs - logprobs).square() / 2
    return exp_remainder(clamped_log_ratio(ref_logprobs, logprobs))
