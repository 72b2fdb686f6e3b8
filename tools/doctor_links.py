"""The links between ranks as `ppomax doctor` measures them: all-reduce, neighbours, clocks. Results are checked."""

import datetime
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ppomax.tools.doctor_findings import Finding

ALL_REDUCE_BYTES = {"cpu": (4096, 2**20, 2**24), "cuda": (4096, 2**20, 2**28)}
PEER_BYTES = {"cpu": 2**23, "cuda": 2**27}
REPEATS = 3
PATTERN = 7
"""Numbers below this are summed: fp32 holds the sum over 2000 ranks exactly."""


def measure(
    store: dist.Store, rank: int, world_size: int, device: torch.device, timeout_seconds: float
) -> dict[str, Any]:
    """This rank's times and errors: {"all_reduce": {bytes: seconds}, "peer": seconds to the next rank, "failed": text}.

    Joins the default process group. Every rank must call it; none waits longer than the time for any one step.
    """
    found: dict[str, Any] = {"all_reduce": {}, "peer": None, "failed": ""}
    step = "joining the process group"
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a late collective raises, instead of ending the process
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("doctor", store),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout_seconds),
        )
        for size in ALL_REDUCE_BYTES[device.type]:
            step = f"all-reduce of {size} bytes"
            found["all_reduce"][str(size)] = _all_reduce(size, rank, world_size, device)
        if world_size > 1:
            step = f"exchange with ranks {(rank - 1) % world_size} and {(rank + 1) % world_size}"
            found["peer"] = _exchange(PEER_BYTES[device.type], rank, world_size, device)
    except Exception as error:
        found["failed"] = f"{step}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return found


def _all_reduce(size: int, rank: int, world_size: int, device: torch.device) -> float:
    pattern = (torch.arange(size // 4, device=device) % PATTERN).float()
    values = torch.empty_like(pattern)
    seconds = []
    for _ in range(1 + REPEATS):
        torch.mul(pattern, rank + 1, out=values)
        seconds.append(_timed(lambda: dist.all_reduce(values), device))
        if not torch.equal(values, pattern * (world_size * (world_size + 1) / 2)):
            raise ValueError("the sum is wrong")
    return min(seconds[1:])  # the first one connects


def _exchange(size: int, rank: int, world_size: int, device: torch.device) -> float:
    """Sends to the next rank and receives from the one before, all ranks at once."""
    before, after = (rank - 1) % world_size, (rank + 1) % world_size
    sent, received = torch.full((size // 4,), float(rank + 1), device=device), torch.empty(size // 4, device=device)

    def exchange() -> None:
        sending, receiving = dist.P2POp(dist.isend, sent, after), dist.P2POp(dist.irecv, received, before)
        for work in dist.batch_isend_irecv([sending, receiving]):
            work.wait()

    seconds = []
    for _ in range(1 + REPEATS):
        received.zero_()
        seconds.append(_timed(exchange, device))
        if not bool((received == before + 1).all()):
            raise ValueError(f"what came from rank {before} is not what it sent")
    return min(seconds[1:])


def _timed(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def judge_links(told: Sequence[dict[str, Any] | None], places: Sequence[str], device: str) -> list[Finding]:
    """Findings from what `measure` returned on each rank, None where it did not return."""
    lost = [f"rank {rank} ({places[rank]}): no answer" for rank, one in enumerate(told) if one is None]
    lost += [f"rank {rank} ({places[rank]}): {one['failed']}" for rank, one in enumerate(told) if one and one["failed"]]
    if lost:
        found = "; ".join(lost[:6]) + (f"; {len(lost) - 6} more" if lost[6:] else "")
        fix = (
            "look at the host named first: firewall, GLOO_SOCKET_IFNAME / NCCL_SOCKET_IFNAME, cables; NCCL_DEBUG=INFO "
            "under the same torchrun says more"
        )
        return [Finding("links between ranks", "FAIL", found, fix)]
    results = [one for one in told if one is not None]
    world_size, parts = len(results), []
    for size in results[0]["all_reduce"]:
        seconds = max(one["all_reduce"][size] for one in results)
        moved = 2 * (world_size - 1) / world_size * int(size)
        rate = f", {moved / seconds / 1e9:.2f} GB/s" if world_size > 1 else ""
        parts.append(f"{_size(int(size))} in {seconds * 1e3:.2f} ms{rate}")
    findings = [Finding("all-reduce", "OK", f"right sums; {'; '.join(parts)}")]
    if world_size > 1:
        rates = [PEER_BYTES[device] / one["peer"] / 1e9 for one in results]
        slowest = min(range(world_size), key=lambda rank: rates[rank])
        middle = sorted(rates)[world_size // 2]
        before = (slowest - 1) % world_size
        pair = f"rank {before} ({places[before]}) to {slowest} ({places[slowest]})"
        text = (
            f"right contents; {_size(PEER_BYTES[device])} from each rank to the next: median {middle:.2f} GB/s, "
            f"slowest {rates[slowest]:.2f} GB/s, {pair}"
        )
        # The slowest of a ring that spans hosts is one between hosts, so only equals are compared.
        alike = [r for i, r in enumerate(rates) if (places[i] == places[i - 1]) == (places[slowest] == places[before])]
        is_slow = len(alike) > 2 and rates[slowest] < 0.5 * sorted(alike)[len(alike) // 2]
        fix = "one link has less than half of the rate of those like it: look at that pair's cables and ports"
        findings.append(Finding("neighbours", "WARN" if is_slow else "OK", text, fix if is_slow else ""))
    return findings


def clock_skew(store: dist.Store, rank: int, leaders: Sequence[int], timeout_seconds: float) -> dict[int, float]:
    """On rank 0: seconds that the clock of each of `leaders` is ahead of its own, to half a round trip. Every rank of
    `leaders` must call it.
    """
    timeout = datetime.timedelta(seconds=timeout_seconds)
    skews: dict[int, float] = {}
    try:
        if rank != 0 and rank in leaders:
            store.wait([f"clock/{rank}/ask"], timeout)
            store.set(f"clock/{rank}/answer", repr(time.time()))
        for other in leaders if rank == 0 else ():
            if other != 0:
                before = time.time()
                store.set(f"clock/{other}/ask", "1")
                store.wait([f"clock/{other}/answer"], timeout)
                skews[other] = float(store.get(f"clock/{other}/answer")) - (before + time.time()) / 2
    except RuntimeError:
        pass  # a rank that is gone shows in the measurement of links
    return skews


def _size(size: int) -> str:
    return f"{size // 2**20} MiB" if size >= 2**20 else f"{size // 1024} KiB"
