"""PPO's policy losses per token, with their gradient formed in the forward pass.

The loss is a weighted sum: the caller puts the mask and one over the global number of kept tokens into `weights`, so
micro-batches and replicas add up. A token of weight 0 is not read. Entropy bonus and language-model loss are the
caller's.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ppomax.kernels.dispatch import implementation

Clip = float | tuple[float, float] | None
"""Bounds of the ratio: a number e for [1 - e, 1 + e], a pair (low, high) for [1 - low, 1 + high], None for none."""


class PolicyLoss(NamedTuple):
    """Scalars on the device of the inputs, sums over `weights`; only loss carries a gradient.

    clip_fraction: tokens whose clipped term is the larger one. approx_kl: k3 estimate of KL(old || new), nats.
    mean_ratio: of exp(logprobs - old_logprobs). dual_clip_fraction: tokens held by dual_clip.
    """

    loss: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor
    mean_ratio: Tensor
    dual_clip_fraction: Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip: Clip,
    dual_clip: float | None = None,
    importance_weights: Tensor | None = None,
    advantage_clip: float | None = None,
    objective: Literal["clip", "penalty"] = "clip",
    penalty_beta: float = 0.0,
) -> PolicyLoss:
    """Weighted sum over tokens of PPO's clipped surrogate (paper Eq. 15) or KL-penalised one (Eq. 14), to be minimised.

    All tensors have one shape, [N] or [B, T], and are float.
    logprobs: of the policy being trained, nats; the only input that gets a gradient.
    old_logprobs: of the policy that sampled, nats. advantages: in units of reward.
    weights: loss weight of each token, mask / global number of kept tokens; 0: the token is not read.
    importance_weights: factor of each token's loss, not of its metrics; unset: 1.
    clip: bounds of the ratio in objective "clip". advantage_clip: advantages are clamped to +- this first.
    dual_clip: for negative advantages the loss is at most dual_clip * |advantage| (Ye et al. 2020).
    objective "penalty": -ratio * advantage + penalty_beta * KL(old || new), without clip and dual_clip; the KL of a
    token sampled from old is estimated by ratio - 1 - log ratio, which is unbiased and never negative (k3).
    The log-ratio is clamped to +- 20, beyond which the gradient is 0. Returns PolicyLoss.
    Raises ValueError on unequal shapes, on bounds that are not positive and on dual_clip <= 1.
    """
    _check(logprobs, old_logprobs, advantages, weights, importance_weights)
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    low, high = (1.0 if low is None else low), (math.inf if high is None else high)  # ratios from 0 to infinity
    if min(low, high) <= 0 or (advantage_clip is not None and advantage_clip <= 0):
        raise ValueError(f"policy_loss: clip {clip} and advantage_clip {advantage_clip} must be positive or None")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(
            f"policy_loss: dual_clip {dual_clip} must be above 1, or it would hold unclipped tokens; None turns it off"
        )
    if objective not in ("clip", "penalty"):
        raise ValueError(f'policy_loss: objective {objective!r}; expected "clip" or "penalty"')
    settings = {
        "ratio_min": 1 - low,
        "ratio_max": 1 + high,
        "dual_clip": dual_clip,
        "advantage_clip": advantage_clip,
        "penalty_beta": penalty_beta if objective == "penalty" else None,
    }
    return PolicyLoss(*_PolicyLoss.apply(logprobs, old_logprobs, advantages, weights, importance_weights, settings))


def _check(logprobs: Tensor, *others: Tensor | None) -> None:
    shapes = [tuple(other.shape) for other in others if other is not None]
    if any(shape != tuple(logprobs.shape) for shape in shapes):
        raise ValueError(f"policy_loss: logprobs {tuple(logprobs.shape)} and the others {shapes} must have one shape")


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        weights: Tensor,
        importance_weights: Tensor | None,
        settings: dict[str, float | None],
    ) -> tuple[Tensor, ...]:
        compute = implementation("policy_loss", logprobs, old_logprobs, advantages, weights, importance_weights)
        scalars, grad = compute.policy_loss(logprobs, old_logprobs, advantages, weights, importance_weights, **settings)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(*scalars[1:])
        return scalars

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_loss.to(grad.dtype), None, None, None, None, None
