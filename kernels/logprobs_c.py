"""Log-probabilities and entropies by the C kernels, for float32 on a CPU: torch takes a pass for each operation."""

from typing import Any

import torch
from torch import Tensor

from ppomax.kernels import logprobs_reference
from ppomax.kernels.logprobs_reference import combine_statistics as combine_statistics
from ppomax.kernels.native import call


def shard_statistics(logits: Tensor, labels: Tensor, *, temperature: float, first: int, num_real: int) -> Tensor:
    """(M, S, W, T) [4, N] of the first num_real columns of logits [N, V/tp]: see logprobs_reference.py."""
    statistics = torch.empty(4, len(labels))
    sizes = (statistics.stride(0), len(labels), first, num_real)
    call("logprob_statistics", logits, logits.stride(0), labels, statistics, *sizes, temperature)
    return statistics


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
    """Writes d loss / d logits [N, V/tp] into out, which may be logits itself: see logprobs_reference.py."""
    statistics = (row_max, log_sum, entropy)
    if out.dtype != torch.float32:
        shard: dict[str, Any] = {"temperature": temperature, "first": first, "num_real": num_real}
        return logprobs_reference.logits_gradient(
            logits, labels, *statistics, grad_logprobs, grad_entropy, **shard, out=out
        )
    grads = (0 if grad is None else grad for grad in (grad_logprobs, grad_entropy))
    sizes = (*logits.shape, first, num_real)
    rows = (logits, logits.stride(0), labels, *statistics, *grads, out, out.stride(0))
    call("logprob_gradient", *rows, *sizes, temperature)
    return out
