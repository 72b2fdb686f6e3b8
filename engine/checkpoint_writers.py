"""The two writers of a rank: one writes at once, the other copies and lets a process of its own write.

The process is started by the first save and lives as long as the rank. What it writes lies in memory that both share
and that has no name: it is gone with the two. It is used again by every save.
"""

import mmap
import os
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from ppomax.engine.checkpoint_chunks import Written, write_chunks
from ppomax.engine.checkpoint_folders import Publication
from ppomax.engine.checkpoint_process import Place, WriteJob
from ppomax.engine.errors import DoesNotFitError
from ppomax.engine.parallel.device import torch_functions_as_they_are

ALIGNMENT = 256
"""Bytes: where a tensor begins in the shared memory."""


class InlineWriter:
    """Writes at once, in this process: training waits for the disk."""

    def __init__(self) -> None:
        self._answer: dict[Path, Written] | Exception = {}
        self._is_begun = False

    def add(self, path: Path, tensors: tuple[Tensor, ...]) -> None:
        if not self._is_begun:
            self._answer, self._is_begun = {}, True
        if isinstance(self._answer, dict):
            try:
                self._answer[path] = write_chunks(path, (tensor.cpu() for tensor in tensors))
            except OSError as error:
                self._answer = error

    def start(self) -> None:
        if not self._is_begun:
            self._answer = {}
        self._is_begun = False

    def publish(self, publication: Publication) -> None:
        self._answer = {}
        try:
            publication.run()
        except OSError as error:
            self._answer = error

    def answer(self, timeout: float) -> dict[Path, Written] | Exception | None:
        return self._answer

    def close(self) -> None:
        """Nothing runs."""


class ProcessWriter:
    """Copies into shared memory: training waits for the copy."""

    def __init__(self) -> None:
        self._memory = SharedMemory()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._files: dict[Path, tuple[Place, ...]] = {}
        self._answer: dict[Path, Written] | Exception | None = {}

    def add(self, path: Path, tensors: tuple[Tensor, ...]) -> None:
        if not self._files:
            self._memory.used = 0
        self._files[path] = self._memory.copy(tensors)

    def start(self) -> None:
        self._answer = {}
        if self._files:
            self._send(WriteJob(self._memory.num_bytes, self._files))
        self._files = {}

    def publish(self, publication: Publication) -> None:
        self._send(publication)

    def answer(self, timeout: float) -> dict[Path, Written] | Exception | None:
        if self._answer is None and self._connection is not None:
            try:
                if self._connection.poll(timeout):
                    self._answer = self._connection.recv()
            except (EOFError, OSError):
                self._answer = self._gone()
        return self._answer

    def close(self) -> None:
        if self._connection is not None and self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.wait()
        self._connection = self._process = None
        self._memory.close()

    def _send(self, job: WriteJob | Publication) -> None:
        if self._connection is None:
            self._begin()
        assert self._connection is not None
        try:
            self._connection.send(job)
            self._answer = None
        except OSError:
            self._answer = self._gone()

    def _begin(self) -> None:
        ours, theirs = socket.socketpair()
        fds = (theirs.fileno(), self._memory.fd)
        module = "ppomax.engine.checkpoint_process"
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, fds), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            # What is left of a killed rank's output must not wait for another process.
            stdout=subprocess.DEVNULL,
            pass_fds=fds,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # signals to the rank's process group are not for it
        )
        theirs.close()
        self._connection = Connection(ours.detach())

    def _gone(self) -> Exception:
        assert self._process is not None
        code = self._process.wait(timeout=10)
        return RuntimeError(f"the writer process ended by itself (exit code {code}); see its message above, if any")


class SharedMemory:
    """Host memory without a name, which other processes map through its file descriptor; it only grows. On CUDA it is
    pinned. used: bytes taken; 0 begins anew.
    """

    def __init__(self) -> None:
        self.fd = os.memfd_create("checkpoint")
        self.num_bytes = self.used = 0
        self._bytes = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._is_pinned = False

    def copy(self, tensors: tuple[Tensor, ...]) -> tuple[Place, ...]:
        """Copies tensors behind what is there; they may change when it returns."""
        places = []
        for tensor in tensors:
            places.append(Place(self.used, tuple(tensor.shape), tensor.dtype))
            self.used += -(-tensor.numel() * tensor.itemsize // ALIGNMENT) * ALIGNMENT
        self._grow(self.used)
        with torch_functions_as_they_are():
            for tensor, place in zip(tensors, places, strict=True):
                target = self._bytes[place.start : place.start + tensor.numel() * tensor.itemsize]
                target.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors):
            torch.cuda.current_stream().synchronize()
        return tuple(places)

    def close(self) -> None:
        if self.fd >= 0:
            self._unpin()
            self._bytes = torch.empty(0, dtype=torch.uint8, device="cpu")
            os.close(self.fd)
            self.fd = -1

    def _grow(self, num_bytes: int) -> None:
        if num_bytes <= self.num_bytes:
            return
        self._unpin()
        os.ftruncate(self.fd, num_bytes)
        self.num_bytes = num_bytes
        self._bytes = torch.frombuffer(mmap.mmap(self.fd, num_bytes), dtype=torch.uint8)
        if torch.cuda.is_available():
            error = int(torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), num_bytes, 0))
            if error != 0:
                raise DoesNotFitError(
                    f"{num_bytes / 2**30:.1f} GiB of host memory for a checkpoint's copy cannot be pinned (CUDA error "
                    f"{error}); let this process lock more memory (ulimit -l), or set checkpoint.asynchronous = false"
                )
            self._is_pinned = True

    def _unpin(self) -> None:
        if self._is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())
            self._is_pinned = False
