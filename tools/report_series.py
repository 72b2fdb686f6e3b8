"""Records of a run as curves: what was done again is set apart, long curves are thinned, metrics are put into groups.

Everything here is bounded, whatever the length of the run: a curve has at most MAX_POINTS points.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

from ppomax.tools.run_folder import Row, finite

MAX_POINTS = 600
"""Of a curve. Longer ones show the mean, the lowest and the highest value of MAX_POINTS / 2 stretches."""
MAX_OLD = 8
"""Stretches of steps that were done again and are still shown."""
MAX_METRICS = 400
DIGITS = 6

GROUPS = (
    ("Reward", r"reward|score|gold|accuracy|difference|win_rate|margin"),
    ("KL and drift", r"kl|sampler_|ratio|clip_fraction|effective_sample|token_mult"),
    ("Response", r"response|finished|eos|truncated|repet|distinct|longest|length|tokens|carried|dropped"),
    ("Language", r"perplexity|entropy|nll|logprob"),
    ("Value and advantage", r"value|return|advantage|explained"),
    ("Loss", r"loss|objective"),
    ("Optimizer", r"grad|learning_rate|norm|skipped|batch|epochs|steps"),
    ("Time and memory", r"seconds|per_second|mfu|memory|_gib|bytes"),
)
"""Title of a group, and what the names of its metrics contain."""
SEARCH = (
    *("Time and memory", "Loss", "Language", "KL and drift", "Value and advantage", "Response", "Reward", "Optimizer"),
)
"""A metric goes into the first of these that fits."""
OTHER = "Other"
OVERVIEW = (
    *("reward", "kl", "perplexity", "response_length", "entropy", "truncated", "policy_loss", "value_loss"),
    *("explained_variance", "loss", "accuracy"),
)
"""Shown first. The paper: reward and losses look fine while a policy collapses; KL, perplexity and length tell."""
UNITS = (
    (r"kl_coef", ""),
    (r"per_second", "per second"),
    (r"seconds", "seconds"),
    (r"_gib$", "GiB"),
    (r"entropy|(^|_)kl(_|$)|nll|k3$", "nats per token"),
    (r"length|tokens|longest", "tokens"),
    (r"fraction|finished|truncated|rate$|accuracy|share|mfu|outside|distinct", "share"),
)
FAMILY = re.compile(r"(.+)_(?:min|max|p\d+|\d)")
"""Quantiles and counts of one thing: they share a chart."""
TIMING = "timing"
"""The kind of curves that come from timing.jsonl."""
NOT_MEASURED = ("event", "rollback")
"""Kinds of records without metrics."""
PHASE = re.compile(r"seconds_(.+)|(.+)_seconds")
LEADING = re.compile(r"ref_(?=.)")


def main_kind(records: Sequence[Row]) -> str:
    """The stage that wrote the records; "evaluation" where there is nothing else."""
    kinds = [row["kind"] for row in records if row["kind"] not in ("evaluation", *NOT_MEASURED)]
    return max(set(kinds), key=lambda kind: (kinds.count(kind), kind)) if kinds else "evaluation"


def split_repeated(rows: Sequence[Row]) -> tuple[list[Row], list[list[Row]]]:
    """The records of one kind whose step was not done again, with rising steps; and the stretches that were.

    A run that resumes, or is rolled back, writes some steps twice: the later record counts.
    """
    kept: list[Row] = []
    old: list[list[Row]] = []
    for row in rows:
        start = len(kept)
        while start and kept[start - 1]["step"] >= row["step"]:
            start -= 1
        if start < len(kept):
            old.append(kept[start:])
            del kept[start:]
        kept.append(row)
    return kept, old


def curves(records: Sequence[Row], timing: Sequence[Row] = ()) -> dict[str, dict[str, Any]]:
    """{kind: {metric: curve}}; timing: rows of timing.jsonl, which are one kind of their own.

    A curve has x (steps), y (None: not a number), where thinned also lo and hi, `bad` (steps of what was no number),
    and `old`: [x, y] of stretches that were done again.
    """
    found: dict[str, dict[str, Any]] = {}
    records = [*records, *({**row, "kind": TIMING} for row in timing)]
    kinds = [kind for kind in dict.fromkeys(row["kind"] for row in records) if kind not in NOT_MEASURED]
    for kind in sorted(kinds, key=lambda kind: kind == "evaluation"):
        rows, old = split_repeated([row for row in records if row["kind"] == kind])
        names = dict.fromkeys(key for row in rows for key, value in row.items() if is_measured(key, value))
        found[kind] = {name: _curve(rows, old[-MAX_OLD:], name) for name in list(names)[:MAX_METRICS]}
        # A metric that never was a number in any record is text, or a table.
        found[kind] = {name: curve for name, curve in found[kind].items() if curve is not None}
    for name in found.get(TIMING, {}):
        for kind in found:
            if kind != TIMING:
                found[kind].pop(name, None)
    return found


def is_measured(key: str, value: Any) -> bool:
    """Whether a field of a record is a metric: a number, or null for one that was not finite."""
    return key not in ("kind", "step") and (value is None or finite(value) is not None or _is_not_finite(value))


def thin(steps: Sequence[float], values: Sequence[float | None]) -> dict[str, Any]:
    """x, y of a curve; with more than MAX_POINTS of them the mean of stretches, with their lo and hi."""
    if len(steps) <= MAX_POINTS:
        return {"x": [_whole(step) for step in steps], "y": [rounded(value) for value in values]}
    curve: dict[str, list[Any]] = {"x": [], "y": [], "lo": [], "hi": []}
    for start, end in stretches(len(steps), MAX_POINTS // 2):
        inner = [value for value in values[start:end] if value is not None]
        curve["x"].append(_whole(steps[(start + end - 1) // 2]))
        curve["y"].append(rounded(sum(inner) / len(inner)) if inner else None)
        curve["lo"].append(rounded(min(inner)) if inner else None)
        curve["hi"].append(rounded(max(inner)) if inner else None)
    # The ends of a curve are steps of the run, so that it spans what it shows.
    curve["x"][0], curve["x"][-1] = _whole(steps[0]), _whole(steps[-1])
    return curve


def stretches(count: int, num_parts: int) -> list[tuple[int, int]]:
    """[start, end) of parts of nearly equal size, none of them empty."""
    cuts = [count * i // num_parts for i in range(num_parts + 1)]
    return [(a, b) for a, b in itertools.pairwise(cuts) if b > a]


def charts(names: Iterable[str]) -> list[dict[str, Any]]:
    """Groups of charts: {title, charts: [{title, unit, metrics}]}. Each metric is in one; x and ref_x share theirs, and
    so do x_min, x_p10, x_max; x_1, x_2.
    """
    every = list(dict.fromkeys(names))
    families: dict[str, list[str]] = {}
    for name in every:
        match, base = FAMILY.fullmatch(name), LEADING.sub("", name, count=1)
        family = base if base in every else name
        if match:
            family = f"{match[1]}_n" if name[-2] == "_" and name[-1].isdigit() else f"{match[1]}: range"
        families.setdefault(family, []).append(name)
    groups: dict[str, list[dict[str, Any]]] = {title: [] for title in [*dict(GROUPS), OTHER]}
    for title, members in families.items():
        members.sort(key=lambda name: bool(LEADING.match(name)))
        title = members[0] if len(members) == 1 else title
        groups[group_of(members[0])].append({"title": title, "unit": unit_of(members[0]), "metrics": members})
    return [{"title": title, "charts": inner} for title, inner in groups.items() if inner]


def group_of(name: str) -> str:
    patterns = dict(GROUPS)
    return next((title for title in SEARCH if re.search(patterns[title], name)), OTHER)


def unit_of(name: str) -> str:
    return next((unit for pattern, unit in UNITS if re.search(pattern, name)), "")


def phases(records: Sequence[Row], num_columns: int = 100) -> dict[str, Any] | None:
    """Seconds per step by phase: fields PHASE_seconds or seconds_PHASE, and the `rest` of `seconds`; totals, and means
    of stretches of steps.
    """
    kind = main_kind(records)
    rows, _ = split_repeated([row for row in records if row["kind"] == kind and (finite(row.get("seconds")) or 0) > 0])
    if not rows:
        return None
    found = {key: PHASE.fullmatch(key) for key in dict.fromkeys(key for row in rows for key in row)}
    names = {key: match[1] or match[2] for key, match in found.items() if match}
    table = []
    for row in rows:
        times = [max(0.0, finite(row.get(key)) or 0.0) for key in names]
        table.append([*times, max(0.0, (finite(row["seconds"]) or 0.0) - sum(times))])
    totals = [sum(column) for column in zip(*table, strict=True)]
    labels = [*names.values(), "rest" if names else "step"]
    if totals[-1] < 0.001 * sum(totals):
        labels, totals, table = labels[:-1], totals[:-1], [times[:-1] for times in table]
    bars = []
    for start, end in stretches(len(rows), min(num_columns, len(rows))):
        means = [sum(column) / (end - start) for column in zip(*table[start:end], strict=True)]
        bars.append({"from": rows[start]["step"], "to": rows[end - 1]["step"], "means": [rounded(x) for x in means]})
    return {"names": labels, "totals": [rounded(x) for x in totals], "bars": bars, "num_steps": len(rows)}


def rounded(value: Any) -> float | None:
    """DIGITS significant digits; None for what is no number."""
    x = finite(value)
    return None if x is None else float(f"{x:.{DIGITS}g}")


def _curve(rows: Sequence[Row], old: Sequence[Sequence[Row]], name: str) -> dict[str, Any] | None:
    having = [row for row in rows if name in row]
    values = [finite(row[name]) for row in having]
    if all(value is None for value in values):
        return None
    curve = thin([row["step"] for row in having], values)
    curve["last"] = next(value for value in reversed(values) if value is not None)
    bad = [row["step"] for row, value in zip(having, values, strict=True) if value is None]
    if bad:
        curve["bad"], curve["num_bad"] = bad[:50], len(bad)
    stretched = []
    for rows_then in old:
        then = thin([row["step"] for row in rows_then], [finite(row.get(name)) for row in rows_then])
        stretched.append([then["x"], then["y"]])
    if stretched:
        curve["old"] = stretched
    return curve


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and finite(value) is None


def _whole(step: float) -> float:
    return int(step) if step == int(step) else step
