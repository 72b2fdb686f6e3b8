"""Log-probabilities, policy loss and KL straight from hidden states: the vocabulary head is part of the function.

Logits exist in fp32 for a chunk of tokens at a time, in the forward and again in the backward pass; they are never
rounded to the type of the weights, which would put errors above 1 % into PPO's ratio. Labels < 0 mask rows, as in
logprobs.py.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from ppomax.kernels.dispatch import implementation
from ppomax.kernels.logprobs import check_rows
from ppomax.kernels.numerics import keep, total
from ppomax.kernels.policy_loss import Clip, PolicyLoss, policy_loss
from ppomax.kernels.shards import first_column, gather_shards, sum_shards

CHUNK_BYTES = 2**28
"""fp32 logits that exist at the same time by default: 256 MiB is 2097 tokens of a 32,000-token vocabulary."""


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    tp_group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """token_logprobs(hidden @ weight.T, labels), without storing the logits.

    hidden [N, H] float: final hidden states, the same on every rank of tp_group.
    weight [V/tp, H] float: this rank's rows of the head.
    labels, temperature, tp_group, vocab_size: as in token_logprobs.
    chunk_rows: tokens whose logits exist at the same time. Unset: as many as fit CHUNK_BYTES.
    Returns (logprobs [N], entropy [N]) in nats, float32 (float64 for float64 inputs). The gradient of hidden is the
    sum over tp_group (one all-reduce), that of weight is this rank's; both are accumulated in fp32 and rounded once
    to the dtype of their tensor.
    Every rank of tp_group must call it and its backward. The equations are in logprobs_reference.py.
    Raises ValueError on shapes that do not fit and on a temperature that is not positive.
    """
    check_rows("linear_logprobs", hidden, labels, temperature)
    _check_head("linear_logprobs", hidden, weight)
    return _LinearLogprobs.apply(
        hidden, weight, labels, temperature, tp_group, vocab_size, chunk_rows or rows_per_chunk(weight)
    )


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip: Clip,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    tp_group: ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> PolicyLoss:
    """policy_loss of linear_logprobs, minus entropy_coef times the weighted sum of the entropies.

    hidden [N, H], weight [V/tp, H], labels [N]: as in linear_logprobs.
    old_logprobs, advantages, weights [N]: as in policy_loss; a row with a label < 0 or of weight 0 is not read.
    Returns PolicyLoss, whose loss is differentiable in hidden and weight.
    Every rank of tp_group must call it and its backward.
    """
    is_kept = (labels >= 0) & (weights != 0)
    labels, weights = torch.where(is_kept, labels, -1), keep(weights, is_kept)
    logprobs, entropy = linear_logprobs(hidden, weight, labels, tp_group=tp_group, vocab_size=vocab_size)
    result = policy_loss(logprobs, old_logprobs, advantages, weights, clip=clip, dual_clip=dual_clip)
    if entropy_coef == 0:
        return result
    return result._replace(loss=result.loss - entropy_coef * total(weights * entropy))


@torch.no_grad()
def linear_full_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    rows_mask: Tensor | None = None,
    *,
    tp_group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v) of two whole next-token distributions per token; not differentiable.

    hidden [N, H], weight [V/tp, H] float: of p. ref_hidden [N, H'], ref_weight [V/tp, H'] float: of q, sharded alike.
    rows_mask [N] bool: rows that count; the others are not read and give 0. Unset: all.
    Returns kl [N] in nats, float32 (float64 for float64 inputs), never below 0 by more than rounding.
    Every rank of tp_group must call it. Raises ValueError on shapes that do not fit.
    Source: paper Eq. 19, whose KL is over "the action space of the i-th response token".
    """
    _check_head("linear_full_kl", hidden, weight)
    _check_head("linear_full_kl", ref_hidden, ref_weight)
    if hidden.shape[0] != ref_hidden.shape[0] or weight.shape[0] != ref_weight.shape[0]:
        raise ValueError(
            f"linear_full_kl: hidden {tuple(hidden.shape)} and ref_hidden {tuple(ref_hidden.shape)} need equal rows,"
            f" weight {tuple(weight.shape)} and ref_weight {tuple(ref_weight.shape)} too"
        )
    if rows_mask is None:
        rows_mask = torch.ones(hidden.shape[0], dtype=torch.bool, device=hidden.device)
    compute = implementation("linear_logprobs", hidden, weight, ref_hidden, ref_weight)
    return compute.full_kl(
        hidden,
        weight,
        ref_hidden,
        ref_weight,
        rows_mask,
        tp_group=tp_group,
        vocab_size=vocab_size,
        chunk_rows=chunk_rows or rows_per_chunk(weight),
    )


def rows_per_chunk(weight: Tensor) -> int:
    """Tokens whose fp32 logits over the columns of weight [V/tp, H] fit CHUNK_BYTES."""
    return max(1, CHUNK_BYTES // (4 * weight.shape[0]))


def _check_head(function: str, hidden: Tensor, weight: Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{function}: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}; expected [N, H] and [V/tp, H]"
        )


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float,
        tp_group: ProcessGroup | None,
        vocab_size: int | None,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor]:
        compute = implementation("linear_logprobs", hidden, weight, labels)
        settings = {
            "temperature": temperature,
            "first": first_column(weight.shape[0], tp_group),
            "vocab_size": vocab_size,
            "chunk_rows": chunk_rows,
        }
        shard = compute.shard_statistics(hidden, weight, labels, **settings)
        logprobs, entropy, row_max, log_sum = compute.combine_statistics(gather_shards(shard, tp_group), labels)
        ctx.save_for_backward(hidden, weight, labels, row_max, log_sum, entropy)
        ctx.compute, ctx.settings, ctx.tp_group = compute, settings, tp_group
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, row_max, log_sum, entropy = ctx.saved_tensors
        hidden_needed, weight_needed = ctx.needs_input_grad[:2]
        grad_hidden, grad_weight = ctx.compute.gradients(
            hidden,
            weight,
            labels,
            row_max,
            log_sum,
            entropy,
            grad_logprobs,
            grad_entropy,
            hidden_needed=hidden_needed,
            weight_needed=weight_needed,
            **ctx.settings,
        )
        if grad_hidden is not None:
            grad_hidden = sum_shards(grad_hidden, ctx.tp_group).to(hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None
