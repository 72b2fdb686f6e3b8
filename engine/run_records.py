"""Whose a run folder is, and which of its records stand: one run at a time writes into it, and a step is in it once."""

import fcntl
import json
import math
import os
import platform
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from ppomax.engine.config import RunConfig
from ppomax.engine.config_file import to_toml
from ppomax.engine.errors import ConfigError

LOCK_FILE = ".lock"
SUPERSEDED = "superseded"
ROLLBACK = "rollback"
"""The kind of a record of metrics.jsonl with which a run goes back to its step."""
FREE_TO_CHANGE = ("parallel", "checkpoint", "monitor")
FREE_IN_TRAIN = ("output", "resume", "log_every", "stop_seconds", "tokens_per_microbatch")


def lock_folder(folder: Path) -> IO[str]:
    """Takes the folder for this process until the file is closed or the process ends, however it ends; raises
    ConfigError where another one has it. The system keeps the lock: on a shared file system too, where that has locks.
    """
    file = (folder / LOCK_FILE).open("a+")
    try:
        # Not flock: processes that are forked from this one would hold the folder after its end.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ConfigError(
            f"train.output {folder} is in use by a run that has not ended ({holder}); wait for it, stop it, or give "
            "another folder"
        ) from None
    except OSError:
        return file  # a file system without locks: nothing can be known
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def drop_later(path: Path, step: int) -> None:
    """Moves what a jsonl file has behind its last record of a step up to this one, and lines that are no records, into
    NAME.superseded.jsonl. Later steps from before a rollback to a step up to this one stay.
    """
    lines = _lines(path)
    stand = _num_standing(lines, step)
    kept = [line for line in lines[:stand] if _step(line) < math.inf]
    if len(kept) == len(lines):
        return
    gone = [line for i, line in enumerate(lines) if i >= stand or _step(line) == math.inf]
    with path.with_name(f"{path.stem}.{SUPERSEDED}.jsonl").open("a") as file:
        file.writelines(line if line.endswith("\n") else line + "\n" for line in gone)
        file.flush()
        os.fsync(file.fileno())
    written = path.with_name(f".{path.name}.partial")
    with written.open("w") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(written, path)


def last_rollback(path: Path, step: int) -> dict[str, Any] | None:
    """The record of the rollback with which a run came to this step the last time; None where it came by training."""
    lines = _lines(path)
    stand = _num_standing(lines, step)
    last = json.loads(lines[stand - 1]) if stand else {}
    return last if last.get("kind") == ROLLBACK and last.get("step") == step else None


def is_same_run(config: RunConfig, folder: Path) -> bool:
    """Whether the folder's config.toml is that of this run, but for what may change within one."""
    before = _read(folder)
    return before is not None and _fixed(before) == _fixed(tomllib.loads(to_toml(config)))


def goes_on_here(config: RunConfig, folder: Path) -> bool:
    """Whether the checkpoint that train.resume names is of the run in this folder: its own, or what it began from."""
    resume = config.train.resume
    if resume == "auto" or Path(resume).resolve().parent == (folder / "checkpoints").resolve():
        return True
    before = _read(folder)
    return before is not None and before.get("train", {}).get("resume") == resume and is_same_run(config, folder)


def _read(folder: Path) -> dict[str, Any] | None:
    """config.toml; None where there is none that can be read."""
    try:
        return tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _fixed(tree: dict[str, Any]) -> dict[str, Any]:
    fixed = {name: section for name, section in tree.items() if name not in FREE_TO_CHANGE}
    train = {name: value for name, value in fixed.get("train", {}).items() if name not in FREE_IN_TRAIN}
    return {**fixed, "train": train}


def _lines(path: Path) -> list[str]:
    """With their ends. Model text in a record may hold separators of other kinds."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        return list(file)


def _num_standing(lines: Sequence[str], step: int) -> int:
    """How many of the lines a run has left behind when it goes on from a step."""
    return max((number for number, line in enumerate(lines, 1) if _step(line) <= step), default=0)


def _step(line: str) -> float:
    """The step of a record; infinite for what is none."""
    try:
        record = json.loads(line)
    except ValueError:
        return math.inf
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else math.inf
