"""Tests, then times every operation of kernels/ against its peers, on the GPU or else the CPU: `make bench-kernels`.

    python -m ppomax.tools.bench_kernels [--only OP ...] [--skip-tests] [--device cpu] [--output FOLDER]

An operation whose tests fail is not timed, and the exit code is 1. The report goes to
docs/benchmarks/<date>-kernels-<device>/.
"""

import argparse
import datetime
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ppomax.tools import bench_ops
from ppomax.tools.bench_ops import Item
from ppomax.tools.bench_peers import Contender, eager_contenders, library_contenders, versions
from ppomax.tools.bench_report import COLUMNS, OURS, Row, cells, write
from ppomax.tools.bench_timing import Ceilings, Measured, captured, ceilings, measure, summary
from ppomax.tools.kernel_inputs import Maker

ROOT = Path(__file__).resolve().parents[1]
SECONDS = {"cuda": 0.2, "cpu": 0.05}
"""For each version in each of the two repeats."""

SHARED_TESTS = "test_transformer_ops.py"
"""Of operations that have no file of their own."""

CPUS_PER_TEST = 4
IN_PLACE = "works in place, so only once for each forward pass: see both together"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ppomax.tools.bench_kernels", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="OP", help="operations, by the name of their file in kernels/")
    parser.add_argument("--skip-tests", action="store_true", help="time without testing first")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="time torch.compile too (default: on cuda)"
    )
    parser.add_argument("--seconds", type=float, help="for each version and repeat (default 0.2 on cuda, 0.05 on cpu)")
    parser.add_argument("--output", type=Path, help="folder of the report")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    every = bench_ops.items(device)
    ops = list(dict.fromkeys(item.op for item in every))
    if unknown := set(arguments.only or ()) - set(ops):
        sys.exit(f"bench_kernels: no operation {', '.join(sorted(unknown))}; there are {', '.join(ops)}")
    chosen = [op for op in ops if op in (arguments.only or ops)]
    red = [] if arguments.skip_tests else failing(chosen, device)
    seconds = arguments.seconds or SECONDS[device.type]
    limits = ceilings(device, seconds=seconds)
    print(f"{limits.bytes_per_second / 1e12:.3g} TB/s, {limits.flops_per_second / 1e12:.3g} TFLOP/s: {limits.what}")
    print("  ".join(COLUMNS))
    rows = [Row(op, "", "", OURS, note="tests fail: not timed") for op in red]
    with_compile = arguments.compile if arguments.compile is not None else device.type == "cuda"
    for item in every:
        if item.op in chosen and item.op not in red:
            try:
                for row in timed(item, device, limits, seconds=seconds, compiled=with_compile):
                    print("  ".join(cells(row)), flush=True)
                    rows.append(row)
            except Exception as error:  # of ours: the other operations are still worth a report, and the run fails
                rows.append(Row(item.op, item.case.name, "", OURS, note=f"{type(error).__name__}: {error}"[:300]))
                print("  ".join(cells(rows[-1])), flush=True)
    tests = "skipped" if arguments.skip_tests else f"{len(chosen) - len(red)} of {len(chosen)} operations green"
    environment = environment_of(device, limits, tests)
    folder = arguments.output or ROOT / "docs" / "benchmarks" / folder_name(environment)
    write(folder, rows, environment)
    print(f"wrote {folder}/README.md, results.json, times.png")
    if dist.is_initialized():
        dist.destroy_process_group()
    if failed := sorted({row.op for row in rows if row.version == OURS and row.note}):
        sys.exit(f"bench_kernels: {', '.join(failed)} failed")


