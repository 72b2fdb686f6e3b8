"""Asked to stop: SIGTERM and SIGUSR1 are only noted, and all ranks agree at the end of a step to save and end.

Python runs a handler between two instructions of the main thread, which may be waiting in a collective for a rank that
is gone. So a thread hears of every signal at once (`signal.set_wakeup_fd`), and ends a process that reaches no end of a
step in time, or that gets a second SIGTERM.
"""

import math
import os
import select
import signal
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

from ppomax.engine.errors import ENDED_BY_SIGTERM
from ppomax.engine.parallel.device import this_device

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ONE_REQUEST_SECONDS = 5.0
"""SIGTERMs within this time are one: a scheduler signals every process of a job, and torchrun passes its own on."""
_CLOSE, _AGREED = b"\x00", b"\xff"  # written into the pipe beside numbers of signals, which lie between


class StopSignal:
    """Notes requests to stop while its `with` block runs.

    grace_seconds: how long after SIGTERM a process may take to the end of a step. SIGUSR1 leaves it all the time.
    """

    def __init__(self, grace_seconds: float) -> None:
        self.grace_seconds = grace_seconds
        self.asked = 0
        """The number of the signal, 0 where there was none."""
        self._is_listening = False

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python gives signals to the main thread alone
        self._pipe, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._handlers = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        self._fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="stop signal", daemon=True)
        self._thread.start()
        self._is_listening = True
        return self

    def __exit__(self, *_: object) -> None:
        if not self._is_listening:
            return
        self._is_listening = False
        signal.set_wakeup_fd(self._fd)
        if not self.asked:  # else the request may come once more, from a scheduler, torchrun or a script
            for signum, handler in self._handlers.items():
                signal.signal(signum, handler)
        os.write(self._write, _CLOSE)
        self._thread.join()
        os.close(self._pipe)
        os.close(self._write)

    def agreed(self) -> int:
        """The signal that asked any rank to stop, 0 where none did: the same on every rank. Collective over the world.

        From then on the process may take the time that saving takes.
        """
        asked = torch.tensor(float(self.asked), device=this_device())
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        signum = int(asked)
        if signum and self._is_listening:
            os.write(self._write, _AGREED)
        return signum

    def _note(self, signum: int, frame: Any) -> None:
        self.asked = max(self.asked, signum)

    def _watch(self) -> None:
        first = math.inf  # SIGTERM
        deadline: float | None = None
        pipe = select.poll()  # select() takes no file descriptor above 1023
        pipe.register(self._pipe, select.POLLIN)
        while True:
            timeout = None if deadline is None else 1000 * max(0.0, deadline - time.monotonic())
            if not pipe.poll(timeout):
                _end(f"no step ended within train.stop_seconds = {self.grace_seconds:g} of SIGTERM")
            for byte in os.read(self._pipe, 64):
                now = time.monotonic()
                if byte == _CLOSE[0]:
                    return
                if byte == _AGREED[0]:
                    deadline = None
                elif byte == signal.SIGTERM and first == math.inf:
                    first, deadline = now, now + self.grace_seconds
                elif byte == signal.SIGTERM and now - first > ONE_REQUEST_SECONDS:
                    _end("a second SIGTERM")


def _end(why: str) -> None:
    """Ends the process from beside a main thread that may never answer again."""
    rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
    os.write(2, f"{rank}ppomax: {why}: ends without saving; the last published checkpoint is whole\n".encode())
    os._exit(ENDED_BY_SIGTERM)
