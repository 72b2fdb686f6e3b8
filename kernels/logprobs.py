"""Log-probability of a label and entropy of its distribution, from logits whose vocabulary may be spread over a group.

One collective in the forward pass (four numbers per token and rank), none in the backward pass; of the logits no
second copy is kept. Labels are the mask: a row with a label < 0 is not read, its outputs and gradients are 0.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from ppomax.kernels.dispatch import implementation
from ppomax.kernels.shards import first_column, gather_shards


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    tp_group: ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label, and entropy of each row's distribution, under softmax(logits / temperature).

    logits [N, V/tp] float: this rank's contiguous block of the vocabulary, in rank order of tp_group.
    labels [N] int64: global token ids; < 0: the row is masked.
    vocab_size: columns with a global id >= vocab_size are padding: probability and gradient 0. Unset: there are none.
    Returns (logprobs [N], entropy [N]) in nats, float32 (float64 for float64 logits), differentiable in logits,
    whose gradient has the dtype of logits. A label whose logit is -inf, or that is outside the vocabulary, gets a
    finite logprob near -1e30.
    Every rank of tp_group must call it. The equations are in logprobs_reference.py.
    Raises ValueError on shapes that do not fit and on a temperature that is not positive.
    """
    check_rows("token_logprobs", logits, labels, temperature)
    return _TokenLogprobs.apply(logits, labels, temperature, tp_group, vocab_size)


def check_rows(function: str, rows: Tensor, labels: Tensor, temperature: float) -> None:
    """Raises ValueError unless rows is [N, columns], labels [N] int64 and the temperature positive."""
    if rows.dim() != 2 or labels.shape != rows.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"{function}: rows {tuple(rows.shape)} and labels {tuple(labels.shape)} {labels.dtype}; "
            "expected [N, columns] and [N] int64"
        )
    if temperature <= 0:
        raise ValueError(f"{function}: temperature {temperature} must be positive")


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        temperature: float,
        tp_group: ProcessGroup | None,
        vocab_size: int | None,
    ) -> tuple[Tensor, Tensor]:
        compute = implementation("logprobs", logits, labels)
        first = first_column(logits.shape[1], tp_group)
        shard = compute.shard_statistics(logits, labels, temperature=temperature, first=first, vocab_size=vocab_size)
        logprobs, entropy, row_max, log_sum = compute.combine_statistics(gather_shards(shard, tp_group), labels)
        ctx.save_for_backward(logits, labels, row_max, log_sum, entropy)
        ctx.compute, ctx.settings = compute, {"temperature": temperature, "first": first, "vocab_size": vocab_size}
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, labels, row_max, log_sum, entropy = ctx.saved_tensors
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, None, None
        grad = ctx.compute.logits_gradient(
            logits, labels, row_max, log_sum, entropy, grad_logprobs, grad_entropy, **ctx.settings
        )
        return grad.to(logits.dtype), None, None, None, None
