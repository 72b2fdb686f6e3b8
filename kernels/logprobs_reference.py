"""Log-probabilities and entropies in torch: what a rank computes alone, and what it does with everybody's statistics.

With z = logits / temperature and, per shard r, M = max z, S = sum e^(z-M), W = sum e^(z-M) (z-M), T = z_label:
    logp_label = (T - M) - log S,   H = log S - W / S,   log p_v = (z_v - M) - log S,
after every shard's sums are rebased to the common maximum: S <- e^(m-M) S, W <- e^(m-M) (W + S (m-M)).
H is formed from differences z - M, so that it does not lose log-sum-exp's magnitude.
"""

import torch
from torch import Tensor

from ppomax.kernels.numerics import keep, wide

IMPOSSIBLE = -1e30
"""Stands for a logit of -inf: 0 * 1e30 is 0, where 0 * inf would be NaN."""


def scaled_logits(logits: Tensor, labels: Tensor, *, temperature: float, first: int, vocab_size: int | None) -> Tensor:
    """logits / temperature [N, V/tp] in fp32 or wider; 0 in masked rows, IMPOSSIBLE in padding columns and for -inf."""
    z = keep(wide(logits), labels[:, None] >= 0) / temperature
    z = torch.where(z < IMPOSSIBLE, IMPOSSIBLE, z)  # a comparison, not clamp: NaN must survive
    if vocab_size is not None:
        z[:, max(vocab_size - first, 0) :] = IMPOSSIBLE
    return z


def shard_statistics(
    logits: Tensor, labels: Tensor, *, temperature: float, first: int, vocab_size: int | None
) -> Tensor:
    """(M, S, W, T) [4, N] of this rank's columns, from id `first` on; T is IMPOSSIBLE where the label is elsewhere."""
    z = scaled_logits(logits, labels, temperature=temperature, first=first, vocab_size=vocab_size)
    column, is_here = _local_column(z, labels, first)
    label_logit = torch.where(is_here, z.gather(1, column[:, None])[:, 0], IMPOSSIBLE)
    row_max = z.amax(dim=1)
    z -= row_max[:, None]
    e = z.exp()
    return torch.stack((row_max, e.sum(dim=1), (e * z).sum(dim=1), label_logit))


def combine_statistics(shards: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Folds the statistics [tp, 4, N] of all shards into (logprobs, entropy, row_max, log_sum), each [N].

    logprobs and entropy are 0 in masked rows.
    """
    shard_max, shard_sum, shard_weighted, label_logit = shards.unbind(dim=1)  # [tp, N]
    row_max = shard_max.amax(dim=0)
    shift = shard_max - row_max
    total = (shift.exp() * shard_sum).sum(dim=0)
    weighted = (shift.exp() * (shard_weighted + shard_sum * shift)).sum(dim=0)
    log_sum = total.log()
    logprobs = (label_logit.amax(dim=0) - row_max) - log_sum
    is_kept = labels >= 0
    return keep(logprobs, is_kept), keep(log_sum - weighted / total, is_kept), row_max, log_sum


def logits_gradient(
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    *,
    temperature: float,
    first: int,
    vocab_size: int | None,
) -> Tensor:
    """d loss / d logits of this rank's columns [N, V/tp], from g = d loss / d logp and h = d loss / d H (None: 0).

    dx_v = (1 / temperature) (g 1[v = label] - p_v (g + h (log p_v + H))). Needs no other rank.
    """
    is_kept = labels >= 0
    z = scaled_logits(logits, labels, temperature=temperature, first=first, vocab_size=vocab_size)
    column, is_here = _local_column(z, labels, first)
    logp = z.sub_(row_max[:, None]).sub_(log_sum[:, None])
    p = logp.exp()
    g = torch.zeros_like(row_max) if grad_logprobs is None else keep(grad_logprobs, is_kept)
    factor = g[:, None]
    if grad_entropy is not None:
        factor = factor + keep(grad_entropy, is_kept)[:, None] * (logp + entropy[:, None])
    grad = -p * factor
    grad.scatter_add_(1, column[:, None], keep(g, is_here)[:, None])
    if vocab_size is not None:
        grad[:, max(vocab_size - first, 0) :] = 0
    return grad / temperature


def _local_column(z: Tensor, labels: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """(column of each label in this shard, whether it is here), each [N]; column 0 where the label is elsewhere."""
    local = labels - first
    is_here = (labels >= 0) & (local >= 0) & (local < z.shape[1])
    return torch.where(is_here, local, 0), is_here
