"""The few numerical rules that reference kernels share: accumulation type, masking, log-ratios and KL terms."""

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Differences of log-probabilities are clamped to +- this before `exp`: e^20 = 4.9e8 keeps sums finite in fp32."""

SERIES_LIMIT = 0.25
"""Below this |d| the KL terms use a series: exp(d) - 1 - d loses 12 % at d = 1e-3 in fp32."""

SERIES_COEFFICIENTS = tuple(1.0 / factorial for factorial in (2, 6, 24, 120, 720, 5040, 40320))
"""exp(d) - 1 - d = d^2 (1/2! + d/3! + d^2/4! + ...); what is left out is below 4e-10 of the result at SERIES_LIMIT."""


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where one of the tensors has it, else float32: the type that results are computed and returned in."""
    is_double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if is_double else torch.float32


def wide(x: Tensor) -> Tensor:
    """x in the type that results are computed in: fp32, or fp64 where x has it (gradient checks)."""
    return x if x.dtype == torch.float64 else x.float()


def rows_of(x: Tensor) -> Tensor:
    """x [..., columns] as [rows, columns], copied only where the entries of a row are not neighbours in memory."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def keep(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask is True and 0 elsewhere, whatever stands there: a product would let 0 * NaN through."""
    return torch.where(mask, x, 0.0)


def clamped_log_ratio(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """logprobs - other_logprobs, clamped to +- LOG_RATIO_LIMIT."""
    return (logprobs - other_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def exp_remainder(d: Tensor) -> Tensor:
    """exp(d) - 1 - d without cancellation: the k3 estimator of a KL divergence, d the log-ratio (Schulman 2020)."""
    series = torch.full_like(d, SERIES_COEFFICIENTS[-1])
    for coefficient in reversed(SERIES_COEFFICIENTS[:-1]):
        series = series * d + coefficient
    return torch.where(d.abs() < SERIES_LIMIT, d * d * series, d.exp() - 1 - d)


def total(x: Tensor) -> Tensor:
    """Sum over all entries, accumulated in fp64 and returned in the type of x."""
    return x.sum(dtype=torch.float64).to(x.dtype)
