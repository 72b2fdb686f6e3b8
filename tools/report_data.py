"""All that a report shows of some runs, as one JSON tree of bounded size; `report_page.py` puts it into a page."""

import json
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ppomax.engine.errors import DataError
from ppomax.tools.report_config import config_rows, preset_of
from ppomax.tools.report_histogram import reward_histograms
from ppomax.tools.report_series import MAX_POINTS, OVERVIEW, charts, curves, main_kind, phases, rounded
from ppomax.tools.run_folder import (
    COLUMNS,
    Row,
    Run,
    all_records,
    finite,
    last_record,
    read_json,
    read_rollouts,
    read_samples,
    read_toml,
    rollout_files,
    sample_files,
)

MAX_EVENTS = 200
MAX_EVALUATIONS = 8
MAX_SAMPLES = 64
MAX_TEXT = 6000
"""Characters of one text that are shown."""
ROLLOUT_BYTES = 3_000_000
"""Of the rollouts in one report, as JSON."""
MAX_DUMPS = 24
MAX_RANKS = 64


def report_data(runs: Sequence[Run], *, with_rollouts: bool) -> dict[str, Any]:
    """The tree. with_rollouts: include rows of rollouts (a page on disk); else their steps alone (a live one)."""
    budget = ROLLOUT_BYTES // len(runs)
    trees = [_run_tree(run, budget if with_rollouts else 0, number) for number, run in enumerate(runs)]
    names = [name for tree in trees for kind in tree["curves"].values() for name in kind]
    tomls = [read_toml(run.folder / "config.toml") for run in runs]
    commands = [tree["stage"] for tree in trees]
    return {
        "version": metadata.version("ppomax"),
        "made": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "overview": [name for name in OVERVIEW if name in names],
        "groups": charts(names),
        "runs": trees,
        "config": {
            "bases": [preset_of(toml, command) for toml, command in zip(tomls, commands, strict=True)],
            "rows": config_rows(tomls, commands),
        },
    }


def rollout_tree(path: Path, budget: int = ROLLOUT_BYTES) -> list[dict[str, Any]]:
    """Rows of one file of rollouts, cut to `budget` bytes of JSON. Raises DataError."""
    rows: list[dict[str, Any]] = []
    for row in read_rollouts(path):
        shown = {
            "index": rounded(row.get("index")),
            "prompt": shortened(row.get("prompt")),
            "finished": bool(row.get("finished")),
            "score": rounded(row.get("score")),
            "pieces": row["pieces"],
            "tokens": [rounded(token) for token in row["tokens"]],
        } | {name: [_short(value) for value in row[name]] for name in COLUMNS}
        budget -= len(json.dumps(shown))
        if budget < 0:
            break
        rows.append(shown)
    return rows


def shortened(text: Any) -> str:
    """A text, cut to MAX_TEXT characters; anything else as JSON."""
    if not isinstance(text, str):
        try:
            text = json.dumps(text, ensure_ascii=False)
        except RecursionError:
            text = "(nested too deeply to be shown)"
    left = len(text) - MAX_TEXT
    return text if left <= 0 else f"{text[:MAX_TEXT]} [... {left} more characters]"


def _run_tree(run: Run, budget: int, number: int) -> dict[str, Any]:
    notes = list(run.notes)
    records, timing = all_records(run.metrics), all_records(run.timing)
    if run.metrics.tail and last_record(run.metrics) is None:
        notes.append("the last line of metrics.jsonl has no end: the run is writing, or was killed while it wrote")
    stage = main_kind(records) if records else ""
    if not records:
        notes.append("no record yet")
    dumps = rollout_files(run.folder)
    rollouts, left_out = _read_rollouts(dumps, budget, notes)
    samples = _read_samples(run, notes)
    measured = curves(records, timing)
    longest = max((sum(row["kind"] == kind for row in records) for kind in measured), default=0)
    if longest > MAX_POINTS:
        notes.append(
            f"{longest} steps: curves show the mean, lowest and highest value of {MAX_POINTS // 2} stretches of steps"
        )
    if left_out:
        notes.append(f"rollouts of {left_out} steps are left out, to keep this page small")
    seconds = [finite(row.get("seconds")) or 0.0 for row in records if row["kind"] == stage]
    return {
        "name": _name(run.folder, number),
        "folder": str(run.folder),
        "stage": stage,
        "step": max((row["step"] for row in records if row["kind"] == stage), default=0),
        "num_steps": _steps_of(read_toml(run.folder / "config.toml"), stage),
        "seconds": rounded(sum(seconds)),
        "notes": notes,
        "curves": measured,
        "events": [_event(row) for row in records if row["kind"] == "event"][-MAX_EVENTS:],
        "num_events": sum(row["kind"] == "event" for row in records),
        "samples": {step: [_sample(row) for row in rows] for step, rows in samples.items()},
        "histogram": reward_histograms(records, rollouts, samples),
        "phases": phases(timing or records),
        "rollouts": list(dumps) if budget == 0 else list(rollouts),
        "dumps": rollouts,
        "plan": _plan(read_json(run.folder / "plan.json")),
        "versions": _versions(read_json(run.folder / "versions.json")),
    }


