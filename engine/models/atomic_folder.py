"""A folder that appears under its name complete or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ppomax.engine.errors import CheckpointError


class AtomicFolder:
    """Is filled beside the target as `partial`, which takes the target's place once it is complete.

    Call `begin`, write into `partial`, `commit`, and at the end, always, `discard`.
    """

    def __init__(self, target: str | Path, is_replaceable: Callable[[Path], bool]) -> None:
        """is_replaceable: whether a target that exists may be replaced."""
        self.target = Path(target).absolute()
        self.partial = self.target.with_name(f"{self.target.name}.tmp-{os.getpid()}")
        self._is_replaceable = is_replaceable

    def begin(self) -> None:
        """Makes the partial folder; raises CheckpointError if the target may not be replaced."""
        if self.target.exists() and not self._is_replaceable(self.target):
            raise CheckpointError(
                f"{self.target} exists and is not the work of an earlier export; move it away or choose another folder"
            )
        self.partial.mkdir(parents=True)

    def commit(self) -> None:
        """Brings every file to the disk and puts the folder in place; a target that exists stays if that fails."""
        for path in self.partial.rglob("*"):
            _sync(path)
        _sync(self.partial)
        old = self.target.with_name(f"{self.target.name}.old-{os.getpid()}")
        had_target = self.target.exists()
        if had_target:
            self.target.rename(old)
        try:
            self.partial.rename(self.target)
        except OSError:
            if had_target:
                old.rename(self.target)
            raise
        _sync(self.target.parent)
        if had_target:
            shutil.rmtree(old)

    def discard(self) -> None:
        """Removes what is left of a folder that was not completed."""
        shutil.rmtree(self.partial, ignore_errors=True)


def is_empty_folder(path: Path) -> bool:
    """The rule for folders that people name: nothing of theirs is ever replaced."""
    return path.is_dir() and not any(path.iterdir())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
