"""Writes the file of one rank and role: tensors one after another, each as torch.save has it."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor

from ppomax.engine.checkpoint_manifest import FileRecord


@dataclass(frozen=True)
class Written:
    """A file on the disk. extents: (first byte, number of bytes) of each tensor."""

    record: FileRecord
    extents: tuple[tuple[int, int], ...]


def write_chunks(path: Path, tensors: Iterable[Tensor]) -> Written:
    """Writes CPU tensors into a new file and brings it to the disk. Raises OSError."""
    extents = []
    with path.open("xb", buffering=0) as file:
        stream = _Hashed(file)
        for tensor in tensors:
            start = stream.position
            # torch.save writes the whole storage of a view.
            whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize and tensor.is_contiguous()
            copy = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
            try:
                torch.save(copy, cast(BinaryIO, stream))
            except RuntimeError as error:  # what torch makes of a write that failed
                raise stream.fault or error from error
            extents.append((start, stream.position - start))
        os.fsync(file.fileno())
    return Written(FileRecord(stream.position, stream.hash.hexdigest()), tuple(extents))


class _Hashed:
    """A file that is only appended to, with the checksum of what was written so far."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.position = 0
        self.hash = hashlib.sha256()
        self.fault: OSError | None = None

    def write(self, content: bytes) -> int:
        view = memoryview(content)
        while len(view):
            try:
                written = self._file.write(view)
            except OSError as error:
                self.fault = error
                raise
            self.hash.update(view[:written])
            self.position += written
            view = view[written:]
        return len(content)

    def flush(self) -> None:
        """Nothing is buffered."""
