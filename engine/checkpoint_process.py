"""The writer process of a rank: `python -m ppomax.engine.checkpoint_process`. `checkpoint_writers.py` starts it.

It writes what lies in memory that it shares with its rank, and publishes checkpoints. It ends with the rank, however
that ends: a killed rank leaves neither a process that holds its output open nor memory.
"""

import ctypes
import mmap
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from ppomax.engine.checkpoint_chunks import Written, write_chunks
from ppomax.engine.checkpoint_folders import Publication

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the shared memory: first byte, size and type."""

    start: int
    size: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class WriteJob:
    """Files and their tensors. num_bytes: of the shared memory."""

    num_bytes: int
    files: dict[Path, tuple[Place, ...]]


def main(arguments: Sequence[str]) -> None:
    """arguments: the file descriptors of the connection and of the shared memory, and the rank's process."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    connection_fd, memory_fd, parent = (int(argument) for argument in arguments)
    if os.getppid() != parent:
        return
    # Signals to a whole job ask the rank to stop, which needs its writer for that.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    torch.set_num_threads(1)
    with Connection(connection_fd) as connection:
        while True:
            try:
                job = connection.recv()
            except EOFError:
                return
            connection.send(_answer(job, memory_fd))


def _answer(job: WriteJob | Publication, memory_fd: int) -> dict[Path, Written] | Exception:
    try:
        if isinstance(job, Publication):
            job.run()
            return {}
        # Not closed by hand: of a write that failed the error still holds tensors in it.
        memory = mmap.mmap(memory_fd, job.num_bytes)
        files = job.files.items()
        return {path: write_chunks(path, (_tensor(memory, place) for place in places)) for path, places in files}
    except OSError as error:
        return OSError(f"{type(error).__name__}: {error}")


def _tensor(memory: mmap.mmap, place: Place) -> torch.Tensor:
    count = torch.Size(place.size).numel()
    if count == 0:
        return torch.empty(place.size, dtype=place.dtype)
    return torch.frombuffer(memory, dtype=place.dtype, count=count, offset=place.start).view(place.size)


if __name__ == "__main__":
    main(sys.argv[1:])
