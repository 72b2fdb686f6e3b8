"""The optimizer steps of one iteration: epochs and minibatches over the experience, policy and critic together.

A minibatch is a list of sequences of the global batch; every rank knows all of them, so weights and whitening need no
collective.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ppomax.engine.config_models import OptimConfig
from ppomax.engine.config_ppo import PpoConfig
from ppomax.engine.data.batches import Rows, response_rows, unpad
from ppomax.engine.data.datasets import DialogueRow
from ppomax.engine.models.roles import Role, role_packs
from ppomax.engine.parallel.pipeline import run_forward_backward, share_results
from ppomax.engine.parallel.side_by_side import side_by_side
from ppomax.engine.ppo.experience import kept_tokens, not_finite, sampler_weights
from ppomax.engine.ppo.losses import POLICY_METRICS, VALUE_METRICS, PolicyObjective, PolicyTargets, ValueObjective
from ppomax.engine.ppo.scoring import token_logprobs
from ppomax.engine.ppo.statistics import masked_quantiles, to_host
from ppomax.engine.ppo.types import Experience, Rollout
from ppomax.engine.steps import StepCounter, apply_gradients, dialogue_rows, zero_gradients
from ppomax.engine.trace import Trace, span
from ppomax.kernels.whiten import masked_moments

POLICY_SUMS = ("policy_objective", *POLICY_METRICS)
VALUE_SUMS = ("value_objective", *VALUE_METRICS)
RATIO_METRICS = ("ratio_min", "ratio_p01", "ratio_p99", "ratio_max", "effective_sample_fraction")


@dataclass(frozen=True)
class UpdateSettings:
    """What every optimizer step needs besides the data."""

    ppo: PpoConfig
    optim: OptimConfig
    tokens_per_microbatch: int
    trace: Trace | None = None

    def slowed(self, factor: float) -> "UpdateSettings":
        """With both peak learning rates times a factor."""
        rates = {"lr": self.optim.lr * factor, "critic_lr": self.optim.critic_lr * factor}
        return replace(self, optim=self.optim.model_copy(update=rates))


def update(
    policy: Role | None,
    critic: Role,
    experience: Experience,
    ptx: Iterator[Sequence[DialogueRow]] | None,
    settings: UpdateSettings,
    counter: StepCounter,
    generator: torch.Generator,
) -> dict[str, float]:
    """Trains on one rollout; policy None trains the critic alone (critic pre-training).

    ptx: batches of dialogues for Eq. 17, one per optimizer step. generator: draws the minibatches.
    Returns the means of the metrics over the applied steps, and the numbers of applied and of skipped steps. A rollout
    with a number that is not finite is not learned from: all its steps are skipped. Every rank of the run must call it.
    Roles on ranks of their own compute the gradients of a minibatch at the same time.
    """
    wrong = not_finite(experience)
    if wrong is not None:
        num_steps = settings.ppo.epochs * len(experience.scores) // settings.ppo.minibatch_size
        counter.record_bad_rollout(num_steps, what=wrong)
        return {"optimizer_steps": 0.0, "skipped_steps": float(num_steps), "skipped_rollouts": 1.0}
    trained = [critic] if policy is None else [policy, critic]
    for role in trained:
        role.memory.hold("weights", "gradients")  # the critic's come while the policy computes
    stats = _epochs(policy, critic, experience, ptx, settings, counter, generator)
    for role in trained:
        role.memory.release("weights", "gradients")
    return stats


def _epochs(
    policy: Role | None,
    critic: Role,
    experience: Experience,
    ptx: Iterator[Sequence[DialogueRow]] | None,
    settings: UpdateSettings,
    counter: StepCounter,
    generator: torch.Generator,
) -> dict[str, float]:
    config = settings.ppo
    collected: list[dict[str, float]] = []
    ratios = Ratios()
    num_skipped = 0
    for _ in range(config.epochs):
        order = torch.randperm(len(experience.scores), generator=generator)
        for members in order.split(config.minibatch_size):
            batch = take(experience, members)
            dialogues = next(ptx) if ptx is not None else ()
            stats = _step(policy, critic, batch, dialogues, settings, counter, ratios)
            if stats is None:
                return _means(collected, num_skipped) | _ratio_metrics(policy, ratios)
            if policy is not None and not collected:
                # The weights are still those that sampled: what the ratio shows is the mismatch of old log-probs.
                stats["first_step_kl"] = stats["approx_kl"]
            if stats["skipped_steps"] > 0:
                num_skipped += 1  # its metrics are not numbers
            else:
                collected.append(stats)
    return _means(collected, num_skipped) | _ratio_metrics(policy, ratios)


class Ratios:
    """What this rank's losses have seen of log pi - log pi_old, one [M * T] per minibatch, and where it counts."""

    def __init__(self) -> None:
        self.logs: list[Tensor] = []
        self.masks: list[Tensor] = []


