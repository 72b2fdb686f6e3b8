"""What must be the same on every rank of a run, compared before the first collective: versions, code, configuration.

Ranks speak through the store of the rendezvous, not through a process group: it works before NCCL or gloo do, and it
knows which rank is missing. Nothing but JSON is exchanged.
"""

import contextlib
import datetime
import hashlib
import json
import os
import platform
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from ppomax.engine.config import RunConfig
from ppomax.engine.errors import ConfigError, PeerFailedError

PACKAGES = ("ppomax", "torch", "triton", "megatron-core", "transformers", "tokenizers", "numpy")
SWITCHES = ("PPOMAX_KERNELS", "TRITON_INTERPRET")
"""Environment variables that choose what computes."""
MOST_SHOWN = 12
"""Differences that one message lists."""
POLL_SECONDS = 0.02
SLACK_SECONDS = 15.0
"""How much longer than the first rank the others wait, so that it can say who is missing."""


def versions() -> dict[str, str]:
    """Versions and switches that decide a run's numbers, of this process."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["ppomax source"] = source_digest()
    found["device"] = "CUDA" if torch.cuda.is_available() else "CPU"
    found["CUDA"] = torch.version.cuda or "none"
    found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none"
    return found | {f"${name}": os.environ.get(name, "") for name in SWITCHES}


def source_digest() -> str:
    """A hash over the files of engine/ and kernels/: two checkouts of one version may differ."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("engine", "kernels") for path in (root / folder).rglob("*.[cp]*")):
        if path.suffix in (".py", ".c"):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def settings(config: RunConfig) -> dict[str, str]:
    """Every field of a configuration, as `section.field`."""
    tree = config.model_dump(mode="json")
    return {f"{section}.{key}": json.dumps(value) for section, fields in tree.items() for key, value in fields.items()}


def check_same_everywhere(
    store: dist.Store, rank: int, world_size: int, facts: Mapping[str, str], timeout_seconds: float
) -> dist.Store:
    """Raises ConfigError, on every rank, where `facts` differ between ranks: names them, the ranks and their hosts.
    PeerFailedError where a rank does not tell its facts in time. Every rank must call it, once per store.

    Returns the part of the store that belongs to these ranks alone. A torchrun that starts its ranks again
    (`--max-restarts`) keeps the store with all that the ranks before them wrote, addresses of process groups included;
    and its count of restarts is each host's own. So the first rank names the attempt anew, and the others go on where
    it answered what they have just told.
    """
    key = uuid.uuid4().hex
    told = {"host": socket.gethostname(), "facts": dict(facts), "key": key}
    own: dist.Store
    if rank == 0:
        own = dist.PrefixStore(key, store)
        store.set("attempt", key)
        everyone = tell_first(own, "environment", 0, world_size, told, timeout_seconds)
        assert everyone is not None
        verdict = _verdict(everyone, timeout_seconds)
        own.set("environment/verdict", json.dumps(verdict))
    else:
        own, verdict = _answer_first(store, rank, told, timeout_seconds + 2 * SLACK_SECONDS)
    if verdict["missing"]:
        raise PeerFailedError(verdict["missing"])
    if verdict["differing"]:
        faults = "\n".join(f"  {one}" for one in verdict["differing"][:MOST_SHOWN])
        raise ConfigError(
            f"the ranks of this run differ, and would not compute the same:\n{faults}\nuse one environment, one "
            "configuration and the same arguments on every host (`ppomax doctor` under the same torchrun shows more)"
        )
    return own


def _verdict(everyone: Sequence[Any], timeout_seconds: float) -> dict[str, Any]:
    missing = [number for number, one in enumerate(everyone) if one is None]
    verdict: dict[str, Any] = {"keys": [one and one["key"] for one in everyone], "missing": "", "differing": []}
    if missing:
        verdict["missing"] = (
            f"{_ranks(missing)} did not start within {timeout_seconds:g} s; see the messages of their hosts"
        )
    else:
        hosts, all_facts = zip(*((one["host"], one["facts"]) for one in everyone), strict=True)
        verdict["differing"] = differences(all_facts, hosts)
    return verdict


