"""One long-lived pool of worker processes that all distributed tests share.

Importing megatron takes seconds, so it is imported once: a parent process imports the engine and forks the workers.
Each waits for jobs (function, arguments); a job runs on the first N workers, which find RANK, WORLD_SIZE and the
address of a fresh store in their environment, as under torchrun. For a job of one worker there are none of these.
This file is the pool and, run as a script, its processes; `conftest.py` gives tests the fixture `on_ranks`.
"""

import ctypes
import importlib
import importlib.util
import multiprocessing.connection
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

NUM_WORKERS = 4
"""Of a pool, until a job needs more."""
PEER_SECONDS = 30.0
"""After one worker failed, how long the others may take to notice before they are killed."""
PR_SET_PDEATHSIG = 1


class Pool:
    """Starts its processes with the first job and again after a job that left workers hanging; `close` ends them."""

    def __init__(self) -> None:
        self._connections: list[Connection] = []
        self._parent: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - what the workers print, as long as they live

    def run(self, num_ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        """What `function(*args)` returns on each of num_ranks workers that form a world of their own.

        function: at the top level of its file, which the workers import by its path.
        Raises what a failing worker raised, with its traceback as a note; after `timeout` seconds TimeoutError,
        with the end of what the workers printed.
        """
        if num_ranks > len(self._connections):
            self.close()
            self._start(max(NUM_WORKERS, num_ranks))
        # The store lives in this process and gets a free port: no two jobs can meet in one.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        job = pickle.dumps((num_ranks, store.port, function.__code__.co_filename, function.__qualname__, args))
        for connection in self._connections[:num_ranks]:
            connection.send_bytes(job)
        return self._collect(self._connections[:num_ranks], time.monotonic() + timeout)

    def close(self) -> None:
        """Kills every process of the pool."""
        if self._parent is not None:
            os.killpg(self._parent.pid, signal.SIGKILL)
            self._parent.wait()
        for connection in self._connections:
            connection.close()
        self._connections, self._parent = [], None

    def _start(self, num_workers: int) -> None:
        pairs = [multiprocessing.Pipe() for _ in range(num_workers)]
        theirs = [theirs.fileno() for _, theirs in pairs]
        self._connections = [ours for ours, _ in pairs]
        self._parent = subprocess.Popen(
            [sys.executable, "-P", __file__, str(os.getpid()), *map(str, theirs)],
            pass_fds=theirs,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        for _, connection in pairs:
            connection.close()

    def _collect(self, connections: list[Connection], deadline: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: list[Exception] = []
        while len(results) < len(connections):
            waiting = [connection for rank, connection in enumerate(connections) if rank not in results]
            ready = multiprocessing.connection.wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                ranks = [rank for rank in range(len(connections)) if rank not in results]
                self.close()
                raise _cause(failures) or TimeoutError(
                    f"ranks {ranks} did not finish in time; printed: {self._printed()}"
                )
            for rank in [rank for rank, connection in enumerate(connections) if connection in ready]:
                try:
                    is_error, results[rank] = pickle.loads(connections[rank].recv_bytes())
                except (EOFError, OSError):
                    self.close()
                    raise _cause(failures) or RuntimeError(f"rank {rank} died; printed: {self._printed()}") from None
                if is_error:
                    failures.append(results[rank])
                    deadline = min(deadline, time.monotonic() + PEER_SECONDS)
        failure = _cause(failures)
        if failure is not None:
            raise failure
        return [results[rank] for rank in range(len(connections))]

    def _printed(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-6000:]


def _cause(failures: list[Exception]) -> Exception | None:
    """The first error that does not just say that another rank is gone."""
    echoes = ("by peer", "another rank")
    telling = [error for error in failures if not any(echo in str(error) for echo in echoes)]
    return next(iter(telling + failures), None)


def load_module(path: str | Path) -> ModuleType:
    """Imports a file by its path, once: pytest's importlib mode gives test files no importable name."""
    path = Path(path)
    name = f"_by_path_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _die_with(parent: int) -> None:
    """Linux kills this process when its parent ends, however it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _fork_workers(connections: list[Connection]) -> None:
    """Imports the engine, forks a worker per connection and waits for all of them."""
    importlib.import_module("ppomax.engine.train_ppo")
    torch.set_num_threads(1)
    parent = os.getpid()
    for rank, connection in enumerate(connections):
        if os.fork() == 0:
            _die_with(parent)
            for other in connections:
                if other is not connection:
                    other.close()
            _work(connection, rank)
            os._exit(0)
    for connection in connections:
        connection.close()
    for _ in connections:
        os.wait()


def _work(connection: Connection, rank: int) -> None:
    """Runs jobs until the pool is gone."""
    while True:
        try:
            num_ranks, port, file, function, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        world = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": num_ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
        }
        for name, value in world.items():
            os.environ.pop(name, None)
            if num_ranks > 1:
                os.environ[name] = str(value)
        try:
            answer = pickle.dumps((False, getattr(load_module(file), function)(*args)))
        except Exception as error:
            answer = _pickled_error(error, rank)
        connection.send_bytes(answer)
        if dist.is_initialized():
            dist.destroy_process_group()
        # A group that could not be made was counted all the same: names of the next job's would differ between workers.
        dist.distributed_c10d._world.group_count = 0


def _pickled_error(error: Exception, rank: int) -> bytes:
    error.add_note(f"rank {rank}:\n{traceback.format_exc()}")
    try:
        answer = pickle.dumps((True, error))
        pickle.loads(answer)
    except Exception:
        answer = pickle.dumps(
            (True, RuntimeError(f"{type(error).__name__}: {error}\nrank {rank}:\n{traceback.format_exc()}"))
        )
    return answer


if __name__ == "__main__":
    _die_with(int(sys.argv[1]))
    _fork_workers([Connection(int(fd)) for fd in sys.argv[2:]])
