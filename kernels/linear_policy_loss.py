"""PPO's policy loss, entropy bonus and a language-model loss straight from hidden states, gradients formed at once.

The derivative of these losses by a log-probability is known as soon as the log-probability is. So each chunk of logits
becomes its gradient in place and meets hidden states and weight in the same pass: three products of 2 N H V operations,
where a differentiable log-probability computes the logits again in its backward pass (four).
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.library import custom_op

from ppomax.kernels.attach import with_gradients
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
from ppomax.kernels.numerics import contiguous, keep, total, wide_dtype
from ppomax.kernels.policy_loss import Clip, policy_settings
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
from ppomax.kernels.whiten import Moments

NUM_SCALARS = 8


class LinearLoss(NamedTuple):
    """Scalars on the device, sums over the weights; loss alone carries a gradient: surrogate - entropy_coef * entropy +
    lm_loss.

    surrogate: the policy loss itself. clip_fraction, approx_kl, mean_ratio, dual_clip_fraction: as in
    policy_loss.PolicyLoss. entropy: nats. lm_loss: weighted negative log-likelihood, nats. logprobs [N], nats.
    """

    loss: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor
    mean_ratio: Tensor
    dual_clip_fraction: Tensor
    surrogate: Tensor
    entropy: Tensor
    lm_loss: Tensor
    logprobs: Tensor


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
    importance_weights: Tensor | None = None,
    moments: Moments | None = None,
    advantage_clip: float | None = None,
    objective: Literal["clip", "penalty"] = "clip",
    penalty_beta: float = 0.0,
    lm_weights: Tensor | None = None,
    main_grad: Tensor | None = None,
    sum_hidden_grad: bool = True,
    tp_group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
) -> LinearLoss:
    """policy_loss of linear_logprobs, minus entropy_coef times the weighted sum of entropies, plus -lm_weights * logp.

    hidden [N, H], weight [V/tp, H], labels [N], tp_group, vocab_size, chunk_rows: as in linear_logprobs.
    old_logprobs, advantages, weights, importance_weights [N], moments, clip, dual_clip, advantage_clip, objective,
    penalty_beta: as in policy_loss. lm_weights [N] float: weight of a row in the language-model loss; unset: 0.
    entropy_coef may be negative (a penalty on entropy). A row with a label < 0, or whose weights are both 0, is not
    read.
    main_grad [V/tp, H] float, contiguous: the gradient of weight is added to it at once, in the forward pass, and
    autograd gives weight none; the derivative by the loss must then be 1 (it is checked). Unset: autograd gives weight
    its gradient.
    sum_hidden_grad: False leaves this rank's part of the gradient of hidden, for a caller that sums it over tp_group
    itself (sequence parallelism: by a reduce-scatter).
    Gradients of logits are rounded to the dtype of hidden; statistics and losses are fp32 (fp64 for fp64 inputs).
    Every rank of tp_group must call it: one all-gather of 16 bytes a row and one all-reduce of [chunk, H] a chunk.
    Raises ValueError on shapes that do not fit, and as policy_loss does.
    """
    check_rows("linear_policy_loss", hidden, labels, 1.0)
    check_head("linear_policy_loss", hidden, weight)
    rows = {"old_logprobs": old_logprobs, "advantages": advantages, "weights": weights, "lm_weights": lm_weights}
    _check_vectors("linear_policy_loss", labels, rows | {"importance_weights": importance_weights}, weight, main_grad)
    settings = policy_settings(
        clip=clip,
        dual_clip=dual_clip,
        advantage_clip=advantage_clip,
        objective=objective,
        penalty_beta=penalty_beta,
    )
    dtype = wide_dtype(hidden)
    constants = [None if x is None else x.detach().to(dtype) for x in (*rows.values(), importance_weights)]
    if main_grad is not None and not torch.is_grad_enabled():
        raise ValueError("linear_policy_loss: main_grad would get a gradient although gradients are turned off")
    scalars, logprobs, grad_hidden, grad_weight = _loss_and_gradients(
        hidden.detach().contiguous(),
        weight.detach(),
        labels.contiguous(),
        *map(contiguous, constants),
        list(moments or ()),
        entropy_coef,
        settings.ratio_min,
        settings.ratio_max,
        settings.dual_clip,
        settings.advantage_clip,
        settings.penalty_beta,
        main_grad,
        sum_hidden_grad,
        group_name(tp_group),
        vocab_size,
        chunk_size("linear_policy_loss", chunk_rows, weight),
    )
    if main_grad is None:
        loss = with_gradients(scalars[0], [hidden, weight], [grad_hidden, grad_weight])
    else:
        loss = with_gradients(scalars[0], [hidden], [grad_hidden], upstream_is_one=True)
    _, clip_fraction, approx_kl, mean_ratio, dual_clip_fraction, surrogate, entropy, lm_loss = scalars.unbind()
    return LinearLoss(
        loss, clip_fraction, approx_kl, mean_ratio, dual_clip_fraction, surrogate, entropy, lm_loss, logprobs
    )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    main_grad: Tensor | None = None,
    sum_hidden_grad: bool = True,
    tp_group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Weighted sum of negative log-likelihoods, a scalar, nats: supervised training that stores no logits.

    weights [N] float: 1 / global number of learned tokens, or 0. Everything else: as in linear_policy_loss.
    """
    nothing = torch.zeros_like(weights)
    return linear_policy_loss(
        hidden,
        weight,
        labels,
        nothing,
        nothing,
        nothing,
        clip=None,
        lm_weights=weights,
        main_grad=main_grad,
        sum_hidden_grad=sum_hidden_grad,
        tp_group=tp_group,
        vocab_size=vocab_size,
        chunk_rows=chunk_rows,
    ).loss


