"""A folder that appears under its name complete or not at all."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ppomax.engine.errors import CheckpointError


@dataclass(frozen=True)
class Replaceable:
    """Which targets may be replaced. expected: what such a target is, for messages."""

    test: Callable[[Path], bool]
    expected: str


class AtomicFolder:
    """Is filled beside the target as `partial`, which takes the target's place once it is complete.

    Call `begin`, write into `partial`, `commit`, and at the end, always, `discard`.
    """

    def __init__(self, target: str | Path, replaceable: Replaceable) -> None:
        """target: where it is a link, the folder that it leads to is replaced."""
        self.target = Path(os.path.realpath(target))
        self.partial = self.target.parent / f"{self.target.name}.tmp-{os.getpid()}"
        self._replaceable = replaceable
        self._begun = False

    def begin(self) -> None:
        """Makes the partial folder; raises CheckpointError if the target may not be replaced."""
        self._check_target()
        self.partial.mkdir(parents=True)
        self._begun = True

    def commit(self) -> None:
        """Brings every file to the disk and puts the folder in place; a target that exists stays if that fails."""
        for path in self.partial.rglob("*"):
            sync(path)
        sync(self.partial)
        self._check_target()  # another process may have made it since
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
        sync(self.target.parent)
        if had_target:
            shutil.rmtree(old)

    def discard(self) -> None:
        """Removes what is left of a folder that was not completed."""
        if self._begun:
            shutil.rmtree(self.partial, ignore_errors=True)

    def _check_target(self) -> None:
        if self.target.exists() and not self._replaceable.test(self.target):
            raise CheckpointError(
                f"{self.target} exists and is not {self._replaceable.expected}; move it away or choose another folder"
            )


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


NOTHING = Replaceable(_is_empty_folder, "an empty folder")
"""The rule of commands to which people name a folder: no file of theirs is ever replaced."""


def sync(path: Path) -> None:
    """Has a file, or the names in a folder, written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
