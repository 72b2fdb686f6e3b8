"""logprobs_reference.py applied to hidden @ weight.T, a chunk of rows at a time, all in fp32 (fp64 for fp64 inputs)."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ppomax.kernels import logprobs_reference
from ppomax.kernels.logprobs_reference import combine_statistics, scaled_logits
from ppomax.kernels.numerics import SERIES_LIMIT, exp_remainder, keep, wide
from ppomax.kernels.shards import first_column, gather_shards, sum_shards

__all__ = ["combine_statistics", "full_kl", "gradients", "shard_statistics"]


def shard_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    first: int,
    vocab_size: int | None,
    chunk_rows: int,
) -> Tensor:
    """(M, S, W, T) of this rank's columns for every row: [4, N]."""
    columns = wide(weight).T
    parts = [
        logprobs_reference.shard_statistics(
            _rows(hidden, labels, rows) @ columns,
            labels[rows],
            temperature=temperature,
            first=first,
            vocab_size=vocab_size,
        )
        for rows in _chunks(hidden.shape[0], chunk_rows)
    ]
    return torch.cat(parts, dim=1)


def gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    *,
    hidden_needed: bool,
    weight_needed: bool,
    temperature: float,
    first: int,
    vocab_size: int | None,
    chunk_rows: int,
) -> tuple[Tensor | None, Tensor | None]:
    """(d loss / d hidden [N, H] of this rank's columns, d loss / d weight [V/tp, H]), fp32; None where not needed.

    With dx = d loss / d logits: d hidden = dx weight, to be summed over the group, and d weight = dx^T hidden.
    """
    full_weight = wide(weight)
    grad_hidden = torch.zeros_like(wide(hidden)) if hidden_needed else None
    grad_weight = torch.zeros_like(full_weight) if weight_needed else None
    # Rows of the head that are padding may hold anything, and 0 * NaN would reach d hidden.
    real = None if vocab_size is None else max(vocab_size - first, 0)
    for rows in _chunks(hidden.shape[0], chunk_rows):
        inputs = _rows(hidden, labels, rows)
        grad_logits = logprobs_reference.logits_gradient(
            inputs @ full_weight.T,
            labels[rows],
            row_max[rows],
            log_sum[rows],
            entropy[rows],
            grad_logprobs[rows],
            grad_entropy[rows],
            temperature=temperature,
            first=first,
            vocab_size=vocab_size,
        )
        if grad_hidden is not None:
            torch.mm(grad_logits[:, :real], full_weight[:real], out=grad_hidden[rows])
        if grad_weight is not None:
            grad_weight.addmm_(grad_logits.T, inputs)
    return grad_hidden, grad_weight


def full_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    rows_mask: Tensor,
    *,
    tp_group: ProcessGroup | None,
    vocab_size: int | None,
    chunk_rows: int,
) -> Tensor:
    """KL(p || q) [N] of whole distributions, as sum_v (q_v - p_v - p_v d_v) with d = log q - log p.

    The added sum_v (q_v - p_v) is 0, and makes every term >= 0: p (exp(d) - 1 - d), by a series where d is small. A
    difference of two log-sum-exps would cancel for close distributions. Collectives: one all-gather a chunk, one
    all-reduce.
    """
    labels = torch.where(rows_mask, 0, -1)
    first = first_column(weight.shape[0], tp_group)
    columns, ref_columns = wide(weight).T, wide(ref_weight).T
    parts = []
    for rows in _chunks(hidden.shape[0], chunk_rows):
        both = (_rows(hidden, labels, rows) @ columns, _rows(ref_hidden, labels, rows) @ ref_columns)
        logp, logq = _log_distributions(both, labels[rows], first=first, tp_group=tp_group, vocab_size=vocab_size)
        d, p = logq - logp, logp.exp()
        terms = torch.where(d.abs() < SERIES_LIMIT, p * exp_remainder(d.clamp(-1, 1)), logq.exp() - p - p * d)
        parts.append(terms.sum(dim=1))
    return keep(sum_shards(torch.cat(parts), tp_group), rows_mask)


def _log_distributions(
    logits: tuple[Tensor, Tensor], labels: Tensor, *, first: int, tp_group: ProcessGroup | None, vocab_size: int | None
) -> list[Tensor]:
    """The log-probabilities of this rank's columns [rows, V/tp] for each of the logits; one all-gather for both."""
    prepared = [scaled_logits(x, labels, temperature=1.0, first=first, vocab_size=vocab_size) for x in logits]
    statistics = [
        logprobs_reference.shard_statistics(x, labels, temperature=1.0, first=first, vocab_size=vocab_size)
        for x in logits
    ]
    shards = gather_shards(torch.stack(statistics), tp_group)  # [tp, 2, 4, rows]
    result = []
    for z, shard in zip(prepared, shards.unbind(dim=1), strict=True):
        _, _, row_max, log_sum = combine_statistics(shard, labels)
        result.append(z - row_max[:, None] - log_sum[:, None])
    return result


def _rows(hidden: Tensor, labels: Tensor, rows: slice) -> Tensor:
    """These rows of hidden in fp32 or wider, masked ones 0: NaN there would reach d weight."""
    return keep(wide(hidden[rows]), labels[rows, None] >= 0)


def _chunks(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    """Consecutive slices of at most chunk_rows rows that cover num_rows; one empty slice when there are none."""
    for start in range(0, max(num_rows, 1), chunk_rows):
        yield slice(start, min(start + chunk_rows, num_rows))
