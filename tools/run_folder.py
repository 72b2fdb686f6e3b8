"""Reads a run folder as far as it got: records, events, samples, rollouts, configuration, plan.

A run may be writing while it is read, or have been killed: a last line without its end is left for later, a damaged
line is left out and named in `notes`. What the records mean is left to `report_data.py`.
"""

import json
import math
import os
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppomax.engine.errors import DataError

Row = dict[str, Any]

SAMPLES = re.compile(r"samples_(\d{1,12})\.jsonl")
ROLLOUTS = re.compile(r"step_(\d{1,12})\.(?:jsonl|parquet)")
COLUMNS = ("logprobs", "ref_logprobs", "kl", "advantages", "values", "token_rewards")
"""Numbers per token in a row of rollouts."""
LARGEST_STEP = 10**12
LARGEST = 1e150
"""Beyond it, differences and squares of numbers overflow."""
MAX_NOTES = 20


@dataclass
class Lines:
    """A growing file of records: objects with a kind and a step. rows: those read so far, in their order."""

    path: Path
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    position: int = 0
    """Bytes that were read."""
    num_lines: int = 0
    inode: int = 0
    tail: bytes = b""
    """The last line, if that has no end yet."""


@dataclass
class Run:
    """What was found so far."""

    folder: Path
    metrics: Lines
    timing: Lines

    @property
    def notes(self) -> list[str]:
        return self.metrics.notes + self.timing.notes


def open_run(folder: Path) -> Run:
    """Raises DataError where there is no folder."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such run folder; expected what a stage wrote into train.output")
    return Run(folder, Lines(folder / "metrics.jsonl"), Lines(folder / "timing.jsonl"))


def read_records(run: Run) -> None:
    """Takes what the records have grown by; a file that was replaced is read anew. Raises DataError."""
    for lines in (run.metrics, run.timing):
        _read_on(lines)


def all_records(lines: Lines) -> list[Row]:
    """The rows, and the last line where it is whole but for its end, as an editor may leave it."""
    last = last_record(lines)
    return lines.rows if last is None else [*lines.rows, last]


def last_record(lines: Lines) -> Row | None:
    try:
        return _record(lines.tail) if lines.tail.strip() else None
    except ValueError:
        return None


def _read_on(lines: Lines) -> None:
    path = lines.path
    try:
        if not path.is_file():
            return
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size < lines.position or status.st_ino != lines.inode:
                lines.rows, lines.notes, lines.position, lines.num_lines = [], [], 0, 0
            lines.inode = status.st_ino
            file.seek(lines.position)
            *whole, lines.tail = file.read().split(b"\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    for line in whole:
        lines.num_lines += 1
        lines.position += len(line) + 1
        try:
            lines.rows.append(_record(line))
        except ValueError as error:
            _note(lines, f"{path.name}, line {lines.num_lines}, is left out: {error}")


def check_has_records(run: Run) -> None:
    """Raises DataError where there is nothing to report on."""
    path = run.metrics.path
    if all_records(run.metrics) or sample_files(run.folder) or rollout_files(run.folder):
        return
    if run.notes:
        raise DataError(f"{path} has no readable record: {run.notes[0]}; expected the file that a stage writes")
    if path.is_file():
        raise DataError(f"{path} has no record yet; `ppomax watch {run.folder}` shows a run from its first step on")
    inner = sorted(one.parent for one in run.folder.glob("*/metrics.jsonl"))
    if inner:
        raise DataError(f"{run.folder} holds several runs; name one or more of them: {' '.join(map(str, inner))}")
    raise DataError(f"{run.folder} holds no run: no metrics.jsonl, samples or rollouts; give a stage's train.output")


def sample_files(folder: Path) -> dict[int, Path]:
    """{step: file} of evaluations' dialogues; what `evaluate` writes has step 0."""
    found = {int(match[1]): path for path in _listing(folder) if (match := SAMPLES.fullmatch(path.name))}
    whole = folder / "samples.jsonl"
    if not found and whole.is_file():
        found[0] = whole
    return dict(sorted(found.items()))


def rollout_files(folder: Path) -> dict[int, Path]:
    """{step: file} of the rollouts that were written."""
    matches = ((ROLLOUTS.fullmatch(path.name), path) for path in _listing(folder / "rollouts"))
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def read_samples(path: Path) -> list[Row]:
    """Dialogues: prompt (turns or text), response, reward, finished. Raises DataError."""
    rows = _read_jsonl(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("response"), str) or "prompt" not in row:
            raise DataError(f"{path}, line {number}: expected a row with prompt and response")
    return rows


def read_rollouts(path: Path) -> list[Row]:
    """Rows as engine/rollout_dump.py writes them. Raises DataError."""
    rows = _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path)
    for number, row in enumerate(rows, 1):
        pieces = row.get("pieces")
        if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
            raise DataError(f"{path}, row {number}: expected pieces, the texts of the response's tokens")
        for name in ("tokens", *COLUMNS):
            column = row.get(name)
            if not isinstance(column, list) or len(column) != len(pieces):
                raise DataError(f"{path}, row {number}: expected {len(pieces)} entries of {name}, one per token")
    return rows


def read_json(path: Path) -> Any:
    """The content of a JSON file; None where it is missing or damaged, as in a folder that is being written."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def read_toml(path: Path) -> dict[str, Any] | None:
    """The content of a TOML file; None where it is missing or damaged."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def finite(value: Any) -> float | None:
    """The value as a finite number within +-LARGEST, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return max(-LARGEST, min(LARGEST, float(value))) if math.isfinite(value) else None
    except OverflowError:
        return None


def _record(line: bytes) -> Row:
    """Raises ValueError that says what is wrong."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise ValueError("expected an object with a kind and a step")
    step = finite(record.get("step"))
    if step is None or not -LARGEST_STEP < step < LARGEST_STEP:
        raise ValueError("its step is not a number")
    return record


def _read_jsonl(path: Path) -> list[Row]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise DataError(f"{path}, line {number}: not JSON") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected an object")
        rows.append(row)
    return rows


def _read_parquet(path: Path) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: pyarrow is not installed, and reads this format; install it") from None
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from None


def _listing(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_file()]
    except OSError:
        return []


def _note(lines: Lines, text: str) -> None:
    if len(lines.notes) < MAX_NOTES:
        lines.notes.append(text)
    elif len(lines.notes) == MAX_NOTES:
        lines.notes.append(f"more lines of {lines.path.name} are left out")
