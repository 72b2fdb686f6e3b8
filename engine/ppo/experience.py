"""From a rollout to experience: scores, log-probs, values, token rewards, advantages."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ppomax.engine.config_ppo import PpoConfig
from ppomax.engine.models.roles import Role
from ppomax.engine.models.shape import ModelShape
from ppomax.engine.ppo.rewards import RewardScaler, penalise_unfinished
from ppomax.engine.ppo.scoring import RolloutScorer, full_kl, mix_rewards, token_logprobs
from ppomax.engine.ppo.types import Experience, Rollout
from ppomax.engine.rewards.mixture import RewardMix
from ppomax.engine.trace import Trace, span
from ppomax.kernels.experience import experience as token_experience
from ppomax.kernels.numerics import clamped_log_ratio


@dataclass(frozen=True)
class Models:
    """The roles. reference is the policy itself where both are frozen and equal (critic pre-training). reward, process:
    None where ppo.rewards does without them.
    """

    policy: Role
    critic: Role
    reference: Role
    reward: Role | None
    process: Role | None = None

    @property
    def judge_shapes(self) -> tuple[ModelShape, ...]:
        """Of reward model and process model, as far as there are such."""
        return tuple(role.shape for role in (self.reward, self.process) if role is not None)


def make_experience(
    rollout: Rollout,
    models: Models,
    scaler: RewardScaler,
    *,
    kl_coef: float,
    config: PpoConfig,
    tokens_per_microbatch: int,
    rewards: RewardMix | None = None,
    scorer: RolloutScorer | None = None,
    trace: Trace | None = None,
) -> tuple[Experience, RewardScaler]:
    """Scores a rollout with all roles; returns the experience and the reward moments that now include its scores.

    rewards: what is summed; None for the reward model's scores alone. scorer: has parts of the rollout already. Every
    rank of the run must call it: each set of ranks runs its own roles without waiting for the others, then all get all
    results.
    """
    limit = tokens_per_microbatch
    mask = rollout.response_mask
    if scorer is None:
        scorer = make_scorer(models, tokens_per_microbatch, rewards=rewards, is_early=False)
    scored = scorer.finish(rollout)
    values = scored.values
    with span(trace, "policy log-probs", is_here=models.policy.is_here):
        logprobs = policy_logprobs(rollout, models.policy, config, limit)
    ref_logprobs = logprobs if scored.ref_logprobs is None else scored.ref_logprobs
    kl = None
    if config.kl_estimator == "full":
        kl = full_kl(models.policy, models.reference, rollout, tokens_per_microbatch=limit)
        models.policy.groups.give_to_all(kl)
    mixed = mix_rewards(rollout, scored.scores, scored.steps, models.reward, models.process, rewards)
    models.critic.groups.give_to_all(values)
    if scored.ref_logprobs is not None:
        models.reference.groups.give_to_all(ref_logprobs)
    if config.old_logprobs == "recompute":
        models.policy.groups.give_to_all(logprobs)
    scaler = scaler.update(mixed.totals)
    scaled = penalise_unfinished(scaler.apply(mixed.scores, config), rollout.finished, config)
    tokens = token_experience(
        scaled,
        logprobs,
        ref_logprobs,
        values,
        mask,
        kl_coef=kl_coef,
        kl_estimator=config.kl_estimator,
        gamma=config.gamma,
        lam=config.lam,
        step_rewards=None if mixed.steps is None else scaler.apply_to_steps(mixed.steps, config),
        kl=kl,
    )
    result = Experience(
        rollout=rollout,
        scores=mixed.totals,
        logprobs=logprobs,
        old_logprobs=ref_logprobs if config.importance_sampling else logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
        kl=tokens.kl,
        token_rewards=tokens.rewards,
        advantages=tokens.advantages,
        returns=tokens.returns,
        rewards=mixed,
    )
    return result, scaler


def not_finite(experience: Experience) -> str | None:
    """What of an experience holds a number that is not finite, in words; None where all are finite. One host sync."""
    parts = {
        "a score of the reward model": experience.scores,
        "a log-prob of the policy": experience.logprobs,
        "a log-prob of the reference": experience.ref_logprobs,
        "a value of the critic": experience.values,
        "a KL": experience.kl,
        "an advantage": experience.advantages,
        "a return": experience.returns,
    }
    is_bad = torch.stack([x.isfinite().all().logical_not() for x in parts.values()]).tolist()
    return next((f"{name} that is not finite" for name, bad in zip(parts, is_bad, strict=True) if bad), None)


def make_scorer(
    models: Models,
    tokens_per_microbatch: int,
    *,
    rewards: RewardMix | None = None,
    is_early: bool,
    trace: Trace | None = None,
) -> RolloutScorer:
    """For one rollout. is_early: parts of it will come while the policy samples the rest."""
    reference = None if models.reference is models.policy else models.reference
    sampler = models.policy if is_early else None
    # A frozen policy is idle in the update; a trained one is needed in any case.
    following = models.policy if models.policy.optimizer is not None else None
    roles, limit = (models.reward, models.critic, reference), tokens_per_microbatch
    step_ends = rewards.step_ends if rewards is not None else None
    return RolloutScorer(
        *roles,
        process=models.process,
        step_ends=step_ends,
        sampler=sampler,
        following=following,
        limit=limit,
        trace=trace,
    )


def policy_logprobs(rollout: Rollout, policy: Role, config: PpoConfig, tokens_per_microbatch: int) -> Tensor:
    """[B, T] log-probs of the policy that sampled: recomputed, or the sampler's own (ppo.old_logprobs)."""
    if config.old_logprobs == "rollout":
        return rollout.sampling_logprobs
    return token_logprobs(policy, rollout, tokens_per_microbatch=tokens_per_microbatch)[0]


def kept_tokens(rollout: Rollout, config: PpoConfig) -> Tensor:
    """[B, T] bool: the response tokens that both losses train on (ppo.mask_no_eos leaves unfinished responses out)."""
    if config.mask_no_eos:
        return rollout.response_mask & rollout.finished[:, None]
    return rollout.response_mask


def sampler_weights(experience: Experience, config: PpoConfig) -> Tensor | None:
    """[B, T] float32: weights of ppo.rollout_correction for the policy loss; None where it is off."""
    if config.rollout_correction == "none":
        return None
    log_ratio = clamped_log_ratio(experience.logprobs, experience.rollout.sampling_logprobs)
    return log_ratio.exp().clamp_max(config.rollout_correction_cap)
