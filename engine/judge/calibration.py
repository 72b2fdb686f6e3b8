"""How good a reward model is on preference pairs: accuracy, calibration, and what the length of a response buys.

Margins are score of the chosen minus score of the rejected response. The model gives the response that it prefers the
probability sigmoid(|margin|) (Eq. 1), which is at least 1/2: its confidence, which calibration compares with how often
it is right.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ppomax.engine.judge.intervals import LEVEL, wilson

NUM_CONFIDENCE_BINS = 10
"""Equal bins of the confidence from 1/2 to 1."""
NUM_LENGTH_BINS = 5
"""Bins of the length difference with about equally many pairs."""
NUM_MARGIN_BINS = 20


def describe_margins(margins: Tensor, length_differences: Tensor, categories: Sequence[str]) -> dict[str, Any]:
    """Everything that results.json of `ppomax evaluate-reward` says of pairs.

    margins [P] float; length_differences [P] int: tokens of the chosen minus those of the rejected response.
    """
    margins = margins.double().cpu()
    names = dict.fromkeys(category for category in categories if category)
    return {
        "level": LEVEL,
        **accuracy(margins),
        "categories": {
            name: accuracy(margins[torch.tensor([category == name for category in categories])]) for name in names
        },
        "log_loss": float(-logsigmoid(margins).mean()),
        "calibration": calibration(margins),
        "histogram": histogram(margins),
        "length": length_bias(margins, length_differences.cpu()),
    }


def accuracy(margins: Tensor) -> dict[str, Any]:
    """Share of positive margins with its interval; margins of 0 count as wrong, and apart."""
    right, total = int((margins > 0).sum()), len(margins)
    return {
        "num_pairs": total,
        "accuracy": right / total,
        "accuracy_interval": list(wilson(right, total)),
        "num_equal": int((margins == 0).sum()),
        "margin_mean": float(margins.mean()),
        "margin_std": float(margins.std()) if total > 1 else 0.0,
    }


def calibration(margins: Tensor) -> dict[str, Any]:
    """Reliability bins and the expected calibration error: the mean of |accuracy - confidence| of the bins, weighted by
    their pairs (Guo et al. 2017). A margin of 0 is right half of the time.
    """
    confidence = margins.abs().sigmoid()
    right = (margins > 0).double() + 0.5 * (margins == 0).double()
    place = ((confidence - 0.5) * 2 * NUM_CONFIDENCE_BINS).long().clamp(max=NUM_CONFIDENCE_BINS - 1)
    bins = []
    error = 0.0
    for number in range(NUM_CONFIDENCE_BINS):
        is_in = place == number
        count = int(is_in.sum())
        low = 0.5 + number / (2 * NUM_CONFIDENCE_BINS)
        row: dict[str, Any] = {"from": low, "to": low + 1 / (2 * NUM_CONFIDENCE_BINS), "num_pairs": count}
        if count:
            row["confidence"], row["accuracy"] = float(confidence[is_in].mean()), float(right[is_in].mean())
            error += count / len(margins) * abs(row["accuracy"] - row["confidence"])
        bins.append(row)
    return {"expected_calibration_error": error, "bins": bins}


def histogram(margins: Tensor) -> dict[str, list[float]]:
    """Counts of the margins in equal bins, and the edges of these (Fig. 2)."""
    finite = margins[margins.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts, edges = torch.histogram(finite, bins=NUM_MARGIN_BINS, range=(low, high))
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def length_bias(margins: Tensor, differences: Tensor) -> dict[str, Any]:
    """Accuracy by how much longer the chosen response is, and how often the model and the people prefer the longer one.

    Where lengths tell nothing, accuracy is the same in all bins and prefers_longer is near longer_is_chosen.
    correlation: Pearson's, of margin and length difference; null where one of them does not vary.
    """
    differences = differences.double()
    inner = torch.arange(1, NUM_LENGTH_BINS, dtype=torch.float64) / NUM_LENGTH_BINS
    edges = differences.quantile(inner).unique()
    place = torch.bucketize(differences, edges)
    bins = []
    for number in range(len(edges) + 1):
        is_in = place == number
        count, right = int(is_in.sum()), int((margins[is_in] > 0).sum())
        if count:
            bins.append(
                {
                    "from": int(differences[is_in].min()),
                    "to": int(differences[is_in].max()),
                    "num_pairs": count,
                    "accuracy": right / count,
                    "accuracy_interval": list(wilson(right, count)),
                }
            )
    differ = differences != 0
    total = int(differ.sum())
    longer = int(((margins > 0) == (differences > 0))[differ & (margins != 0)].sum())
    chosen = int((differences > 0).sum())
    varies = len(margins) > 1 and float(margins.std()) > 0 and float(differences.std()) > 0
    return {
        "bins": bins,
        "num_of_different_length": total,
        "prefers_longer": longer / total if total else None,
        "prefers_longer_interval": list(wilson(longer, total)) if total else None,
        "longer_is_chosen": chosen / total if total else None,
        "correlation": float(torch.corrcoef(torch.stack([margins, differences]))[0, 1]) if varies else None,
    }
