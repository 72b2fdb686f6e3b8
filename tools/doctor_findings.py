"""What `ppomax doctor` says: one finding per check, and the judgement of what the ranks told about themselves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ppomax.engine.errors import ConfigError, PpomaxError
from ppomax.engine.parallel.environment import differences, ranks_of

GIB = 2**30
LEAST_SHM = 2 * GIB
"""NCCL takes a few MiB of shared memory per pair of ranks of a host, vLLM and worker processes more; containers often
start with 64 MiB."""
LEAST_FILES = 4096
"""Open files: every rank has a socket to every other one with gloo, and files of a sharded checkpoint."""
MOST_SKEW = 2.0
"""Seconds between clocks: logs of hosts should have one order."""
LEAST_MEMORY = 4.0
"""GiB of a host: a process takes about one before it has a model."""
FREE_SHARE = 0.9
"""Of a GPU's memory: less is free where another process uses it."""


@dataclass(frozen=True)
class Finding:
    """One row. error: what the command ends with where this is the first that failed."""

    check: str
    status: Literal["OK", "WARN", "FAIL"]
    found: str
    fix: str = ""
    error: type[PpomaxError] = ConfigError


def judge(told: Sequence[Mapping[str, Any] | None], places: Sequence[str]) -> list[Finding]:
    """Findings from the facts of each rank (doctor_facts.py), None of those that told nothing. places: their hosts."""
    findings = _present(told, places)
    here = [rank for rank, one in enumerate(told) if one is not None and "failed" not in one]
    facts = {rank: told[rank] or {} for rank in here}
    if not here:
        return findings
    hosts = [places[rank] for rank in here]
    findings += _versions([facts[rank]["versions"] for rank in here], hosts, here)
    findings += [_gpus(facts, places), *_gpu_problems(facts, places)]
    findings += _network(facts, places)
    leaders = {rank: one for rank, one in facts.items() if one["local_rank"] == 0} or facts
    findings += _host_limits(leaders, places)
    findings += [Finding(f"optional: {name}", "OK", text) for name, text in facts[here[0]]["optional"].items()]
    return findings


def _present(told: Sequence[Mapping[str, Any] | None], places: Sequence[str]) -> list[Finding]:
    missing = [rank for rank, one in enumerate(told) if one is None]
    if missing:
        fix = "look at the messages of their hosts; they never reached this check, or hang"
        return [Finding("ranks", "FAIL", f"no word from {ranks_of(missing, places)}", fix)]
    broken = [
        f"rank {rank} ({places[rank]}): {one['failed']}" for rank, one in enumerate(told) if one and "failed" in one
    ]
    if broken:
        return [Finding("ranks", "FAIL", "; ".join(broken[:4]), "repair the installation on that host")]
    num_hosts = len(set(places))
    return [Finding("ranks", "OK", f"{len(told)} on {num_hosts} {'host' if num_hosts == 1 else 'hosts'}")]


def _versions(versions: Sequence[Mapping[str, str]], hosts: Sequence[str], ranks: Sequence[int]) -> list[Finding]:
    if list(ranks) != list(range(len(ranks))):
        versions, hosts = versions[:1], hosts[:1]  # numbers of ranks would be wrong; the missing ones are the fault
    differing = differences(versions, hosts)
    fix = "install the same versions, and the same checkout of ppomax, on every host"
    faults = [Finding("versions", "FAIL", text, fix) for text in differing]
    known = ", ".join(f"{name} {value}" for name, value in versions[0].items() if value and value != "none")
    return faults or [Finding("versions", "OK", f"equal on all ranks: {known}" if len(versions) > 1 else known)]


def _gpus(facts: Mapping[int, Mapping[str, Any]], places: Sequence[str]) -> Finding:
    kinds: dict[str, list[int]] = {}
    for rank, one in facts.items():
        gpu = one["gpu"]
        text = "none, CPU with gloo"
        if gpu is not None:
            text = f"{gpu['name']} ({gpu['total'] / GIB:.0f} GiB, sm_{gpu['capability']}, ECC {gpu['ecc']})"
        kinds.setdefault(text, []).append(rank)
    found = "; ".join(f"{text} on {ranks_of(ranks, places)}" for text, ranks in kinds.items())
    if len(kinds) == 1:
        return Finding("GPU of each rank", "OK", found)
    fix = "the slowest sets the pace, and numbers differ between kinds: take hosts of one kind"
    return Finding("GPU of each rank", "WARN", found, fix)


