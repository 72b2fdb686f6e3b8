"""Whose a run folder is, and which of its records stand: one run at a time writes into it, and a step is in it once."""

import fcntl
import json
import os
import platform
import tomllib
from pathlib import Path
from typing import IO, Any

from ppomax.engine.config import RunConfig
from ppomax.engine.config_file import to_toml
from ppomax.engine.errors import ConfigError

LOCK_FILE = ".lock"
SUPERSEDED = "superseded"
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
    """Moves the records of a jsonl file after a step, and a line that was cut short, into NAME.superseded.jsonl."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if _step(line) <= step]
    if len(kept) == len(lines):
        return
    gone = [line for line in lines if _step(line) > step]
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


def _step(line: str) -> float:
    """The step of a record; infinite for what is none."""
    try:
        record = json.loads(line)
    except ValueError:
        return float("inf")
    return record.get("step", 0) if isinstance(record, dict) else float("inf")
