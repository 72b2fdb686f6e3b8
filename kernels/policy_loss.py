"""PPO's policy losses per token, with their gradient formed in the forward pass.

The loss is a weighted sum: the caller puts the mask and one over the global number of kept tokens into `weights`, so
micro-batches and replicas add up. A token of weight 0 is not read. Entropy bonus and language-model loss are the
caller's.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from ppomax.kernels.attach import with_gradients
from ppomax.kernels.dispatch import implementation
from ppomax.kernels.numerics import contiguous, wide_dtype
from ppomax.kernels.whiten import Moments

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


class PolicySettings(NamedTuple):
    """The settings of policy_loss as its operators take them: a bound that is off is infinite.

    penalty_beta is None for objective "clip".
    """

    ratio_min: float
    ratio_max: float
    dual_clip: float
    advantage_clip: float
    penalty_beta: float | None
    shift_mean: bool
    unbiased: bool
    whiten_eps: float


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip: Clip,
    dual_clip: float | None = None,
    importance_weights: Tensor | None = None,
    moments: Moments | None = None,
    shift_mean: bool = True,
    unbiased: bool = False,
    whiten_eps: float = 1e-6,
    advantage_clip: float | None = None,
    objective: Literal["clip", "penalty"] = "clip",
    penalty_beta: float = 0.0,
) -> PolicyLoss:
    """Weighted sum over tokens of PPO's clipped surrogate (paper Eq. 15) or KL-penalised one (Eq. 14), to be minimised.

    All tensors but moments have one shape, [N] or [B, T], and are float.
    logprobs: of the policy being trained, nats; the only input that gets a gradient.
    old_logprobs: of the policy that sampled, nats. advantages: in units of reward.
    weights: loss weight of each token, mask / global number of kept tokens; 0: the token is not read.
    importance_weights: factor of each token's loss, not of its metrics; unset: 1.
    moments: advantages are whitened by them on the fly, as by whiten(advantages, ..., moments=moments); unset: not.
    shift_mean, unbiased, whiten_eps: of that whitening.
    advantage_clip: advantages are clamped to +- this, after whitening.
    clip: bounds of the ratio in objective "clip".
    dual_clip: for negative advantages the loss is at most dual_clip * |advantage| (Ye et al. 2020).
    objective "penalty": -ratio * advantage + penalty_beta * KL(old || new), without clip and dual_clip; the KL of a
    token sampled from old is estimated by ratio - 1 - log ratio, which is unbiased and never negative (k3).
    The log-ratio is clamped to +- 20, beyond which the gradient is 0.
    Returns PolicyLoss, float32 (float64 where one of the inputs has it).
    Raises ValueError on unequal shapes, on bounds that are not positive and on dual_clip <= 1.
    """
    others = (old_logprobs, advantages, weights, importance_weights)
    _check(logprobs, *others)
    settings = policy_settings(
        clip=clip,
        dual_clip=dual_clip,
        advantage_clip=advantage_clip,
        objective=objective,
        penalty_beta=penalty_beta,
        shift_mean=shift_mean,
        unbiased=unbiased,
        whiten_eps=whiten_eps,
    )
    constants = [contiguous(None if x is None else x.detach()) for x in others]
    scalars, grad = _policy_loss(logprobs.detach().contiguous(), *constants, list(moments or ()), *settings)
    loss, *metrics = scalars.unbind()
    return PolicyLoss(with_gradients(loss, [logprobs], [grad]), *metrics)


def policy_settings(
    *,
    clip: Clip,
    dual_clip: float | None = None,
    advantage_clip: float | None = None,
    objective: Literal["clip", "penalty"] = "clip",
    penalty_beta: float = 0.0,
    shift_mean: bool = True,
    unbiased: bool = False,
    whiten_eps: float = 1e-6,
) -> PolicySettings:
    """PolicySettings for the arguments of policy_loss; raises its errors about them."""
    low, high = clip if isinstance(clip, tuple | list) else (clip, clip)
    low, high = (1.0 if low is None else low), (math.inf if high is None else high)  # ratios from 0 to infinity
    if not min(low, high) > 0 or (advantage_clip is not None and advantage_clip <= 0):
        raise ValueError(f"policy_loss: clip {clip} and advantage_clip {advantage_clip} must be positive or None")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(
            f"policy_loss: dual_clip {dual_clip} must be above 1, or it would hold unclipped tokens; None turns it off"
        )
    if objective not in ("clip", "penalty"):
        raise ValueError(f'policy_loss: objective {objective!r}; expected "clip" or "penalty"')
    return PolicySettings(
        ratio_min=1 - low,
        ratio_max=1 + high,
        dual_clip=math.inf if dual_clip is None else dual_clip,
        advantage_clip=math.inf if advantage_clip is None else advantage_clip,
        penalty_beta=penalty_beta if objective == "penalty" else None,
        shift_mean=shift_mean,
        unbiased=unbiased,
        whiten_eps=whiten_eps,
    )


def _check(logprobs: Tensor, *others: Tensor | None) -> None:
    shapes = [tuple(other.shape) for other in others if other is not None]
    if any(shape != tuple(logprobs.shape) for shape in shapes):
        raise ValueError(f"policy_loss: logprobs {tuple(logprobs.shape)} and the others {shapes} must have one shape")


@custom_op("ppomax::policy_loss", mutates_args=())
def _policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    importance_weights: Tensor | None,
    moments: list[Tensor],
    ratio_min: float,
    ratio_max: float,
    dual_clip: float,
    advantage_clip: float,
    penalty_beta: float | None,
    shift_mean: bool,
    unbiased: bool,
    whiten_eps: float,
) -> tuple[Tensor, Tensor]:
    tensors = (logprobs, old_logprobs, advantages, weights, importance_weights)
    return implementation("policy_loss", *tensors, *moments).policy_loss(
        *tensors,
        moments,
        ratio_min=ratio_min,
        ratio_max=ratio_max,
        dual_clip=dual_clip,
        advantage_clip=advantage_clip,
        penalty_beta=penalty_beta,
        shift_mean=shift_mean,
        unbiased=unbiased,
        whiten_eps=whiten_eps,
    )


@_policy_loss.register_fake
def _(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    importance_weights: Tensor | None,
    moments: list[Tensor],
    ratio_min: float,
    ratio_max: float,
    dual_clip: float,
    advantage_clip: float,
    penalty_beta: float | None,
    shift_mean: bool,
    unbiased: bool,
    whiten_eps: float,
) -> tuple[Tensor, Tensor]:
    dtype = wide_dtype(logprobs, old_logprobs, advantages, weights, importance_weights)
    grad = torch.empty_like(logprobs, memory_format=torch.contiguous_format)
    return logprobs.new_empty(5, dtype=dtype), grad