def _check_vectors(
    function: str, labels: Tensor, vectors: dict[str, Tensor | None], weight: Tensor, main_grad: Tensor | None
) -> None:
    shapes = {name: tuple(x.shape) for name, x in vectors.items() if x is not None and x.shape != labels.shape}
    if shapes:
        raise ValueError(f"{function}: {shapes}; expected {tuple(labels.shape)}, one entry per row of hidden")
    if main_grad is not None and main_grad.shape != weight.shape:
        raise ValueError(f"{function}: main_grad {tuple(main_grad.shape)} must have weight's {tuple(weight.shape)}")


@custom_op("ppomax::linear_policy_loss", mutates_args={"main_grad"})
def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    lm_weights: Tensor | None,
    importance_weights: Tensor | None,
    moments: list[Tensor],
    entropy_coef: float,
    ratio_min: float,
    ratio_max: float,
    dual_clip: float,
    advantage_clip: float,
    penalty_beta: float | None,
    main_grad: Tensor | None,
    sum_hidden_grad: bool,
    tp_group: str | None,
    vocab_size: int | None,
    chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(scalars of LinearLoss, logprobs [N], d loss / d hidden, d loss / d weight unless it is added to main_grad)."""
    group = group_of(tp_group)
    first = first_column(weight.shape[0], group)
    num_real = num_real_columns(weight.shape[0], first, vocab_size)
    shard: dict[str, Any] = {"temperature": 1.0, "first": first, "num_real": num_real}
    rows_of_logits = implementation("logprobs", hidden, weight, labels)
    policy = implementation("policy_loss", hidden, old_logprobs, advantages, weights, importance_weights, *moments)
    settings = {
        "ratio_min": ratio_min,
        "ratio_max": ratio_max,
        "dual_clip": dual_clip,
        "advantage_clip": advantage_clip,
        "penalty_beta": penalty_beta,
        "shift_mean": True,
        "unbiased": False,
        "whiten_eps": 1e-6,
    }

    chunks = row_chunks(hidden.shape[0], chunk_rows)
    buffer, head = logits_buffer(hidden, weight, chunks), operand(weight)
    learned = weights != 0 if lm_weights is None else (weights != 0) | (lm_weights != 0)
    labels = torch.where(learned, labels, -1)
    weights = keep(weights, labels >= 0)
    lm_weights = None if lm_weights is None else keep(lm_weights, labels >= 0)
    logprobs, entropy = (torch.empty(labels.shape, dtype=buffer.dtype, device=buffer.device) for _ in range(2))
    grad_hidden = torch.empty_like(hidden, dtype=hidden.dtype if group_size(group) == 1 else buffer.dtype)
    grad_weight = main_grad
    if grad_weight is None:
        grad_weight = torch.zeros(weight.shape, dtype=buffer.dtype, device=weight.device)
    sums = []
    for rows in chunks:
        inputs = kept_rows(hidden[rows], labels[rows])
        logits = product_into(buffer[: rows.stop - rows.start], operand(inputs), head.T)
        statistics = gather_shards(rows_of_logits.shard_statistics(logits, labels[rows], **shard), group)
        logprobs[rows], entropy[rows], row_max, log_sum = rows_of_logits.combine_statistics(
            statistics, labels[rows], temperature=1.0
        )
        vectors = (logprobs, old_logprobs, advantages, weights, importance_weights)
        _, grad = policy.policy_loss(*(None if x is None else x[rows] for x in vectors), moments, **settings)
        grad_logits = rows_of_logits.logits_gradient(
            logits,
            labels[rows],
            row_max,
            log_sum,
            entropy[rows],
            grad if lm_weights is None else grad - lm_weights[rows],
            None if entropy_coef == 0 else weights[rows] * -entropy_coef,
            **shard,
            out=gradient_view(logits, hidden.dtype),
        )
        # Rows of the head that are padding may hold anything, and 0 * NaN would reach d hidden.
        product_into(grad_hidden[rows], grad_logits[:, :num_real], weight[:num_real])
        sums.append(start_sum(grad_hidden[rows], group if sum_hidden_grad else None))
        add_product(grad_weight, grad_logits.T, inputs)
    finish_sums(sums)

    # Once more over all tokens, so that the sums do not depend on the size of a chunk.
    scalars, _ = policy.policy_loss(
        logprobs, old_logprobs, advantages, weights, importance_weights, moments, **settings
    )
    mean_entropy = total(weights * entropy)
    lm_loss = torch.zeros_like(mean_entropy) if lm_weights is None else -total(lm_weights * logprobs)
    loss = scalars[0] - entropy_coef * mean_entropy + lm_loss
    scalars = torch.cat((loss[None], scalars[1:], scalars[:1], mean_entropy[None], lm_loss[None]))
    own_grad_weight = weight.new_empty(0) if main_grad is not None else grad_weight.to(weight.dtype)
    return scalars, logprobs, grad_hidden.to(hidden.dtype), own_grad_weight


@_loss_and_gradients.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    lm_weights: Tensor | None,
    importance_weights: Tensor | None,
    moments: list[Tensor],
    entropy_coef: float,
    ratio_min: float,
    ratio_max: float,
    dual_clip: float,
    advantage_clip: float,
    penalty_beta: float | None,
    main_grad: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = wide_dtype(hidden)
    own_grad_weight = weight.new_empty(weight.shape if main_grad is None else 0)
    return (
        hidden.new_empty(NUM_SCALARS, dtype=dtype),
        hidden.new_empty(labels.shape, dtype=dtype),
        torch.empty_like(hidden),
        own_grad_weight,
    )
