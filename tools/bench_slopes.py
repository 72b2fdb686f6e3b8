"""How the time of an iteration grows with prompts, response length and layers, for `make bench-ppo ARGS=--slopes`.

A slope is that of the line of least squares through log seconds over log size: 1 is growth in proportion, less means
that a part of the time does not depend on the size, 2 is quadratic growth. Each time is the least of the iterations.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ppomax.tools.bench_overhead import Measured, Step, measure
from ppomax.tools.bench_workload import Workload

FACTORS = (0.5, 1.0, 2.0)
PHASES = ("rollout", "scoring", "update")


def with_prompts(work: Workload, prompts: int) -> Workload:
    return replace(work, prompts=prompts)


def with_response(work: Workload, tokens: int) -> Workload:
    return replace(work, max_new_tokens=tokens)


def with_layers(work: Workload, layers: int) -> Workload:
    return replace(work, shape=replace(work.shape, num_layers=layers))


AXES: dict[str, tuple[Callable[[Workload], int], Callable[[Workload, int], Workload]]] = {
    "prompts": (lambda work: work.prompts, with_prompts),
    "tokens of a response": (lambda work: work.max_new_tokens, with_response),
    "layers": (lambda work: work.shape.num_layers, with_layers),
}
"""What grows: its size in a workload, and the workload with another size."""


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Of the line of least squares through the logarithms."""
    return statistics.linear_regression(list(map(math.log, sizes)), list(map(math.log, seconds))).slope


def slopes(work: Workload, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The record of the report. work: of a fixed response length."""
    base = measure(work, folder / "base", arguments.iterations, arguments.override)
    record = {}
    for axis, (size_of, resized) in AXES.items():
        sizes = [max(1, round(size_of(work) * factor)) for factor in FACTORS]
        runs = [
            base if size == size_of(work) else _run(resized(work, size), folder / f"{axis}_{size}", arguments)
            for size in sizes
        ]
        record[axis] = _axis(sizes, runs)
        print(axis, record[axis], flush=True)
    return record


def _run(work: Workload, folder: Path, arguments: argparse.Namespace) -> Measured:
    return measure(work, folder, arguments.iterations, arguments.override)


def _axis(sizes: Sequence[int], runs: Sequence[Measured]) -> dict[str, Any]:
    def of(value: Callable[[Step], float]) -> list[float]:
        return [run.best(value) for run in runs]

    wall, cpu = of(lambda step: step.whole.wall), of(lambda step: step.whole.cpu)
    phases = {phase: of(_cpu_of(phase)) for phase in PHASES}
    return {
        "sizes": list(sizes),
        "seconds": wall,
        "cpu_seconds": cpu,
        "slope": slope(sizes, wall),
        "cpu_slope": slope(sizes, cpu),
        "cpu_slope_by_phase": {phase: slope(sizes, times) for phase, times in phases.items()},
    }


def _cpu_of(phase: str) -> Callable[[Step], float]:
    return lambda step: step.phases[phase].cpu


def table(record: dict[str, Any]) -> list[str]:
    """Lines of the report."""
    head = ("what grows", "sizes", "seconds", "slope", "slope of CPU time", *PHASES)
    text = [
        "## Growth",
        "",
        "Slope of log seconds of an iteration on one thread over log size (1: in proportion); phases by CPU time "
        "of the main thread.",
        "",
        f"| {' | '.join(head)} |",
        "|" + "---|" * len(head),
    ]
    for axis, values in record.items():
        cells = (
            axis,
            ", ".join(map(str, values["sizes"])),
            ", ".join(f"{seconds:.3g}" for seconds in values["seconds"]),
            f"{values['slope']:.2f}",
            f"{values['cpu_slope']:.2f}",
            *(f"{values['cpu_slope_by_phase'][phase]:.2f}" for phase in PHASES),
        )
        text.append(f"| {' | '.join(cells)} |")
    return [*text, ""]
