"""One shard's part of the KL between two distributions in Triton: one program a row reads both rows of logits once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppomax.kernels.logprobs_triton import IMPOSSIBLE
from ppomax.kernels.numerics_triton import SERIES_LIMIT, accumulation_type, exp_remainder

BLOCK = 2048


@triton.jit
def _kl_terms_kernel(
    P,
    stride_p,
    Q,
    stride_q,
    ROW_MAX,
    LOG_SUM,
    REF_ROW_MAX,
    REF_LOG_SUM,
    LABELS,
    OUT,
    num_real,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(LABELS + row) < 0:
        tl.store(OUT + row, 0.0)
        return
    P += row * stride_p
    Q += row * stride_q
    row_max = tl.load(ROW_MAX + row)
    log_sum = tl.load(LOG_SUM + row)
    ref_row_max = tl.load(REF_ROW_MAX + row)
    ref_log_sum = tl.load(REF_LOG_SUM + row)
    sums = tl.zeros((BLOCK,), dtype=ACC)
    for start in range(0, num_real, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < num_real
        x = tl.load(P + column, mask=inside, other=0.0).to(ACC)
        y = tl.load(Q + column, mask=inside, other=0.0).to(ACC)
        x = tl.maximum(x, IMPOSSIBLE, propagate_nan=tl.PropagateNan.ALL)
        y = tl.maximum(y, IMPOSSIBLE, propagate_nan=tl.PropagateNan.ALL)
        logp = (x - row_max) - log_sum
        logq = (y - ref_row_max) - ref_log_sum
        d = logq - logp
        p = tl.exp(logp)
        is_small = tl.abs(d) < SERIES_LIMIT
        terms = tl.where(is_small, p * exp_remainder(tl.where(is_small, d, 0.0)), tl.exp(logq) - p - p * d)
        sums += tl.where(inside, terms, 0.0)
    tl.store(OUT + row, tl.sum(sums, axis=0))


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
    """See linear_full_kl_reference.kl_terms."""
    N = labels.shape[0]
    out = torch.empty_like(row_max)
    if N > 0:
        block = min(BLOCK, triton.next_power_of_2(logits.shape[1]))
        _kl_terms_kernel[(N,)](
            logits,
            logits.stride(0),
            ref_logits,
            ref_logits.stride(0),
            row_max,
            log_sum,
            ref_row_max,
            ref_log_sum,
            labels,
            out,
            num_real,
            BLOCK=block,
            ACC=accumulation_type(logits),
            num_warps=8 if block >= BLOCK else 4,
        )
    return out