def failing(ops: Iterable[str], device: torch.device) -> list[str]:
    """Operations whose tests fail, after running them all; several at a time where there are processors for it."""
    jobs = {op: commands(op, device) for op in ops}
    workers = max(1, (os.cpu_count() or 1) // CPUS_PER_TEST)
    with ThreadPoolExecutor(workers) as pool:
        results = dict(zip(jobs, pool.map(passes, jobs, jobs.values()), strict=True))
    return [op for op, is_green in results.items() if not is_green]


def commands(op: str, device: torch.device) -> list[list[str]]:
    """Command lines of pytest for an operation: its tests on the CPU, and on CUDA those of tests/gpu."""
    folder = ROOT / "tests" / "kernels"
    files = sorted(folder.glob(f"test_{op}*.py")) or [folder / SHARED_TESTS]
    start = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    found = [[*start, *map(str, files)]]
    if device.type == "cuda":
        found.append([*start, "-m", "gpu", "-k", op, str(ROOT / "tests" / "gpu" / "test_gpu_kernels.py")])
    return found


def passes(op: str, lines: Sequence[Sequence[str]]) -> bool:
    """Whether every command succeeds; prints the end of what the first that fails says."""
    start = time.perf_counter()
    for line in lines:
        on_gpu = "gpu" in line
        hidden = {} if on_gpu else {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
        finished = subprocess.run(line, env=os.environ | hidden, cwd=ROOT, capture_output=True, text=True, check=False)
        if finished.returncode:
            print(
                f"{op}: tests fail: {shlex.join(line)}\n{finished.stdout[-2000:]}{finished.stderr[-500:]}", flush=True
            )
            return False
    print(f"{op}: tests pass ({time.perf_counter() - start:.0f} s)", flush=True)
    return True


def timed(item: Item, device: torch.device, limits: Ceilings, *, seconds: float, compiled: bool) -> Iterator[Row]:
    """Rows of an operation's call: ours first, then its peers, for every pass."""
    torch.compiler.reset()  # or the many shapes of one function would exhaust its recompilations
    peers, absent = library_contenders(item.function, device)
    contenders = [Contender(OURS, item.case.function), *eager_contenders(item.function, compiled=compiled), *peers]
    inputs = item.case.inputs(Maker(device, dense=True))
    traffic = bench_ops.traffic(item, inputs)
    errors, broken = {}, {}
    for contender in contenders:
        try:
            errors[contender.name] = bench_ops.error(item, contender, device)
        except Exception as error:  # of another library: the rest is still worth measuring
            broken[contender.name] = f"fails on the small call: {type(error).__name__}: {error}".splitlines()[0][:200]
    for part, flops in zip(item.passes, item.flops, strict=False):
        notes = broken | {c.name: IN_PLACE for c in contenders if c.overwrites and part == "backward"}
        for graph in (False, True) if item.launch_bound and device.type == "cuda" else (False,):
            builders = {
                contender.name: partial(_build, item, contender, inputs, part, graph)
                for contender in contenders
                if contender.name not in notes
            }
            measured = measure(builders, device, seconds=seconds)
            head = Row(
                op=item.op,
                case=item.case.name,
                part=f"{part}, replayed graph" if graph else part,
                version="",
                num_bytes=traffic[part],
                num_flops=flops,
                floor=limits.floor(traffic[part], flops),
            )
            yield from _rows(head, measured, errors)
            yield from (_noted(head, name, note) for name, note in notes.items())
    yield from (Row(item.op, item.case.name, "", package, note=note) for package, note in absent.items())


def _build(item: Item, contender: Contender, inputs: Sequence[Any], part: str, graph: bool) -> bench_ops.Function:
    given = bench_ops.copied(inputs) if contender.overwrites else inputs
    function = bench_ops.prepared(item, contender, given, part)
    return captured(function) if graph else function


def _rows(head: Row, measured: dict[str, Measured], errors: dict[str, float]) -> Iterator[Row]:
    times = {name: summary(m.repeats) for name, m in measured.items() if not m.failure}
    for name, m in measured.items():
        if m.failure:
            yield _noted(head, name, m.failure.splitlines()[0][:200])
            continue
        filled = asdict(head) | asdict(times[name]) | {"version": name, "error": errors[name]}
        ratio = times[name].median / times[OURS].median if OURS in times else None
        yield Row(**filled | {"ratio": ratio, "extra_bytes": m.extra_bytes})


def _noted(head: Row, version: str, note: str) -> Row:
    return Row(head.op, head.case, head.part, version, note=note)


def environment_of(device: torch.device, limits: Ceilings, tests: str) -> dict[str, Any]:
    """Where and with what the numbers were taken."""
    return {
        "device": device_name(device),
        "versions": versions(),
        "command": shlex.join(["python", "-m", "ppomax.tools.bench_kernels", *sys.argv[1:]]),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "ceilings": asdict(limits),
        "tests": tests,
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else "CPU"


def commit() -> str:
    """Of the checkout, "+" behind it when tracked files differ."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, check=False)
    return found.stdout.strip() + ("+" if changed.returncode else "") if found.returncode == 0 else "unknown"


def folder_name(environment: dict[str, Any]) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    return f"{environment['date']}-kernels-{name}"


if __name__ == "__main__":
    main()
