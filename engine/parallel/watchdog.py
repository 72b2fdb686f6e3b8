"""Says which rank others wait for in vain, and ends the run: a rank may hang, which no error of its own tells.

Every rank has a thread that asks the store of the run, now and then, whether some rank has waited too long. Then each
of these threads answers where its rank is, and the rank that asked first names those that are missing: they do not
answer, or they do something else than wait. Before that nothing is sent but these questions.

With NCCL it also ends ranks that wait: NCCL would end the process, without a word about the others, a little later
(`collective_timeout`). With gloo the program gets an error, and asks by itself (`explain`).
"""

import contextlib
import json
import linecache
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed import distributed_c10d

from ppomax.engine.errors import PeerFailedError
from ppomax.engine.parallel.collectives import peer_failure

LONGEST_INTERVAL = 2.0
"""Seconds between two looks of a rank's thread at the store: 2048 requests a second for 4096 ranks."""
STORE_SECONDS = 10.0
"""How long the store may take to answer a request."""
SECONDS_TO_LEAVE = 8.0
"""How long a rank may take to end by itself after the verdict: cli.py lets the missing rank end first."""
MAX_NAMED = 8
"""Ranks that a message names one by one."""
WAITING_LINE = re.compile(r"\.wait\(|barrier\(|synchronize\(|\.item\(|\.tolist\(|\.cpu\(")
"""A line of code that may wait for other ranks: outside of torch.distributed, or for a GPU that has a collective."""

Stack = Sequence[tuple[FrameType, int]]
"""Frames and line numbers, outermost first."""


@dataclass(frozen=True)
class Place:
    """Where a rank's program is. waits: for other ranks, as far as its line of code tells. seconds: how long it has
    waited there, or has begun no collective.
    """

    text: str
    waits: bool
    seconds: float


