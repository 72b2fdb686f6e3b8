"""Log-probability of a label and entropy of its distribution, from logits whose vocabulary may be spread over a group.

One collective in the forward pass (four numbers per token and rank), none in the backward pass; of the logits no
second copy is kept. Labels are the mask: a row with a label < 0 is not read, its outputs and gradients are 0.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.library import custom_op

from ppomax.kernels.dispatch import implementation
from ppomax.kernels.numerics import contiguous, rows_of, wide_dtype
from ppomax.kernels.shards import first_column, gather_shards, group_name, group_of, num_real_columns


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
    Raises ValueError on shapes that do not fit and on a temperature below logprobs.MIN_TEMPERATURE.
    """
    check_rows("token_logprobs", logits, labels, temperature)
    return _forward(rows_of(logits), labels.contiguous(), temperature, group_name(tp_group), vocab_size)[:2]


MIN_TEMPERATURE = 1e-4
"""Below it a logit of -1e30, which stands for -inf, would overflow when it is divided."""


def check_rows(function: str, rows: Tensor, labels: Tensor, temperature: float) -> None:
    """Raises ValueError unless rows is [N, columns], labels [N] int64 and the temperature at least MIN_TEMPERATURE."""
    if rows.dim() != 2 or labels.shape != rows.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"{function}: rows {tuple(rows.shape)} and labels {tuple(labels.shape)} {labels.dtype}; "
            "expected [N, columns] and [N] int64"
        )
    if not temperature >= MIN_TEMPERATURE:
        raise ValueError(f"{function}: temperature {temperature} must be at least {MIN_TEMPERATURE}")


@custom_op("ppomax::token_logprobs", mutates_args=())
def _forward(
    logits: Tensor, labels: Tensor, temperature: float, tp_group: str | None, vocab_size: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, entropy, row_max, log_sum) [N] each."""
    compute, group = implementation("logprobs", logits, labels), group_of(tp_group)
    shard = compute.shard_statistics(logits, labels, temperature=temperature, **_columns(logits, group, vocab_size))
    return compute.combine_statistics(gather_shards(shard, group), labels, temperature=temperature)


@_forward.register_fake
def _(
    logits: Tensor, labels: Tensor, temperature: float, tp_group: str | None, vocab_size: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    empty = logits.new_empty(labels.shape, dtype=wide_dtype(logits))
    return empty, empty.clone(), empty.clone(), empty.clone()


@custom_op("ppomax::token_logprobs_backward", mutates_args=())
def _backward(
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    tp_group: str | None,
    vocab_size: int | None,
) -> Tensor:
    return implementation("logprobs", logits, labels).logits_gradient(
        logits,
        labels,
        row_max,
        log_sum,
        entropy,
        contiguous(grad_logprobs),
        contiguous(grad_entropy),
        temperature=temperature,
        **_columns(logits, group_of(tp_group), vocab_size),
        out=torch.empty_like(logits, memory_format=torch.contiguous_format),
    )


@_backward.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _columns(logits: Tensor, group: ProcessGroup | None, vocab_size: int | None) -> dict[str, int]:
    first = first_column(logits.shape[1], group)
    return {"first": first, "num_real": num_real_columns(logits.shape[1], first, vocab_size)}


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, *ctx.settings = inputs
    _, entropy, row_max, log_sum = output
    ctx.save_for_backward(logits, labels, row_max, log_sum, entropy)
    ctx.set_materialize_grads(False)


def _propagate(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: None) -> tuple[Any, ...]:
    if grad_logprobs is None and grad_entropy is None:
        return None, None, None, None, None
    return _backward(*ctx.saved_tensors, grad_logprobs, grad_entropy, *ctx.settings), None, None, None, None


_forward.register_autograd(_propagate, setup_context=_save)
