"""Histograms of rewards over the steps of a run on one grid, so that they can be drawn side by side."""

import math
from collections.abc import Sequence
from typing import Any

from ppomax.tools.report_series import main_kind, rounded, split_repeated, stretches
from ppomax.tools.run_folder import Row, finite

NUM_BINS = 40
NUM_COLUMNS = 120
Weighted = list[tuple[float, float, float]]
"""(low, high, count) of the bins of one histogram."""


def reward_histograms(
    records: Sequence[Row], rollouts: dict[int, list[Row]], samples: dict[int, list[Row]]
) -> dict[str, Any] | None:
    """{source, columns: [{from, to, counts}], edges}: the records' reward_histogram {edges, counts}, or where there is
    none the scores of rollouts or of evaluations' samples. None where no step has one.
    """
    kind = main_kind(records)
    rows, _ = split_repeated([row for row in records if row["kind"] == kind])
    found = {row["step"]: bins for row in rows if (bins := _bins(row.get("reward_histogram")))}
    source = "all responses of the rollouts"
    for name, key, others in (
        ("responses written to rollouts/", "score", rollouts),
        ("samples of the held-out evaluations", "reward", samples),
    ):
        if not found:
            source = name
            found = {step: bins for step, rows in others.items() if (bins := _points(rows, key))}
    if not found:
        return None
    used = [(low, high) for bins in found.values() for low, high, count in bins if count > 0]
    low, high = min(low for low, _ in used), max(high for _, high in used)
    narrowest = NUM_BINS * math.ulp(max(abs(low), abs(high)))
    if high - low < narrowest:
        low, high = low - max(0.5, narrowest), high + max(0.5, narrowest)
    width = high / NUM_BINS - low / NUM_BINS
    edges = [low + width * i for i in range(NUM_BINS + 1)]
    steps = sorted(found)
    columns = []
    for start, end in stretches(len(steps), min(NUM_COLUMNS, len(steps))):
        counts = [0.0] * NUM_BINS
        for step in steps[start:end]:
            _add(counts, found[step], low, width)
        columns.append({"from": steps[start], "to": steps[end - 1], "counts": [rounded(count) for count in counts]})
    return {"source": source, "edges": [rounded(edge) for edge in edges], "columns": columns}


def _bins(histogram: Any) -> Weighted:
    """The bins of a record's histogram; empty where it is not one."""
    if not isinstance(histogram, dict):
        return []
    edges, counts = histogram.get("edges"), histogram.get("counts")
    if not isinstance(edges, list) or not isinstance(counts, list) or len(edges) != len(counts) + 1:
        return []
    limits = [x for edge in edges if (x := finite(edge)) is not None]
    numbers = [x for count in counts if (x := finite(count)) is not None and x >= 0]
    if len(limits) != len(edges) or len(numbers) != len(counts) or sorted(limits) != limits or not any(numbers):
        return []
    return list(zip(limits, limits[1:], numbers, strict=False))


def _points(rows: Sequence[Row], key: str) -> Weighted:
    values = [value for row in rows if (value := finite(row.get(key))) is not None]
    return [(value, value, 1.0) for value in values]


def _add(counts: list[float], bins: Weighted, low: float, width: float) -> None:
    """Spreads each bin evenly over those of the grid, which begins at `low`, that it covers."""
    for start, end, count in bins:
        if count == 0:
            continue
        first = min(len(counts) - 1, max(0, int(start / width - low / width)))
        last = min(len(counts) - 1, max(first, int(end / width - low / width)))
        for i in range(first, last + 1):
            covered = min(end, low + (i + 1) * width) - max(start, low + i * width)
            counts[i] += count if first == last else count * max(0.0, covered) / (end - start)
