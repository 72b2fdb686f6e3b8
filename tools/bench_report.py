"""The benchmark's report: a table to read, the same numbers as JSON, and a plot."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

OURS = "ours"
COLUMNS = (
    *("operation", "pass", "version", "median", "p20 - p80", "spread", "of the floor", "rate"),
    *("time / ours", "error", "memory"),
)


@dataclass(frozen=True)
class Row:
    """One pass of one version. Seconds, bytes, operations; ratio: its time over ours; note: instead of a time."""

    op: str
    case: str
    part: str
    version: str
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    spread: float | None = None
    num_calls: int = 0
    num_bytes: float = 0
    num_flops: float = 0
    floor: float | None = None
    ratio: float | None = None
    error: float | None = None
    extra_bytes: int | None = None
    note: str = ""


def cells(row: Row) -> list[str]:
    """A row of the table, in the order of COLUMNS."""
    head = [f"{row.op} {row.case}", row.part, row.version]
    tail = [
        "" if row.ratio is None or row.version == OURS else f"{row.ratio:.2f}",
        "" if row.error is None else f"{row.error:.1e}",
        "" if row.extra_bytes is None else f"{row.extra_bytes / 2**20:.0f} MiB",
    ]
    if row.median is None or row.p20 is None or row.p80 is None or row.spread is None:
        return [*head, row.note, "", "", "", "", *tail]
    share = "" if row.floor is None else f"{100 * row.floor / row.median:.0f} %"
    quantiles = f"{seconds(row.p20)} - {seconds(row.p80)}"
    return [*head, seconds(row.median), quantiles, f"{100 * row.spread:.1f} %", share, rate(row), *tail]


def seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3f} {unit}"
    return f"{value * 1e6:.1f} us"


def rate(row: Row) -> str:
    """What bounds the operation, over its time: operations where it has them, else bytes."""
    assert row.median is not None
    if row.num_flops:
        return f"{row.num_flops / row.median / 1e12:.3g} TFLOP/s"
    return f"{row.num_bytes / row.median / 1e9:.3g} GB/s"


def table(rows: Sequence[Row]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    return "\n".join([*lines, *(f"| {' | '.join(cells(row))} |" for row in rows)])


def write(folder: Path, rows: Sequence[Row], environment: dict[str, Any]) -> None:
    """README.md, results.json and times.png in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {"environment": environment, "rows": [asdict(row) for row in rows]}
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    text = [
        f"# Kernels on {environment['device']}",
        "",
        f"`{environment['command']}`, commit {environment['commit']}, {environment['date']}; {versions}.",
        "",
        f"Ceilings, measured in the same process ({environment['ceilings']['what']}): "
        f"{environment['ceilings']['bytes_per_second'] / 1e12:.3g} TB/s, "
        f"{environment['ceilings']['flops_per_second'] / 1e12:.3g} TFLOP/s.",
        "",
        f"Tests before timing: {environment['tests']}.",
        "",
        table(rows),
        "",
        "Floor: bytes that must move over the copy's rate, or operations over the product's, whichever is longer.",
        "Time / ours is of the same pass. Error: the largest |x - y| / |y| of an output or gradient on a smaller call,",
        "y computed in fp64 from the same inputs. Memory: the peak of the pass above what was there before. Spread: of",
        "the medians of the two repeats. A peer without entropy is compared on what it gives.",
        "A call whose data stay in a CPU's caches can be faster than the floor, which is that of memory.",
        "",
        "![times](times.png)",
        "",
    ]
    (folder / "README.md").write_text("\n".join(text))
    plot(folder / "times.png", rows)


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Times over ours, one group of bars for each pass of each call."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if row.median is not None and row.ratio is not None]
    groups = list(dict.fromkeys((row.op, row.case, row.part) for row in timed))
    versions = list(dict.fromkeys(row.version for row in timed))
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.22 * len(timed)))
    colours = {version: f"C{i % 10}" for i, version in enumerate(versions)}
    position, ticks = 0.0, []
    for op, case, part in groups:
        members = [row for row in timed if (row.op, row.case, row.part) == (op, case, part)]
        for row in members:
            axes.barh(position, row.ratio or 0.0, height=0.8, color=colours[row.version])
            position += 1
        ticks.append((position - (len(members) + 1) / 2, f"{op} {case}\n{part}"))
        position += 0.7
    axes.set_yticks([y for y, _ in ticks], [label for _, label in ticks], fontsize=7)
    axes.set_ylim(position, -1)
    axes.set_xscale("log")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("time / time of ours")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colours[version]) for version in versions]
    axes.legend(handles, versions, fontsize=7, loc="lower right")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
