"""Sampling by the C kernel on a CPU: one pass over the scores draws, two more add up probabilities.

Penalty, temperature and filters are those of the reference; the noise is the reference's within 1e-6.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ppomax.kernels.native import call
from ppomax.kernels.sampling_reference import combined, filtered, modified
from ppomax.kernels.shards import first_column, num_real_columns


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
        settings = {"temperature": temperature, "repetition_penalty": repetition_penalty}
        scores = modified(logits, **settings, marks=marks, first=first)
        scores[:, num_columns:] = -torch.inf
    if has_filters:
        scores = filtered(scores, top_k=top_k, top_p=top_p, tp_group=tp_group)
    record = torch.empty(len(logits), 7, dtype=torch.float64)
    sizes = (len(logits), num_columns, logits.shape[1], first)
    call("sample", logits, scores.contiguous(), seeds, positions, record, *sizes, int(temperature > 0))
    return combined(record, temperature, tp_group)
