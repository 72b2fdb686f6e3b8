"""Held-out measurements: a policy's rewards, KL, perplexity and sample dialogues; a reward model's pair accuracy."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppomax.engine.config import TrainConfig
from ppomax.engine.data.batches import unpad
from ppomax.engine.data.chat import Template
from ppomax.engine.data.datasets import PairRow, PromptRow
from ppomax.engine.models.roles import Role
from ppomax.engine.ppo.scoring import score_responses, sequence_scores, token_logprobs
from ppomax.engine.ppo.types import Rewards, Rollout
from ppomax.engine.rewards.mixture import RewardMix

EVALUATION_STEP = -1
"""The step number of evaluation in request seeds: every evaluation of a run draws the same noise."""


@dataclass(frozen=True)
class PairAccuracy:
    """differences [P] float32: score of the chosen minus that of the rejected response."""

    differences: Tensor

    def metrics(self) -> dict[str, float]:
        difference = self.differences.double()
        return {
            "accuracy": float((difference > 0).double().mean()),
            "difference_mean": float(difference.mean()),
            "difference_std": float(difference.std()) if difference.numel() > 1 else 0.0,
        }


def pair_accuracy(model: Role, pairs: Sequence[PairRow], train: TrainConfig) -> PairAccuracy:
    """Scores held-out pairs. Collective over the role's ranks."""
    scores = sequence_scores(model, pair_sequences(pairs), tokens_per_microbatch=train.tokens_per_microbatch)
    chosen, rejected = scores.view(-1, 2).unbind(1)
    return PairAccuracy((chosen - rejected).cpu())


def pair_sequences(pairs: Sequence[PairRow]) -> list[Tensor]:
    """chosen, rejected, chosen, ...: token ids of the pairs."""
    return [torch.tensor(tokens) for pair in pairs for tokens in (pair.chosen, pair.rejected)]


@dataclass(frozen=True)
class PolicyEvaluation:
    """metrics over held-out prompts; samples: one dictionary per prompt with prompt, response, reward, finished."""

    metrics: dict[str, float]
    samples: list[dict[str, object]]


def evaluate_policy(
    policy: Role,
    reward: Role | None,
    reference: Role | None,
    prompts: Sequence[PromptRow],
    rollout: Rollout,
    train: TrainConfig,
    template: Template,
    *,
    process: Role | None = None,
    rewards: RewardMix | None = None,
) -> PolicyEvaluation:
    """Scores sampled responses to held-out prompts (raw scores).

    reference: the KL is measured against it; None leaves it out. rewards: what is summed; None for the reward model's
    scores alone. Every rank of the run must call it.
    """
    limit = train.tokens_per_microbatch
    mixed = score_responses(rollout, reward, process, rewards, tokens_per_microbatch=limit)
    scores = mixed.totals
    logprobs, entropy = token_logprobs(policy, rollout, tokens_per_microbatch=limit)
    ref_logprobs = None
    if reference is not None:
        ref_logprobs, _ = token_logprobs(reference, rollout, tokens_per_microbatch=limit)
        reference.groups.give_to_all(ref_logprobs)
    policy.groups.give_to_all(logprobs)
    policy.groups.give_to_all(entropy)
    mask = rollout.response_mask
    values = {
        "reward": scores.mean(),
        "reward_std": scores.std() if len(scores) > 1 else scores.new_zeros(()),
        "response_length": mask.sum(1).float().mean(),
        "finished": rollout.finished.float().mean(),
        "perplexity": (-logprobs.sum() / mask.sum()).exp(),
        "entropy": entropy.sum() / mask.sum(),
    }
    values |= mixed.metrics()
    if ref_logprobs is not None:
        values["kl"] = (logprobs - ref_logprobs).sum() / mask.sum()
    metrics = dict(zip(values, torch.stack([v.double() for v in values.values()]).tolist(), strict=True))
    return PolicyEvaluation(metrics, _samples(rollout, mixed, prompts, template))


def _samples(
    rollout: Rollout, rewards: Rewards, prompts: Sequence[PromptRow], template: Template
) -> list[dict[str, object]]:
    samples, totals = [], rewards.totals
    for b, (sequence, row) in enumerate(zip(unpad(rollout.tokens.cpu(), rollout.lengths.cpu()), prompts, strict=True)):
        samples.append(
            {
                "prompt": [{"role": turn.role, "text": turn.text} for turn in row.turns],
                "response": template.decode_response(sequence[len(row.tokens) :].tolist()),
                "reward": float(totals[b]),
                "finished": bool(rollout.finished[b]),
                **rewards.of_response(b),
                **({"category": row.category} if row.category else {}),
            }
        )
    return samples
