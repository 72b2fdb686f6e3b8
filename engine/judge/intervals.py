"""How sure a measured share or mean is: Wilson intervals, a seeded bootstrap, the sign test."""

import math
from statistics import NormalDist

import torch
from torch import Tensor

LEVEL = 0.95
"""Of every interval."""
NUM_DRAWS = 2000
"""Resamples of a bootstrap: its limits move by about a fiftieth of their distance from one seed to another."""
DRAWS_AT_ONCE = 4_000_000
"""Numbers drawn in one piece, so that memory does not grow with the data."""


def wilson(count: int, total: int) -> tuple[float, float]:
    """Wilson's score interval of a share count / total (E. B. Wilson, 1927); (0, 1) where nothing was counted."""
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    share = count / total
    center = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    low, high = max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)
    # Exact where rounding would leave 1e-18 between the limit and the end.
    return (0.0 if count == 0 else low), (1.0 if count == total else high)


def bootstrap_mean(values: Tensor, *, seed: int) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean of values [N]; None below two values, which have no spread."""
    if len(values) < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    values = values.double().cpu()
    at_once = max(1, DRAWS_AT_ONCE // len(values))
    means = []
    for first in range(0, NUM_DRAWS, at_once):
        size = (min(at_once, NUM_DRAWS - first), len(values))
        means.append(values[torch.randint(len(values), size, generator=generator)].mean(1))
    tail = (1 - LEVEL) / 2
    low, high = torch.cat(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of at least so uneven a split, were wins and losses equally likely; ties are left out."""
    total, extreme = wins + losses, max(wins, losses)
    if total == 0:
        return 1.0
    log_half = total * math.log(2)
    log_total = math.lgamma(total + 1)
    terms = (
        math.exp(log_total - math.lgamma(k + 1) - math.lgamma(total - k + 1) - log_half)
        for k in range(extreme, total + 1)
    )
    return min(1.0, 2 * math.fsum(terms))
