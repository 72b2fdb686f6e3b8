"""The folders of checkpoints in a run: what they are called, how one is published, which ones are removed.

A checkpoint is filled as `.step_N.partial` and renamed to `step_N` when all of it is on the disk; then the file
`latest` names it. A crash between the two is harmless: what counts is the newest step_N folder whose checksums are
right, and `latest` is for people and other programs. No folder with a name of a checkpoint is ever half there: those
that are to be removed are renamed first.
"""

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ppomax.engine.checkpoint_manifest import MANIFEST_FILE, FileRecord, files_below, record_of, write_manifest
from ppomax.engine.models.atomic_folder import sync

LATEST_FILE = "latest"


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest `keep`, all whose step every_steps divides (0: none), and the num_best with
    the highest `metric` (is_lower_better: the lowest) among those at whose step held-out rows were evaluated.
    """

    keep: int
    every_steps: int = 0
    num_best: int = 0
    metric: str = ""
    is_lower_better: bool = False


def step_folder(folder: str | Path, step: int) -> Path:
    return Path(folder) / f"step_{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def partial_of(final: Path) -> Path:
    """Where a checkpoint is filled."""
    return final.with_name(f".{final.name}.partial")


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The published checkpoints of a folder, oldest first. Whether they are still whole, their manifests tell."""
    return sorted(path for path in Path(folder).glob("step_*") if re.fullmatch(r"step_\d{8}", path.name))


@dataclass(frozen=True)
class Publication:
    """A filled folder on its way to its name. known: files whose content is on the disk already, with their checksums.

    superseded: newer checkpoints that the run did not go on from, because they were damaged or another one was named:
    they are set aside. protected: never removed.
    """

    partial: Path
    final: Path
    known: Mapping[str, FileRecord]
    retention: Retention
    superseded: tuple[Path, ...] = ()
    protected: tuple[Path, ...] = ()

    def run(self) -> None:
        """Manifest, disk, name, `latest`, in this order; then removes what does not stay. Raises OSError."""
        records = dict(self.known)
        for name in files_below(self.partial):
            if name not in records:
                sync(self.partial / name)
                records[name] = record_of(self.partial / name)
        write_manifest(self.partial, records)
        sync(self.partial / MANIFEST_FILE)
        for path in self.partial.rglob("*"):
            if path.is_dir():
                sync(path)
        sync(self.partial)
        for path in {*self.superseded, self.final}:
            if path.exists():
                set_aside(path)
        os.rename(self.partial, self.final)
        sync(self.final.parent)
        point_to(self.final)
        remove(superfluous(self.final.parent, self.retention, self.protected))


def point_to(final: Path) -> None:
    """Writes `latest`, atomically."""
    pointer = final.with_name(LATEST_FILE)
    written = final.with_name(f".{LATEST_FILE}.partial")
    written.write_text(final.name + "\n")
    sync(written)
    os.replace(written, pointer)
    sync(final.parent)


def set_aside(path: Path) -> Path:
    """Renames a checkpoint so that no run goes on from it; nothing of it is lost. Returns its new place."""
    number = 1
    while (target := path.with_name(f"{path.name}.superseded-{number}")).exists():
        number += 1
    os.rename(path, target)
    return target


def superfluous(folder: str | Path, retention: Retention, protected: Collection[Path] = ()) -> list[Path]:
    """The checkpoints that do not stay, oldest first. protected: stay in any case."""
    found = list_checkpoints(folder)
    stay = {*found[-retention.keep :], *(path for path in found if path.resolve() in {p.resolve() for p in protected})}
    if retention.every_steps:
        stay |= {path for path in found if step_of(path) % retention.every_steps == 0}
    if retention.num_best:
        scores = {path: score for path in found if (score := _score(path, retention.metric)) is not None}
        # Of equals the older one.
        best = sorted(scores, key=scores.__getitem__, reverse=not retention.is_lower_better)
        stay |= set(best[: retention.num_best])
    return [path for path in found if path not in stay]


def remove(paths: Sequence[Path]) -> None:
    """Removes folders, whose names are gone at once."""
    for path in paths:
        hidden = path.with_name(f".{path.name}.removed")
        shutil.rmtree(hidden, ignore_errors=True)
        os.rename(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(folder: str | Path) -> None:
    """Removes what a killed run had not published, or not removed to the end."""
    for pattern in (".step_*.partial", ".step_*.removed"):
        for path in Path(folder).glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _score(path: Path, metric: str) -> float | None:
    """The metric of the evaluation that was made at the step of a checkpoint; None where there is none."""
    try:
        score = json.loads((path / "state.json").read_text())["evaluation"][metric]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return float(score) if isinstance(score, int | float) and score == score else None