def _ratio_metrics(policy: Role | None, ratios: Ratios) -> dict[str, float]:
    """RATIO_METRICS over the tokens of all minibatches, those of skipped steps too: one exchange, one transfer.

    effective_sample_fraction: (sum r)^2 / (n sum r^2). Every rank of the run must call it.
    """
    if policy is None:
        return {}
    found = torch.ones(len(RATIO_METRICS), dtype=torch.float64, device=policy.device)
    if ratios.logs:
        logs, mask = torch.cat(ratios.logs), torch.cat(ratios.masks)
        share_results(logs, policy.groups)
        low, first, last, high = masked_quantiles(logs, mask, (0.0, 0.01, 0.99, 1.0)).double().exp().unbind()
        ratio = torch.where(mask, logs.double().exp(), 0.0)
        found = torch.stack([low, first, last, high, ratio.sum() ** 2 / (mask.sum() * ratio.square().sum())])
    policy.groups.give_to_all(found)
    return dict(zip(RATIO_METRICS, to_host({"ratios": found})["ratios"], strict=True))


def _step(
    policy: Role | None,
    critic: Role,
    batch: Experience,
    dialogues: Sequence[DialogueRow],
    settings: UpdateSettings,
    counter: StepCounter,
    ratios: Ratios,
) -> dict[str, float] | None:
    """One optimizer step on one minibatch; None where ppo.target_kl ends the epochs before it.

    The ranks of policy and critic meet once, when both have their gradients: the joint norm, ppo.target_kl and the
    guard against what is not finite need both.
    """
    config, optim = settings.ppo, settings.optim
    mask = kept_tokens(batch.rollout, config)
    weights = mask.float() / mask.sum().clamp_min(1)

    def of_policy(policy: Role) -> Tensor:
        with span(settings.trace, "policy gradients", is_here=policy.is_here):
            sums = _policy_gradients(policy, batch, mask, weights, dialogues, settings, ratios)
        policy.memory.prefetch("optimizer")  # it comes while the critic computes
        return sums

    def of_critic() -> Tensor:
        with span(settings.trace, "critic gradients", is_here=critic.is_here):
            return _critic_gradients(critic, batch, weights, settings)

    trained: list[tuple[Role, float, tuple[str, ...], Tensor]] = []
    if policy is None:
        sums = of_critic()
    else:
        policy_sums, sums = side_by_side(partial(of_policy, policy), of_critic)
        trained.append((policy, optim.lr, POLICY_SUMS, policy_sums))
    trained.append((critic, optim.critic_lr, VALUE_SUMS, sums))
    stats: dict[str, float] = {}
    for role, _, names, sums in trained:
        role.groups.give_to_all(sums)
        stats |= zip(names, sums.tolist(), strict=True)
    if config.target_kl is not None and config.target_kl < stats.get("approx_kl", 0.0) < math.inf:
        return None
    return apply_gradients([(role, peak) for role, peak, *_ in trained], stats, optim, counter)