def _gpu_problems(facts: Mapping[int, Mapping[str, Any]], places: Sequence[str]) -> list[Finding]:
    findings = []
    for rank, one in facts.items():
        gpu, place = one["gpu"], f"rank {rank} ({places[rank]})"
        if one["gpu_fault"]:
            findings.append(Finding("GPU", "FAIL", f"{place}: {one['gpu_fault']}", one["gpu_fix"]))
        if gpu is None:
            continue
        if gpu["free"] < FREE_SHARE * gpu["total"]:
            text = f"{place}: {gpu['free'] / GIB:.1f} of {gpu['total'] / GIB:.1f} GiB free"
            findings.append(Finding("GPU memory", "WARN", text, "another process uses this GPU: see nvidia-smi there"))
        if int(gpu["capability"]) < 80:
            text = f"{place}: compute capability {gpu['capability']}"
            findings.append(Finding("GPU", "WARN", text, "bf16 and the Triton kernels are made for 8.0 and above"))
        if gpu["ecc_errors"] not in ("", "0", "[N/A]"):
            text = f"{place}: {gpu['ecc_errors']} uncorrected memory errors since it started"
            findings.append(Finding("GPU memory", "WARN", text, "reset or replace this GPU before a long run"))
    return findings


def _network(facts: Mapping[int, Mapping[str, Any]], places: Sequence[str]) -> list[Finding]:
    routes = {rank: one["network"] for rank, one in facts.items() if one["local_rank"] == 0} or {
        rank: one["network"] for rank, one in facts.items()
    }
    shown = [
        f"{places[rank]}: gloo on {net['gloo_interface']} ({net['gloo_address']}), InfiniBand {net['infiniband']}"
        + (f", {net['links']}" if net["links"] else "")
        for rank, net in routes.items()
    ]
    findings = [Finding("network", "OK", "; ".join(shown[:8]) + (f"; {len(shown) - 8} more" if shown[8:] else ""))]
    variables = sorted({f"{name}={value}" for net in routes.values() for name, value in net["variables"].items()})
    findings.append(Finding("NCCL and gloo variables", "OK", ", ".join(variables) or "none set"))
    for rank, net in routes.items():
        if not net["one_host"] and net["gloo_address"].startswith("127."):
            way = net["route"][0] or "the interface that other hosts reach"
            text = f"{places[rank]}: gloo would listen on {net['gloo_address']}, which other hosts do not reach"
            findings.append(Finding("network", "FAIL", text, f"set GLOO_SOCKET_IFNAME={way} on that host"))
        if net["unknown_interface"]:
            text = f"{places[rank]}: {net['unknown_interface']}, but there is no such interface"
            findings.append(Finding("network", "FAIL", text, f"choose one of {', '.join(net['interfaces'])}"))
    return findings


def _host_limits(leaders: Mapping[int, Mapping[str, Any]], places: Sequence[str]) -> list[Finding]:
    findings = []
    for rank, one in leaders.items():
        limits, place = one["limits"], places[rank]
        skew, free, total = one.get("skew", 0.0), limits["memory"] / GIB, limits["total_memory"] / GIB
        shm_fix = "docker run --shm-size=16g, or an emptyDir of medium Memory at /dev/shm"
        files_fix = f"ulimit -n {LEAST_FILES} or more before the start"
        checks = (
            ("shared memory", limits["shm"] < LEAST_SHM, f"{limits['shm'] / GIB:.1f} GiB free in /dev/shm", shm_fix),
            ("open files", limits["files"] < LEAST_FILES, f"{limits['files']} (ulimit -n)", files_fix),
            ("clock", abs(skew) > MOST_SKEW, f"{skew:+.3f} s against rank 0", "synchronise the clocks (NTP, chrony)"),
            ("host memory", free < LEAST_MEMORY, f"{free:.1f} of {total:.1f} GiB free", "end what else runs there"),
        )
        for name, is_bad, text, fix in checks:
            findings.append(Finding(name, "WARN" if is_bad else "OK", f"{place}: {text}", fix if is_bad else ""))
    return _merged(findings)


def _merged(findings: Sequence[Finding]) -> list[Finding]:
    """Hosts of which the same can be said, in one row."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for one in findings:
        rows.setdefault((one.check, one.status, one.fix), []).append(one.found)
    merged = []
    for (check, status, fix), texts in rows.items():
        found = "; ".join(texts[:6]) + (f"; {len(texts) - 6} more" if texts[6:] else "")
        merged.append(Finding(check, "WARN" if status == "WARN" else "OK", found, fix))
    return merged
