"""When a rank worked on what: spans of time, one file per rank, for chrome://tracing or ui.perfetto.dev."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch


class Trace:
    """Appends events to a file in Chrome's trace format (a JSON array whose end may be missing).

    Times are of the host's clock, microseconds: ranks of one host, or of hosts with equal clocks, lie side by side.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self._path, self._rank = path, rank
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[\n")

    def add(self, name: str, start: int, end: int) -> None:
        """start, end: nanoseconds since the epoch."""
        thread = int(threading.current_thread() is not threading.main_thread())
        event = {"name": name, "ph": "X", "pid": self._rank, "tid": thread}
        event |= {"ts": start / 1000, "dur": (end - start) / 1000}
        with self._path.open("a") as file:
            file.write(json.dumps(event) + ",\n")


@contextlib.contextmanager
def span(trace: Trace | None, name: str, *, is_here: bool = True) -> Iterator[None]:
    """The body is an event of the trace, if there is one and the work is done on this rank; and a named range where
    torch's profiler looks on.

    On a GPU it then waits for the device, so that the span has the work and not its launch.
    """
    start = time.time_ns()
    with torch.profiler.record_function(name):
        yield
    if trace is not None and is_here:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        trace.add(name, start, time.time_ns())