def _policy_gradients(
    policy: Role,
    batch: Experience,
    mask: Tensor,
    weights: Tensor,
    dialogues: Sequence[DialogueRow],
    settings: UpdateSettings,
    ratios: Ratios,
) -> Tensor:
    """The sums of POLICY_SUMS [K] float64 on the ranks of the policy, zeros elsewhere. ratios: gets this one's."""
    if not policy.is_here:
        return torch.zeros(len(POLICY_SUMS), dtype=torch.float64, device=policy.device)
    config = settings.ppo
    sequences, rows = _minibatch_rows(batch.rollout, mask)
    num_columns, device = mask.numel(), mask.device
    ptx_sequences, ptx_rows, num_ptx = dialogue_rows(dialogues, first_index=num_columns)
    rows = Rows([*rows.rows, *ptx_rows.rows], [*rows.labels, *ptx_rows.labels], [*rows.index, *ptx_rows.index])
    padding = torch.zeros(num_ptx, device=device)
    correction = sampler_weights(batch, config)
    targets = PolicyTargets(
        old_logprobs=torch.cat([batch.old_logprobs.flatten(), padding]),
        rollout_logprobs=torch.cat([batch.logprobs.flatten(), padding]),
        advantages=torch.cat([batch.advantages.flatten(), padding]),
        # Norm, then clip (P p.14), both where the loss reads an advantage.
        moments=masked_moments(batch.advantages, mask) if config.advantage_norm else None,
        weights=torch.cat([weights.flatten(), padding]),
        ptx_weights=torch.cat([torch.zeros(num_columns, device=device), padding + 1 / max(1, num_ptx)]),
        importance_weights=None if correction is None else torch.cat([correction.flatten(), padding]),
        entropy_sign=_entropy_sign(policy, batch, weights, settings),
    )
    packs = role_packs(policy, [*sequences, *ptx_sequences], rows, settings.tokens_per_microbatch)
    policy.memory.wait()
    zero_gradients(policy)
    objective = PolicyObjective(policy, targets, config)
    sums = run_forward_backward(policy.modules, policy.groups, packs, objective, len(POLICY_METRICS))
    ratios.logs.append(objective.log_ratios[:num_columns])
    ratios.masks.append(mask.flatten())
    return sums


def _critic_gradients(critic: Role, batch: Experience, weights: Tensor, settings: UpdateSettings) -> Tensor:
    """The sums of VALUE_SUMS [K] float64 on the ranks of the critic, zeros elsewhere."""
    if not critic.is_here:
        return torch.zeros(len(VALUE_SUMS), dtype=torch.float64, device=critic.device)
    sequences, rows = _minibatch_rows(batch.rollout, weights > 0)
    packs = role_packs(critic, sequences, rows, settings.tokens_per_microbatch)
    objective = ValueObjective(critic, batch.values.flatten(), batch.returns.flatten(), weights.flatten(), settings.ppo)
    critic.memory.wait()
    zero_gradients(critic)
    return run_forward_backward(critic.modules, critic.groups, packs, objective, len(VALUE_METRICS))


def _entropy_sign(policy: Role, batch: Experience, weights: Tensor, settings: UpdateSettings) -> float:
    """Sign of d |mean entropy - target| / d entropy: one more forward pass, only where ppo.entropy_target is set."""
    target = settings.ppo.entropy_target
    if target is None:
        return -1.0
    _, entropy = token_logprobs(policy, batch.rollout, tokens_per_microbatch=settings.tokens_per_microbatch)
    return 1.0 if float((entropy * weights).sum()) > target else -1.0


def _minibatch_rows(rollout: Rollout, mask: Tensor) -> tuple[list[Tensor], Rows]:
    tokens = rollout.tokens.cpu()
    return unpad(tokens, rollout.lengths.cpu()), response_rows(tokens, mask.cpu())


def take(experience: Experience, members: Tensor) -> Experience:
    """The experience of some sequences of the batch."""
    index = members.to(experience.scores.device)
    rollout = Rollout(**{name: value[index] for name, value in vars(experience.rollout).items() if value is not None})
    rest = {name: value[index] for name, value in vars(experience).items() if name not in ("rollout", "rewards")}
    return Experience(rollout=rollout, **rest)


def _means(collected: Sequence[dict[str, float]], num_skipped: int) -> dict[str, float]:
    names = {name for stats in collected for name in stats}
    means = {
        name: sum(stats[name] for stats in collected if name in stats) / sum(name in stats for stats in collected)
        for name in sorted(names)
    }
    counts = {"optimizer_steps": float(len(collected)), "skipped_steps": float(num_skipped), "skipped_rollouts": 0.0}
    return means | counts