def _read_rollouts(
    files: dict[int, Path], budget: int, notes: list[str]
) -> tuple[dict[int, list[dict[str, Any]]], int]:
    """Rows by step, the first and last step before those between, until the budget (bytes) is used up; how many steps
    are left out.
    """
    rollouts: dict[int, list[dict[str, Any]]] = {}
    if budget == 0:
        return rollouts, 0
    num_left = 0
    for step in spread(list(files)):
        if budget <= 0 or len(rollouts) == MAX_DUMPS:
            num_left += 1
            continue
        try:
            rows = rollout_tree(files[step], budget)
        except DataError as error:
            notes.append(str(error))
            continue
        if not rows:
            num_left += 1
            continue
        rollouts[step] = rows
        budget -= len(json.dumps(rows))
    return dict(sorted(rollouts.items())), num_left


def spread(steps: Sequence[int]) -> list[int]:
    """The same steps: first, last, then always the middle of the widest gaps."""
    order: list[int] = []
    gaps = [(0, len(steps) - 1)] if steps else []
    chosen = {0, len(steps) - 1} if steps else set()
    order += [steps[i] for i in sorted(chosen)]
    while gaps:
        following = []
        for low, high in gaps:
            if high - low < 2:
                continue
            middle = (low + high) // 2
            order.append(steps[middle])
            following += [(low, middle), (middle, high)]
        gaps = following
    return order


def _read_samples(run: Run, notes: list[str]) -> dict[int, list[Row]]:
    samples: dict[int, list[Row]] = {}
    files = sample_files(run.folder)
    for step in spread(list(files))[:MAX_EVALUATIONS]:
        try:
            samples[step] = read_samples(files[step])[:MAX_SAMPLES]
        except DataError as error:
            notes.append(str(error))
    return dict(sorted(samples.items()))


def _sample(row: Row) -> dict[str, Any]:
    return {
        "prompt": _turns(row["prompt"]),
        "response": shortened(row["response"]),
        "reward": rounded(row.get("reward")),
        "finished": row.get("finished") if isinstance(row.get("finished"), bool) else None,
    }


def _turns(prompt: Any) -> list[dict[str, str]]:
    if isinstance(prompt, list) and all(isinstance(turn, dict) for turn in prompt):
        return [{"role": str(turn.get("role", "")), "text": shortened(turn.get("text", ""))} for turn in prompt]
    return [{"role": "", "text": shortened(prompt)}]


def _event(row: Row) -> dict[str, Any]:
    texts = {name: shortened(row.get(name, "")) for name in ("detector", "severity", "message", "action")}
    evidence = row.get("evidence")
    pairs = evidence.items() if isinstance(evidence, dict) else [("", evidence)] if evidence is not None else []
    samples = row.get("samples")
    return {
        "step": row["step"],
        **texts,
        "evidence": [[str(key), _evidence(value)] for key, value in pairs][:40],
        "samples": [_event_sample(one) for one in samples[:8]] if isinstance(samples, list) else [],
    }


def _event_sample(sample: Any) -> list[list[str]]:
    if isinstance(sample, dict):
        return [[str(key), _evidence(value)] for key, value in sample.items()][:20]
    return [["", shortened(sample)]]


def _evidence(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else shortened(value)


def _plan(plan: Any) -> dict[str, Any] | None:
    """Planned and measured bytes by rank, and the phases of the fullest rank; None where it is no plan."""
    ranks = plan.get("ranks") if isinstance(plan, dict) else None
    if not isinstance(ranks, list) or not all(isinstance(rank, dict) for rank in ranks):
        return None
    known = [rank for rank in ranks if finite(rank.get("peak")) is not None]
    if not known:
        return None
    fullest = max(known, key=lambda rank: rank["peak"])
    phases_of = fullest.get("phases") if isinstance(fullest.get("phases"), dict) else {}
    return {
        "capacity": finite(plan.get("capacity")),
        "what": str(plan.get("measured", "")),
        "fullest": shortened(fullest.get("rank")),
        "phases": {str(name): _numbers(kinds) for name, kinds in phases_of.items() if isinstance(kinds, dict)},
        "ranks": [
            [shortened(rank.get("rank")), finite(rank["peak"]), finite(rank.get("measured"))]
            for rank in known[:MAX_RANKS]
        ],
        "num_ranks": len(known),
    }


def _numbers(kinds: dict[str, Any]) -> dict[str, float]:
    return {str(kind): value for kind, x in kinds.items() if (value := finite(x)) is not None}


def _versions(versions: Any) -> dict[str, str]:
    return {str(key): shortened(value) for key, value in versions.items()} if isinstance(versions, dict) else {}


def _steps_of(config: dict[str, Any] | None, stage: str) -> int:
    """Iterations the run is to make, 0 where they follow from its epochs."""
    train = (config or {}).get("train")
    steps = train.get("steps") if isinstance(train, dict) else None
    return steps if isinstance(steps, int) and stage not in ("", "evaluation") else 0


def _name(folder: Path, number: int) -> str:
    """runs/a/ppo: a/ppo."""
    parts: Iterable[str] = [part for part in folder.resolve().parts if part != "/"]
    return "/".join(list(parts)[-2:]) or f"run {number + 1}"


def _short(value: Any) -> float | None:
    x = finite(value)
    return None if x is None else float(f"{x:.4g}")