class Watchdog:
    """Watches the program of this rank, which is the thread that makes it. With one rank it does nothing.

    Making one is collective over the world.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout = timeout_seconds
        self._interval = min(LONGEST_INTERVAL, timeout_seconds / 20)
        self._program = threading.get_ident()
        self._since = time.monotonic()
        self._mark: tuple[Any, ...] = ()
        self._lost: Place | None = None
        self._round = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        if dist.get_world_size() > 1:
            name = [f"watchdog_{time.time_ns()}"]
            dist.broadcast_object_list(name, src=0)
            # A connection of its own: a store answers its requests one after another, and some of them wait.
            store = distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]  # torch's stubs lack it
            store.set_timeout(timedelta(seconds=STORE_SECONDS))
            self._store = dist.PrefixStore(name[0], store)
            self._thread = threading.Thread(target=self._watch, name="ppomax-watchdog", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=STORE_SECONDS)

    def explain(self, error: BaseException) -> None:
        """Raises PeerFailedError with the names of the missing where the error says that another rank is lost."""
        lost = peer_failure(error) if isinstance(error, Exception) and self._thread is not None else None
        if lost is None:
            self._ended.set()
            return
        stack = list(traceback.walk_tb(error.__traceback__))[1:]  # the first frame is the caller's own
        self._lost = Place(_describe(stack), True, time.monotonic() - self._since)
        verdicts: list[dict[str, Any]] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError, TimeoutError):
                verdicts.append(self._verdict())

        # The store may be on a host that is gone: nothing may wait for it without end.
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(timeout=2 * self._interval + 2 * STORE_SECONDS)
        self._ended.set()
        if verdicts:
            raise PeerFailedError(f"{verdicts[0]['text']} ({str(error).splitlines()[0]})") from error
        raise PeerFailedError(f"{lost}; the store of the run does not answer: its host may be gone too") from error

    def _watch(self) -> None:
        with contextlib.suppress(RuntimeError, TimeoutError):  # the store is gone, and torchrun with it
            while not self._ended.wait(self._interval):
                seconds, stack = self._look()
                is_late = seconds > self._timeout and _waits(stack)
                if is_late or self._store.check([f"asked_{self._round}"]):
                    verdict = self._verdict()
                    if verdict["is_final"]:
                        self._end(verdict)
                        return
                    self._round, self._since = self._round + 1, time.monotonic()

    def _verdict(self) -> dict[str, Any]:
        """The text that all ranks end with, and who is missing: by the first rank that asks, for all."""
        rank, number = dist.get_rank(), self._round
        self._store.set(f"place_{number}_{rank}", json.dumps(asdict(self._place())))
        if int(self._store.add(f"num_asked_{number}", 1)) > 1:
            return self._others_verdict(number)
        self._store.set(f"asked_{number}", "1")
        # Each thread looks once per interval; one that holds the interpreter's lock, or is stopped, never does.
        time.sleep(2 * self._interval + 0.5)
        places = {rank: self._answer(number, rank) for rank in range(dist.get_world_size())}
        missing = [rank for rank, place in places.items() if self._is_missing(place)]
        is_final = bool(missing) or self._lost is not None
        verdict = {"text": _sentence(rank, places, missing), "missing": missing, "is_final": is_final}
        self._store.set(f"verdict_{number}", json.dumps(verdict))
        return verdict

    def _others_verdict(self, number: int) -> dict[str, Any]:
        # Not by one request that waits: the threads of a rank share a connection, which it would block.
        deadline = time.monotonic() + 2 * self._interval + STORE_SECONDS
        while not self._store.check([f"verdict_{number}"]):
            if time.monotonic() > deadline:
                raise TimeoutError("the rank that asks where all are gives no verdict")
            time.sleep(0.1)
        return json.loads(self._store.get(f"verdict_{number}"))

    def _answer(self, number: int, rank: int) -> Place | None:
        key = f"place_{number}_{rank}"
        return Place(**json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _is_missing(self, place: Place | None) -> bool:
        return place is None or (not place.waits and place.seconds > self._timeout / 2)

    def _end(self, verdict: dict[str, Any]) -> None:
        """Ends this process, at once if the others wait for it, else if it does not end by itself."""
        rank = dist.get_rank()
        if rank in verdict["missing"]:
            where = "".join(traceback.format_stack(self._look()[1][-1][0]))
            _leave(f"ppomax: {verdict['text']}\nthis rank is here:\n{where}", 1)
        if not self._ended.wait(SECONDS_TO_LEAVE):
            said = self._lost is not None
            _leave("" if said else f"ppomax: PeerFailedError: {verdict['text']}\n", PeerFailedError.exit_code)

    def _look(self) -> tuple[float, Stack]:
        """Where the program is, and for how many seconds it has waited there, or has begun no collective."""
        stack = list(traceback.walk_stack(sys._current_frames().get(self._program)))[::-1]
        # A program that computes may move for ever: only collectives count. One that waits passes the same lines often.
        lines = [(id(frame.f_code), frame.f_lasti) for frame, _ in stack] if _waits(stack) else []
        mark = (*lines, _count_collectives())
        if mark != self._mark:
            self._mark, self._since = mark, time.monotonic()
        return time.monotonic() - self._since, stack

    def _place(self) -> Place:
        seconds, stack = self._look()
        return self._lost or Place(_describe(stack), _waits(stack), seconds)


def _sentence(asking: int, places: dict[int, Place | None], missing: Sequence[int]) -> str:
    def one(rank: int) -> str:
        place = places[rank]
        if place is None:
            return f"rank {rank} gives no sign of life (it ended, is stopped, or its host is gone)"
        return f"rank {rank} has been for {place.seconds:.0f} s in {place.text}"

    named = missing or [rank for rank in places if rank != asking]
    rest = f"; and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
    others = "; ".join(map(one, named[:MAX_NAMED])) + rest
    if missing:
        ranks = ", ".join(map(str, missing[:MAX_NAMED]))
        return f"{one(asking)}, where rank {ranks} did not arrive in time: {others}"
    return f"{one(asking)}, in vain; no rank is known to hang: {others}"


def _describe(stack: Stack) -> str:
    """Collective and group, if it is in one, and the way there through our functions: the phase of the run."""
    ours = [(frame, line) for frame, line in stack if frame.f_globals.get("__name__", "").startswith("ppomax.")]
    way = [frame.f_code.co_name for frame, _ in ours if not frame.f_code.co_name.startswith("_")]
    frame, line = ours[-1] if ours else stack[-1]
    place = f"{' > '.join(way) or frame.f_code.co_name} ({_file_and_line(frame, line)}, host {socket.gethostname()})"
    inner = [frame for frame, _ in stack if _is_distributed(frame) and "group" in frame.f_locals]
    if inner:
        group = inner[0].f_locals["group"]
        ranks = dist.get_process_group_ranks(group if isinstance(group, dist.ProcessGroup) else None)
        shown = ", ".join(map(str, ranks[:MAX_NAMED])) + (", ..." if len(ranks) > MAX_NAMED else "")
        return f"{inner[0].f_code.co_name} of ranks {shown}, in {place}"
    last, line = stack[-1]
    return place if last is frame else f"{last.f_code.co_name} ({_file_and_line(last, line)}), in {place}"


def _file_and_line(frame: FrameType, line: int) -> str:
    return f"{'/'.join(frame.f_code.co_filename.split('/')[-3:])}:{line}"


def _waits(stack: Stack) -> bool:
    frame, line = stack[-1]
    text = linecache.getline(frame.f_code.co_filename, line)
    return any(_is_distributed(frame) for frame, _ in stack) or WAITING_LINE.search(text) is not None


def _is_distributed(frame: FrameType) -> bool:
    return frame.f_code.co_filename == distributed_c10d.__file__


def _count_collectives() -> int:
    """Collectives that this rank has begun, in all of its groups: they tell a program that moves from one that stays at
    a line.
    """
    groups = list(distributed_c10d._world.pg_names)
    return sum(group._get_sequence_number_for_group() for group in groups)  # type: ignore[attr-defined]


def _leave(text: str, code: int) -> NoReturn:
    """Ends the process from a thread, whatever its program does. text: on standard error, every line with the rank."""
    prefix = f"[rank {dist.get_rank()}] "
    with contextlib.suppress(OSError):
        sys.stderr.write("".join(prefix + line for line in text.splitlines(keepends=True)))
        sys.stderr.flush()
    os._exit(code)