def _answer_first(store: dist.Store, rank: int, told: Mapping[str, Any], seconds: float) -> tuple[dist.Store, Any]:
    """Tells the first rank until it has answered this very process."""
    deadline, named, text = time.monotonic() + seconds, "", json.dumps(told)
    own = store
    while time.monotonic() < deadline:
        if store.check(["attempt"]) and (attempt := store.get("attempt").decode()) != named:
            named, own = attempt, dist.PrefixStore(attempt, store)
            own.set(f"environment/{rank}", text)
        if named and own.check(["environment/verdict"]):
            verdict = json.loads(own.get("environment/verdict"))
            if verdict["keys"][rank] == told["key"]:
                return own, verdict
        time.sleep(POLL_SECONDS)
    raise PeerFailedError("rank 0 did not compare the ranks' environments in time; see its message")


def differences(facts: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> list[str]:
    """One text per fact that is not the same on all ranks: `torch: 2.13.0 on ranks 0-7 (a); 2.12.0 on rank 8 (b)`."""
    texts = []
    for name in dict.fromkeys(name for one in facts for name in one):
        ranks: dict[str, list[int]] = {}
        for rank, one in enumerate(facts):
            ranks.setdefault(one.get(name, "unknown"), []).append(rank)
        if len(ranks) > 1:
            parts = [f"{value or 'not set'} on {ranks_of(where, hosts)}" for value, where in ranks.items()]
            texts.append(f"{name}: {'; '.join(parts)}")
    return texts


def ranks_of(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """ "ranks 0-7 (host a, host b)"."""
    names = list(dict.fromkeys(hosts[rank] for rank in ranks))
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"{_ranks(ranks)} ({shown})"


def tell_first(
    store: dist.Store, topic: str, rank: int, world_size: int, content: Any, timeout_seconds: float
) -> list[Any] | None:
    """On rank 0 what each rank told about a topic, None for those that did not within the time; elsewhere None, at
    once. content: what JSON can hold.
    """
    store.set(f"{topic}/{rank}", json.dumps(content))
    if rank != 0:
        return None
    deadline = time.monotonic() + timeout_seconds
    return [_read(store, f"{topic}/{number}", deadline - time.monotonic()) for number in range(world_size)]


def hear_first(store: dist.Store, topic: str, rank: int, content: Any, timeout_seconds: float) -> Any:
    """What rank 0 says about a topic, on every rank; None where it does not within the time."""
    if rank == 0:
        store.set(topic, json.dumps(content))
    return _read(store, topic, timeout_seconds)


def _read(store: dist.Store, key: str, seconds: float) -> Any:
    try:
        store.wait([key], datetime.timedelta(seconds=max(0.05, seconds)))
        return json.loads(store.get(key))
    except (RuntimeError, json.JSONDecodeError):
        return None


def keep_to_this_host() -> None:
    """Before process groups are made: where all ranks are on this host, gloo and NCCL listen on its loopback interface
    alone; on several hosts gloo gets the interface of the way to MASTER_ADDR where it would listen on loopback. What
    the user has set stays.
    """
    name = loopback()
    if is_one_host():
        if name is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # "=": this name, not those that begin with it
    elif "GLOO_SOCKET_IFNAME" not in os.environ and gloo_address().startswith("127."):
        interface, _ = route_to(os.environ.get("MASTER_ADDR", ""))
        if interface is not None and interface != name:
            os.environ["GLOO_SOCKET_IFNAME"] = interface


def is_one_host() -> bool:
    """Whether all ranks of the run are on this host."""
    world_size, here = os.environ.get("WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE")
    if here is None:
        return world_size == "1" or os.environ.get("MASTER_ADDR", "") in ("127.0.0.1", "::1", "localhost")
    return here == world_size


def loopback() -> str | None:
    """The name of the interface that has 127.0.0.1."""
    return _interface_of("127.0.0.1")


def gloo_address() -> str:
    """Where gloo listens unless GLOO_SOCKET_IFNAME is set: what this host's name stands for, else loopback."""
    try:
        return str(socket.getaddrinfo(socket.gethostname(), None, proto=socket.IPPROTO_TCP)[0][4][0])
    except OSError:
        return "127.0.0.1"


def route_to(address: str) -> tuple[str | None, str]:
    """(interface, own address) from which this host reaches another; (None, "") without a way. Sends nothing."""
    for family, kind, _, _, target in _resolved(address):
        with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
            probe.connect(target)
            own = probe.getsockname()[0]
            return _interface_of(own), own
    return None, ""


def _resolved(address: str) -> list[Any]:
    try:
        return socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return []


def _interface_of(address: str) -> str | None:
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    return None


def _ranks(ranks: Sequence[int]) -> str:
    """ "rank 3", "ranks 0-3, 6"."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and parts[-1][1] == rank - 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
    return f"rank{'' if len(ranks) == 1 else 's'} {text}"
