"""The losses of one optimizer step, as functions of one pack: weighted sums whose weights hold the global token count.

Per-token inputs are flattened global tensors; `pack.index` picks those of the pack's rows. A token's weight decides
which loss it is in.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ppomax.engine.config_ppo import PpoConfig
from ppomax.engine.data.batches import Pack
from ppomax.engine.models.heads import head_policy_loss
from ppomax.engine.models.roles import Role
from ppomax.kernels.numerics import clamped_log_ratio, exp_remainder, total
from ppomax.kernels.value_head_loss import value_head_loss
from ppomax.kernels.whiten import Moments

POLICY_METRICS = (
    "policy_loss",
    "clip_fraction",
    "approx_kl",
    "mean_ratio",
    "dual_clip_fraction",
    "entropy",
    "ptx_loss",
)
VALUE_METRICS = ("value_loss", "value_clip_fraction")


@dataclass(frozen=True)
class PolicyTargets:
    """Flattened per-token inputs of the policy's loss, [K] float32 for K = B * T plus the positions of ptx tokens.

    rollout_logprobs: of the policy that sampled; old_logprobs: the ratio's denominator, the same or the reference's.
    moments: by which the advantages are whitened, or None. advantages and moments are of the global minibatch.
    weights: 1 / kept response tokens of the global minibatch, or 0. ptx_weights: 1 / ptx tokens of the step, or 0.
    importance_weights: factors of the tokens' policy losses (`sampler_weights`), or None.
    entropy_sign: -1 for a bonus on entropy, +1 for a penalty (the thresholded bonus above its target).
    """

    old_logprobs: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor
    moments: Moments | None
    weights: Tensor
    ptx_weights: Tensor
    importance_weights: Tensor | None
    entropy_sign: float


class PolicyObjective:
    """Eq. 15 (or 14) plus entropy bonus plus Eq. 17's language-model term; see `parallel.pipeline.LossFunction`.

    log_ratios [K] float32: logprobs - old_logprobs of the tokens that this rank's loss has seen, 0 elsewhere.
    """

    def __init__(self, policy: Role, targets: PolicyTargets, config: PpoConfig) -> None:
        self.policy, self.targets, self.config = policy, targets, config
        self.log_ratios = torch.zeros_like(targets.old_logprobs)

    def __call__(self, hidden: Tensor, pack: Pack) -> tuple[Tensor, Tensor]:
        targets, config = self.targets, self.config
        weights = targets.weights[pack.index]
        result = head_policy_loss(
            self.policy,
            hidden,
            pack.labels,
            targets.old_logprobs[pack.index],
            targets.advantages[pack.index],
            weights,
            clip=config.policy_clip,
            dual_clip=config.dual_clip,
            entropy_coef=-targets.entropy_sign * config.entropy_coef,
            importance_weights=None if targets.importance_weights is None else targets.importance_weights[pack.index],
            moments=targets.moments,
            advantage_clip=config.advantage_clip,
            objective=config.objective,
            penalty_beta=config.penalty_beta,
            lm_weights=config.ptx_coef * targets.ptx_weights[pack.index] if config.ptx_coef > 0 else None,
        )
        log_ratios = clamped_log_ratio(result.logprobs.detach(), targets.old_logprobs[pack.index])
        self.log_ratios[pack.index] = log_ratios.float()
        if config.importance_sampling:
            # The kernel's estimate is of the KL from the reference; ppo.target_kl is about the policy that sampled.
            log_ratio = clamped_log_ratio(result.logprobs, targets.rollout_logprobs[pack.index])
            result = result._replace(approx_kl=total(weights * exp_remainder(log_ratio)))
        metrics = [
            result.surrogate,
            result.clip_fraction,
            result.approx_kl,
            result.mean_ratio,
            result.dual_clip_fraction,
            result.entropy,
            result.lm_loss / config.ptx_coef if config.ptx_coef > 0 else result.lm_loss,
        ]
        return result.loss, torch.stack(metrics)


class ValueObjective:
    """Eq. 16, clipped around the old values, times ppo.value_coef."""

    def __init__(self, critic: Role, old_values: Tensor, returns: Tensor, weights: Tensor, config: PpoConfig) -> None:
        self.critic, self.config = critic, config
        self.old_values, self.returns, self.weights = old_values, returns, config.value_coef * weights

    def __call__(self, hidden: Tensor, pack: Pack) -> tuple[Tensor, Tensor]:
        loss, clip_fraction, _ = value_head_loss(
            hidden,
            self.critic.stage.scalar_weight(),
            self.old_values[pack.index],
            self.returns[pack.index],
            self.weights[pack.index],
            clip=self.config.value_clip,
            upstream_is_one=True,
        )
        # The coefficient is in the weights, but not in the metrics. With 0, of an untrained critic, they are 0.
        return loss, torch.stack([loss.detach(), clip_fraction]) / (self.config.value_coef or 1.0)
