"""Sampling by the C kernel on a CPU: one pass over the scores draws, two more add up probabilities.

Penalty, temperature and filters are those of the reference; the noise is the reference's within 1e-6.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ppomax.kernels.native import call
from ppomax.kernels.sampling_reference import TOP_P_BITS, combined, filtered, share_word
from ppomax.kernels.shards import first_column, group_size, num_real_columns


@torch.no_grad()
def sample(
    logits: Tensor,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    repetition_penalty: float,
    marks: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
    vocab_size: int,
    tp_group: ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ppomax.kernels.sampling; logits [R, V/tp] are this rank's, in any type."""
    first = first_column(logits.shape[1], tp_group)
    num_columns = num_real_columns(logits.shape[1], first, vocab_size)
    logits = scores = logits.float().contiguous()
    has_filters = temperature > 0 and (top_k > 0 or top_p < 1)
    if marks is not None or temperature not in (0, 1) or has_filters:
        scores = torch.empty(logits.shape)
        own_marks = None if marks is None else marks[:, first:]
        flags = (0, 0) if own_marks is None else (own_marks, own_marks.stride(0))
        shape = (len(logits), num_columns, logits.shape[1])
        call("modify", logits, *flags, scores, *shape, repetition_penalty, temperature)
    if has_filters and group_size(tp_group) == 1:
        part = share_word(top_p) if top_p < 1 else 1 << TOP_P_BITS
        space = torch.empty(torch.get_num_threads(), 2, num_columns, dtype=torch.int64)
        call("filter_scores", scores, space, len(scores), num_columns, scores.stride(0), top_k, part)
    elif has_filters:
        scores = filtered(scores, top_k=top_k, top_p=top_p, tp_group=tp_group)
    record = torch.empty(len(logits), 7, dtype=torch.float64)
    sizes = (len(logits), num_columns, logits.shape[1], first)
    call("sample", logits, scores.contiguous(), seeds, positions, record, *sizes, int(temperature > 0))
    return combined(record, temperature, tp_group)
