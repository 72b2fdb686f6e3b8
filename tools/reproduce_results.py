"""What the runs of `make reproduce` came to: curves with the gold judgement, outcomes, and the monitor's first alarm.

The gold judge looks at the held-out samples that a run has written, after its end.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppomax.engine.config_file import load_config
from ppomax.engine.monitor.state import replay
from ppomax.tools.monitor import read_records
from ppomax.tools.reproduce_arms import ARMS, MONITOR
from ppomax.tools.reproduce_task import gold, repeats

FINISHED = "finished.json"
"""In the folder of a run that is whole."""
LEAST_GAIN = 0.05
"""Of the gold judgement: with less a run has not learned anything that it could lose."""
TAIL = 5
"""Iterations over which the ends of a run are averaged."""


@dataclass(frozen=True)
class Run:
    """One run. records: of its iterations. evaluations: held out, with `gold`, the mean judgement, and `repeats`, the
    share of responses with a sentence twice. alarm: (step, detector) of the monitor's first alarm under MONITOR.
    example: a held-out question and the response to it at the end.
    """

    arm: str
    seed: int
    records: tuple[dict[str, Any], ...]
    evaluations: tuple[dict[str, Any], ...]
    alarm: tuple[int, str] | None
    wall_seconds: float
    cpu_seconds: float
    example: tuple[str, str] = ("", "")

    @property
    def start(self) -> float:
        """Gold before the first step."""
        return float(self.evaluations[0]["gold"])

    @property
    def final(self) -> float:
        return float(self.evaluations[-1]["gold"])

    @property
    def best(self) -> dict[str, Any]:
        """The evaluation with the best gold, the first of equals."""
        return max(self.evaluations, key=lambda evaluation: evaluation["gold"])

    @property
    def half(self) -> float:
        """Gold when half of its gain is lost."""
        return (self.start + float(self.best["gold"])) / 2

    @property
    def has_learned(self) -> bool:
        return self.best["gold"] - self.start >= LEAST_GAIN

    @property
    def lost_after(self) -> int | None:
        """The last evaluation's step before more than half of the gain was lost; None where it never was."""
        after = [evaluation for evaluation in self.evaluations if evaluation["step"] >= self.best["step"]]
        for before, now in itertools.pairwise(after):
            if now["gold"] < self.half:
                return int(before["step"])
        return None

    @property
    def outcome(self) -> str:
        """collapses: at the end more than half of the gain is lost. holds: not so. fails: there was no gain."""
        if not self.has_learned:
            return "fails"
        return "collapses" if self.final < self.half else "holds"

    @property
    def is_caught(self) -> bool:
        """Whether an alarm came while no evaluation had lost half of the gain."""
        return self.alarm is not None and self.lost_after is not None and self.alarm[0] <= self.lost_after

    def tail(self, metric: str) -> float:
        """Mean over the last iterations."""
        return _mean([float(record[metric]) for record in self.records[-TAIL:]])

    def head(self, metric: str) -> float:
        """Mean over the first iterations."""
        return _mean([float(record[metric]) for record in self.records[:TAIL]])


def read_runs(output: Path) -> list[Run]:
    """Every finished run of an arm, in the order of ARMS and of seeds."""
    seeds = sorted(int(folder.name.removeprefix("seed_")) for folder in output.glob("seed_*"))
    folders = [(arm, seed, output / f"seed_{seed}" / arm) for arm in ARMS for seed in seeds]
    return [read_run(folder, arm, seed) for arm, seed, folder in folders if (folder / FINISHED).is_file()]


def read_run(folder: Path, arm: str, seed: int) -> Run:
    records = read_records(folder / "metrics.jsonl")
    config = load_config(str(folder / "config.toml"), ["monitor.action=warn", *MONITOR], command="ppo")
    _, alarms = replay(records, config.monitor, max_length=config.sampling.max_new_tokens)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = []
    samples: list[dict[str, Any]] = []
    for line in lines:
        if line["kind"] == "evaluation":
            samples = _read_lines(folder / f"samples_{line['step']:06d}.jsonl")
            evaluations.append({**line, **_judged(samples)})
    seconds = json.loads((folder / FINISHED).read_text())
    return Run(
        arm=arm,
        seed=seed,
        records=tuple(records),
        evaluations=tuple(evaluations),
        alarm=(alarms[0].step, alarms[0].detector.name) if alarms else None,
        wall_seconds=seconds["wall_seconds"],
        cpu_seconds=seconds["cpu_seconds"],
        example=(samples[0]["prompt"][-1]["text"], samples[0]["response"]),
    )


def _judged(samples: Sequence[dict[str, Any]]) -> dict[str, float]:
    judged = [gold(row["prompt"][-1]["text"], row["response"], finished=row["finished"]) for row in samples]
    return {"gold": _mean(judged), "repeats": _mean([float(repeats(row["response"])) for row in samples])}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
