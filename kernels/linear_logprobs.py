"""Log-probabilities straight from hidden states: the vocabulary head is part of the function.

Logits exist in fp32 for a chunk of rows at a time, in the forward and again in the backward pass; they are never
rounded to the type of the weights, which would put errors above 1 % into PPO's ratio. Labels < 0 mask rows, as in
logprobs.py. A loss whose derivative by the log-probabilities is known at once is cheaper by linear_policy_loss.py.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.library import custom_op

from ppomax.kernels.dispatch import implementation
from ppomax.kernels.linear import (
    add_product,
    check_head,
    chunk_size,
    gradient_view,
    kept_rows,
    logits_buffer,
    operand,
    product_into,
    row_chunks,
)
from ppomax.kernels.logprobs import check_rows
from ppomax.kernels.numerics import wide_dtype
from ppomax.kernels.shards import (
    finish_sums,
    first_column,
    gather_shards,
    group_name,
    group_of,
    group_size,
    num_real_columns,
    start_sum,
)


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
    chunk_rows: rows whose logits exist at the same time. Unset: as many as fit linear.CHUNK_BYTES.
    Returns (logprobs [N], entropy [N]) in nats, float32 (float64 for float64 inputs). The gradient of hidden is the
    sum over tp_group (one all-reduce a chunk), that of weight is this rank's; the gradient of the logits is rounded to
    the dtype of hidden before it meets either.
    Every rank of tp_group must call it and its backward. The equations are in logprobs_reference.py.
    Raises ValueError on shapes that do not fit and on a temperature below logprobs.MIN_TEMPERATURE.
    """
    check_rows("linear_logprobs", hidden, labels, temperature)
    check_head("linear_logprobs", hidden, weight)
    chunk = chunk_size("linear_logprobs", chunk_rows, weight)
    arguments = (hidden.contiguous(), weight, labels.contiguous(), temperature, group_name(tp_group), vocab_size, chunk)
    return _forward(*arguments)[:2]


@custom_op("ppomax::linear_logprobs", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float,
    tp_group: str | None,
    vocab_size: int | None,
    chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, entropy, row_max, log_sum) [N] each."""
    compute, group = implementation("logprobs", hidden, weight, labels), group_of(tp_group)
    first = first_column(weight.shape[0], group)
    num_real = num_real_columns(weight.shape[0], first, vocab_size)
    chunks = row_chunks(hidden.shape[0], chunk_rows)
    buffer, columns = logits_buffer(hidden, weight, chunks), operand(weight).T
    parts = [torch.empty(4, 0, dtype=buffer.dtype, device=buffer.device)]
    for rows in chunks:
        logits = product_into(buffer[: rows.stop - rows.start], operand(hidden[rows]), columns)
        parts.append(
            compute.shard_statistics(logits, labels[rows], temperature=temperature, first=first, num_real=num_real)
        )
    return compute.combine_statistics(gather_shards(torch.cat(parts, dim=1), group), labels, temperature=temperature)


@_forward.register_fake
def _(hidden: Tensor, weight: Tensor, labels: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    empty = hidden.new_empty(labels.shape, dtype=wide_dtype(hidden))
    return empty, empty.clone(), empty.clone(), empty.clone()


@custom_op("ppomax::linear_logprobs_backward", mutates_args=())
def _backward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    weight_needed: bool,
    temperature: float,
    tp_group: str | None,
    vocab_size: int | None,
    chunk_rows: int,
) -> tuple[Tensor, Tensor]:
    """(d loss / d hidden, d loss / d weight): with dx = d loss / d logits, dx weight (summed over the group), dx^T
    hidden. The second is empty where it is not needed.
    """
    compute, group = implementation("logprobs", hidden, weight, labels), group_of(tp_group)
    first = first_column(weight.shape[0], group)
    num_real = num_real_columns(weight.shape[0], first, vocab_size)
    chunks = row_chunks(hidden.shape[0], chunk_rows)
    buffer, head = logits_buffer(hidden, weight, chunks), operand(weight)
    grad_hidden = torch.empty_like(hidden, dtype=hidden.dtype if group_size(group) == 1 else buffer.dtype)
    grad_weight = torch.zeros(weight.shape if weight_needed else 0, dtype=buffer.dtype, device=weight.device)
    sums = []
    for rows in chunks:
        inputs = kept_rows(hidden[rows], labels[rows])
        logits = product_into(buffer[: rows.stop - rows.start], operand(inputs), head.T)
        grad_logits = compute.logits_gradient(
            logits,
            labels[rows],
            row_max[rows],
            log_sum[rows],
            entropy[rows],
            grad_logprobs[rows],
            grad_entropy[rows],
            temperature=temperature,
            first=first,
            num_real=num_real,
            out=gradient_view(logits, hidden.dtype),
        )
        # Rows of the head that are padding may hold anything, and 0 * NaN would reach d hidden.
        product_into(grad_hidden[rows], grad_logits[:, :num_real], weight[:num_real])
        sums.append(start_sum(grad_hidden[rows], group))
        if weight_needed:
            add_product(grad_weight, grad_logits.T, inputs)
    finish_sums(sums)
    return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype)


@_backward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    weight_needed: bool,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden), weight.new_empty(weight.shape if weight_needed else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, labels, *ctx.settings = inputs
    _, entropy, row_max, log_sum = output
    ctx.save_for_backward(hidden, weight, labels, row_max, log_sum, entropy)


def _propagate(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor, *_: Tensor) -> tuple[Any, ...]:
    upstream = grad_logprobs.contiguous(), grad_entropy.contiguous()
    weight_needed = ctx.needs_input_grad[1]
    grad_hidden, grad_weight = _backward(*ctx.saved_tensors, *upstream, weight_needed, *ctx.settings)
    return grad_hidden, grad_weight if weight_needed else None, None, None, None, None, None


_forward.register_autograd(_propagate, setup_context=_save)
