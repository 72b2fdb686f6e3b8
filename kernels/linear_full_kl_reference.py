"""One shard's part of the KL between two distributions, from logits, in torch."""

import torch
from torch import Tensor

from ppomax.kernels.logprobs_reference import possible_logits
from ppomax.kernels.numerics import SERIES_LIMIT, exp_remainder


def kl_terms(
    logits: Tensor,
    ref_logits: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    ref_row_max: Tensor,
    ref_log_sum: Tensor,
    labels: Tensor,
    *,
    num_real: int,
) -> Tensor:
    """sum_v (q_v - p_v - p_v d_v) [N] over the first num_real columns, with d = log q - log p; 0 where labels < 0.

    logits, ref_logits [N, V/tp] of p and q; the others [N]: their normalisers from combine_statistics.
    Over all shards this is KL(p || q): the added sum_v (q_v - p_v) is 0, and makes every term >= 0: p (exp(d) - 1 - d),
    by a series where d is small. A difference of two log-sum-exps would cancel for close distributions.
    """
    logp = possible_logits(logits, labels, num_real).sub_(row_max[:, None]).sub_(log_sum[:, None])
    logq = possible_logits(ref_logits, labels, num_real).sub_(ref_row_max[:, None]).sub_(ref_log_sum[:, None])
    d, p = logq - logp, logp.exp()
    terms = torch.where(d.abs() < SERIES_LIMIT, p * exp_remainder(d.clamp(-1, 1)), logq.exp() - p - p * d)
    return torch.where(labels >= 0, terms.sum(dim=1), 0.0)
