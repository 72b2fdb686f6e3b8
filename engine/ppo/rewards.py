"""What happens to reward-model scores before they become token rewards: running moments, scaling, clipping; and the KL
coefficient.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ppomax.engine.config_ppo import PpoConfig


@dataclass(frozen=True)
class RewardScaler:
    """Moments of all scores seen so far (P p.16: "historical mean and variance"), in double precision. A score is what
    a response gets in all.

    count: scores seen. mean, m2: their mean and sum of squared distances from it. The global batch is folded in once
    per rollout, in prompt order, so the moments are the same for every layout.
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def update(self, scores: Tensor) -> "RewardScaler":
        """The moments after scores [B] as well (Chan et al.'s merge, as in the released code).

        Scores that are not finite stay out: one of them would spoil the moments of the whole run.
        """
        x = scores.detach().double().cpu()
        x = x[x.isfinite()]
        if x.numel() == 0:
            return self
        count, batch_mean = x.numel(), float(x.mean())
        batch_m2 = float((x - batch_mean).square().sum())
        total, delta = self.count + count, batch_mean - self.mean
        return RewardScaler(
            count=total,
            mean=self.mean + delta * count / total,
            m2=self.m2 + batch_m2 + delta * delta * self.count * count / total,
        )

    @property
    def std(self) -> float:
        """Unbiased standard deviation; 1 while it is unknown (one score) or zero (equal scores), where dividing would
        explode.
        """
        if self.count < 2:
            return 1.0
        std = math.sqrt(self.m2 / (self.count - 1))
        return std if std > 1e-6 * max(1.0, abs(self.mean)) else 1.0

    def apply(self, scores: Tensor, config: PpoConfig) -> Tensor:
        """Scores [B] float32 after ppo.reward_scaling and ppo.reward_clip (Eq. 18); the moments must already contain
        them.
        """
        if config.reward_scaling == "norm":
            scores = (scores - self.mean) / self.std
        elif config.reward_scaling == "scale":
            scores = scores / self.std
        if config.reward_clip is not None:
            scores = scores.clamp(-config.reward_clip, config.reward_clip)
        return scores

    def apply_to_steps(self, rewards: Tensor, config: PpoConfig) -> Tensor:
        """Rewards of steps [B, T] by the same standard deviation and clip. The mean is that of whole responses: `apply`
        takes it off once, at their end.
        """
        if config.reward_scaling != "none":
            rewards = rewards / self.std
        if config.reward_clip is not None:
            rewards = rewards.clamp(-config.reward_clip, config.reward_clip)
        return rewards


@dataclass(frozen=True)
class KlController:
    """The weight of the KL penalty: fixed, or steered to ppo.kl_target (Ziegler et al. 2019, section 2.2)."""

    coef: float

    def update(self, mean_kl: float, num_responses: int, config: PpoConfig) -> "KlController":
        """mean_kl: k1 per token of the last rollout, nats."""
        if config.kl_controller == "fixed":
            return self
        error = min(max(mean_kl / config.kl_target - 1, -0.2), 0.2)
        return replace(self, coef=self.coef * (1 + error * num_responses / config.kl_horizon))


def penalise_unfinished(scores: Tensor, finished: Tensor, config: PpoConfig) -> Tensor:
    """Takes ppo.no_eos_penalty off the scaled scores [B] of responses without EOS."""
    return scores - config.no_eos_penalty * torch.logical_not(finished)
