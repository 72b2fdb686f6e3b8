"""Token-level rewards of PPO: a KL penalty on every response token, the reward model's score on the last one."""

from typing import Literal

from torch import Tensor

from ppomax.kernels.dispatch import implementation

KlEstimator = Literal["k1", "k2", "k3", "full"]
"""How a token's KL(policy || reference) is estimated: from the sampled token (k1, k2, k3), or given (full)."""


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
) -> tuple[Tensor, Tensor]:
    """reward_t = -kl_coef * kl_t, plus step_rewards, plus the score of its sequence at the last kept token.

    scores [B] float: of the reward model, scaled as PPO wants them. A sequence without kept tokens drops its score.
    logprobs, ref_logprobs [B, T] float: of the sampled tokens under policy and reference, nats.
    response_mask [B, T] bool: True on response tokens; may have gaps.
    kl_estimator: with d = ref_logprobs - logprobs, k1 is -d, k2 is d^2 / 2, k3 is exp(d) - 1 - d with d clamped to
    +- 20; "full": the caller gives `kl` (linear_logprobs.linear_full_kl).
    step_rewards [B, T] float: rewards of single tokens. kl [B, T] float, nats: only with "full".
    Returns (rewards, kl), each [B, T] float32 (float64 for float64 logprobs), constants, 0 outside the mask.
    Raises ValueError on shapes that do not fit and when kl is given without "full" or missing with it.
    Source: paper Eq. 19; the place of the score and the unclamped k1 are the released code's.
    """
    check_rewards("token_rewards", scores, logprobs, ref_logprobs, response_mask, step_rewards, kl, kl_estimator)
    compute = implementation("token_rewards", scores, logprobs, ref_logprobs, response_mask, step_rewards, kl)
    return compute.token_rewards(
        scores,
        logprobs,
        ref_logprobs,
        response_mask,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        step_rewards=step_rewards,
        kl=kl,
    )


def check_rewards(
    function: str,
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    step_rewards: Tensor | None,
    kl: Tensor | None,
    kl_estimator: KlEstimator,
) -> None:
    """Raises ValueError unless scores is [B], every other tensor [B, T] and kl given exactly for "full"."""
    given = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "step_rewards": step_rewards, "kl": kl}
    shapes = {name: tuple(x.shape) for name, x in given.items() if x is not None}
    if any(shape != tuple(response_mask.shape) for shape in shapes.values()) or scores.shape != response_mask.shape[:1]:
        raise ValueError(
            f"{function}: response_mask {tuple(response_mask.shape)}, scores {tuple(scores.shape)}, {shapes}; "
            "expected scores [B] and the others [B, T]"
        )
    if kl_estimator not in ("k1", "k2", "k3", "full"):
        raise ValueError(f'{function}: kl_estimator {kl_estimator!r}; expected "k1", "k2", "k3" or "full"')
    if (kl is not None) != (kl_estimator == "full"):
        given_or_not = "given" if kl is not None else "missing"
        raise ValueError(
            f'{function}: kl is {given_or_not} with kl_estimator "{kl_estimator}"; give it with "full" only'
        )
