"""What the last stage of a role computes from hidden states with its vocabulary head; logits are never stored whole.

The losses add the gradient of the head's weight to Megatron's gradient buffer themselves, in the forward pass: what
they return must reach the schedule unscaled (the kernels check it).
"""

from typing import Any

import torch
from torch import Tensor

from ppomax.engine.models.roles import Role
from ppomax.kernels.linear_logprobs import linear_logprobs
from ppomax.kernels.linear_policy_loss import LinearLoss, linear_cross_entropy, linear_policy_loss


def head_logprobs(role: Role, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """hidden [M, H], labels [M] -> log-probs and entropies [M] float32 (0 where the label is negative); no gradient."""
    with torch.no_grad():
        return linear_logprobs(hidden, role.stage.vocabulary_weight(), labels, **_split(role))


def head_policy_loss(
    role: Role,
    hidden: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    **options: Any,
) -> LinearLoss:
    """linear_policy_loss of the head of a trained role; options: its other keyword arguments."""
    return linear_policy_loss(
        hidden,
        role.stage.vocabulary_weight(),
        labels,
        old_logprobs,
        advantages,
        weights,
        **options,
        **_training(role),
    )


def head_cross_entropy(role: Role, hidden: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Sum of the negative log-likelihoods of the labels >= 0 times `weight`, of the head of a trained role."""
    weights = torch.full(labels.shape, weight, device=labels.device)
    return linear_cross_entropy(hidden, role.stage.vocabulary_weight(), labels, weights, **_training(role))


def _split(role: Role) -> dict[str, Any]:
    return {"tp_group": role.groups.megatron.tp, "vocab_size": role.shape.vocab_size}


def _training(role: Role) -> dict[str, Any]:
    return {
        "main_grad": role.stage.vocabulary_weight().main_grad,  # type: ignore[attr-defined]  # Megatron's buffer
        "sum_hidden_grad": not role.stage.sums_hidden_grad,
        **_split(role),
    }
