"""Log-probabilities and entropies in torch: what a rank computes alone, and what it does with everybody's statistics.

With logits x and temperature t, each shard has M = max x, S = sum e^((x-M)/t), W = sum e^((x-M)/t) (x-M)/t and
T = x_label. After every shard's sums are rebased from its own maximum m to the common M, with d = (m - M)/t,
    S <- e^d S,  W <- e^d (W + S d):
    logp_label = (T - M)/t - log S,   H = log S - W / S,   log p_v = (x_v - M)/t - log S.
Everything is formed from differences x - M, so that large logits lose nothing.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ppomax.kernels.numerics import keep, wide, wide_dtype

IMPOSSIBLE = -1e30
"""Stands for a logit of -inf: 0 * 1e30 is 0, where 0 * inf would be NaN."""

CHUNK_ENTRIES = 2**22
"""Logits that are worked on at a time, so that no second copy of all of them exists: 16 MiB in fp32."""


def shard_statistics(logits: Tensor, labels: Tensor, *, temperature: float, first: int, num_real: int) -> Tensor:
    """(M, S, W, T) [4, N] of the first num_real columns of logits [N, V/tp]; T is IMPOSSIBLE where the label is
    elsewhere. first: global id of column 0. The rows of labels < 0 are not read and get anything finite.
    """
    statistics = torch.empty(4, *labels.shape, dtype=wide_dtype(logits), device=logits.device)
    for rows in _row_chunks(logits):
        _shard_statistics(logits[rows], labels[rows], temperature, first, num_real, statistics[:, rows])
    return statistics


def _shard_statistics(
    logits: Tensor, labels: Tensor, temperature: float, first: int, num_real: int, out: Tensor
) -> None:
    if num_real == 0:
        out[0], out[1:3], out[3] = IMPOSSIBLE, 0, IMPOSSIBLE
        return
    z = possible_logits(logits, labels, num_real)
    column, is_here = _label_column(labels, first, num_real)
    out[3] = torch.where(is_here, z.gather(1, column[:, None])[:, 0], IMPOSSIBLE)
    out[0] = z.amax(dim=1)
    z.sub_(out[0][:, None]).div_(temperature)
    e = z.exp()
    out[1] = e.sum(dim=1)
    out[2] = e.mul_(z).sum(dim=1)


def possible_logits(logits: Tensor, labels: Tensor, num_real: int) -> Tensor:
    """The first num_real columns in fp32 or wider, a new tensor: 0 in masked rows, IMPOSSIBLE for -inf."""
    z = keep(wide(logits[:, :num_real]), labels[:, None] >= 0)
    return z.clamp_(min=IMPOSSIBLE)  # NaN stays NaN


def combine_statistics(shards: Tensor, labels: Tensor, *, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Folds the statistics [tp, 4, N] of all shards into (logprobs, entropy, row_max, log_sum), each [N].

    logprobs and entropy are 0 in masked rows.
    """
    shard_max, shard_sum, shard_weighted, label_logit = shards.unbind(dim=1)  # [tp, N]
    row_max = shard_max.amax(dim=0)
    shift = (shard_max - row_max) / temperature
    total = (shift.exp() * shard_sum).sum(dim=0)
    weighted = (shift.exp() * (shard_weighted + shard_sum * shift)).sum(dim=0)
    log_sum = total.log()
    logprobs = (label_logit.amax(dim=0) - row_max) / temperature - log_sum
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
    num_real: int,
    out: Tensor,
) -> Tensor:
    """Writes d loss / d logits of this rank's columns [N, V/tp] into out and returns it; out may be logits itself.

    With g = d loss / d logp and h = d loss / d H (None: 0): dx_v = (g 1[v = label] - p_v (g + h (log p_v + H))) / t.
    0 in masked rows and in the columns from num_real on. Needs no other rank.
    """
    for rows in _row_chunks(logits):
        z = possible_logits(logits[rows], labels[rows], num_real)
        logp = z.sub_(row_max[rows, None]).div_(temperature).sub_(log_sum[rows, None])
        column, is_here = _label_column(labels[rows], first, num_real)
        is_kept = labels[rows] >= 0
        g = torch.zeros_like(row_max[rows]) if grad_logprobs is None else keep(wide(grad_logprobs[rows]), is_kept)
        grad = logp.exp()
        if grad_entropy is None:
            grad.mul_(-g[:, None])
        else:
            h = keep(wide(grad_entropy[rows]), is_kept)
            grad.mul_(logp.add_(entropy[rows, None]).mul_(h[:, None]).add_(g[:, None])).neg_()
        if num_real > 0:
            grad.scatter_add_(1, column[:, None], keep(g, is_here)[:, None])
        out[rows, :num_real] = grad.div_(temperature)
        out[rows, num_real:] = 0
    return out


def _label_column(labels: Tensor, first: int, num_real: int) -> tuple[Tensor, Tensor]:
    """(column of each label in this shard, whether it is here), each [N]; column 0 where the label is elsewhere."""
    local = labels - first
    is_here = (labels >= 0) & (local >= 0) & (local < num_real)
    return torch.where(is_here, local, 0), is_here


def _row_chunks(logits: Tensor) -> Iterator[slice]:
    """Slices of rows with about CHUNK_ENTRIES entries each."""
    size = max(1, CHUNK_ENTRIES // max(1, logits.shape[1]))
    for start in range(0, logits.shape[0], size):
        yield slice(start, start + size)
