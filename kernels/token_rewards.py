"""Token-level rewards of PPO: a KL penalty on every response token, the reward model's score on the last one."""

from typing import Literal

import torch
from torch import Tensor
from torch.library import custom_op

from ppomax.kernels.dispatch import implementation
from ppomax.kernels.numerics import wide_dtype
from ppomax.kernels.packed_rows import count_rows

KlEstimator = Literal["k1", "k2", "k3", "full"]
"""How a token's KL(policy || reference) is estimated: from the sampled token (k1, k2, k3), or given (full)."""


@torch.no_grad()
def token_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    *,
    kl_coef: float,
    kl_estimator: KlEstimator = "k1",
    step_rewards: Tensor | None = None,
    kl: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """reward_t = -kl_coef * kl_t, plus step_rewards, plus the score of its sequence at the last kept token.

    scores [B] float: of the reward model, scaled as PPO wants them. A sequence without kept tokens drops its score.
    logprobs, ref_logprobs [B, T] float: of the sampled tokens under policy and reference, nats.
    response_mask [B, T] bool: True on response tokens; may have gaps.
    kl_estimator: with d = ref_logprobs - logprobs, k1 is -d, k2 is d^2 / 2, k3 is exp(d) - 1 - d with d clamped to
    +- 20; "full": the caller gives `kl` (linear_logprobs.linear_full_kl).
    step_rewards [B, T] float: rewards of single tokens. kl [B, T] float, nats: only with "full".
    cu_seqlens, max_seqlen: every [B, T] is a packed [K] instead (packed_rows.py); both or neither.
    Returns (rewards, kl), each [B, T] float32 (float64 for float64 logprobs), constants, 0 outside the mask.
    Raises ValueError on shapes that do not fit and when kl is given without "full" or missing with it.
    Source: paper Eq. 19; the place of the score and the unclamped k1 are the released code's.
    """
    tensors = (scores, logprobs, ref_logprobs, response_mask)
    check_rewards("token_rewards", *tensors, step_rewards, kl, kl_estimator, cu_seqlens, max_seqlen)
    return _token_rewards(*tensors, kl_coef, kl_estimator, step_rewards, kl, cu_seqlens, max_seqlen)


def check_rewards(
    function: str,
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    step_rewards: Tensor | None,
    kl: Tensor | None,
    kl_estimator: KlEstimator,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> None:
    """Raises ValueError unless scores is [B], every other tensor [B, T] (packed: [K]), kl given exactly for "full"."""
    num_rows = count_rows(function, response_mask, cu_seqlens, max_seqlen)
    given = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "step_rewards": step_rewards, "kl": kl}
    shapes = {name: tuple(x.shape) for name, x in given.items() if x is not None}
    if any(shape != tuple(response_mask.shape) for shape in shapes.values()) or scores.shape != (num_rows,):
        raise ValueError(
            f"{function}: response_mask {tuple(response_mask.shape)}, scores {tuple(scores.shape)}, {shapes}; "
            f"expected scores [B] and the others [B, T], or [K] with cu_seqlens; B is {num_rows}"
        )
    if kl_estimator not in ("k1", "k2", "k3", "full"):
        raise ValueError(f'{function}: kl_estimator {kl_estimator!r}; expected "k1", "k2", "k3" or "full"')
    if (kl is not None) != (kl_estimator == "full"):
        given_or_not = "given" if kl is not None else "missing"
        raise ValueError(
            f'{function}: kl is {given_or_not} with kl_estimator "{kl_estimator}"; give it with "full" only'
        )


@custom_op("ppomax::token_rewards", mutates_args=())
def _token_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    kl_coef: float,
    kl_estimator: str,
    step_rewards: Tensor | None,
    kl: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor]:
    if not response_mask.numel():
        return _empty(logprobs), _empty(logprobs)
    tensors = (scores, logprobs, ref_logprobs, response_mask)
    compute = implementation("token_rewards", *tensors, step_rewards, kl, cu_seqlens)
    return compute.token_rewards(
        *tensors,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        step_rewards=step_rewards,
        kl=kl,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
    )


@_token_rewards.register_fake
def _(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    kl_coef: float,
    kl_estimator: str,
    step_rewards: Tensor | None,
    kl: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor]:
    return _empty(logprobs), _empty(logprobs)


def _empty(logprobs: Tensor) -> Tensor:
    return logprobs.new_empty(logprobs.shape, dtype=wide_dtype(logprobs))
