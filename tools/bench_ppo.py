"""Times whole PPO iterations, phase by phase: `make bench-ppo`. Alone, under torchrun, on CPUs or GPUs; no network.

    python -m ppomax.tools.bench_ppo [--case [NAME ...]] [--iterations N] [--threads N] [--trl PYTHON]
        [--overhead] [--slopes] [--output FOLDER] [--profile FILE] [section.field=value ...]

Each case is a run of the stage `ppo` on random models and prompts (bench_workload.py): what a user's run does, with its
log. Beside it, in the same process and in turns, the matrix products alone (bench_products.py); with --trl the same
iteration in TRL's trainer, in a process of its own, in turns too. Ratios are medians over neighbouring turns.
The first turns of all are not counted. --overhead adds what a step costs beside its models (bench_overhead.py) and
--slopes how its time grows (bench_slopes.py); `--case` without a name leaves out the cases. The report goes to
docs/benchmarks/<date>-ppo-<device>/.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ppomax.engine.config import RunConfig
from ppomax.engine.errors import ConfigError
from ppomax.engine.train_ppo import iterations
from ppomax.tools import bench_overhead, bench_slopes
from ppomax.tools.bench_kernels import ROOT, commit, device_name, folder_name
from ppomax.tools.bench_parts import Parts, by_iteration, least, part_rows, read_trace, seconds_of_parts
from ppomax.tools.bench_peers import versions
from ppomax.tools.bench_ppo_report import Extra, write_report
from ppomax.tools.bench_products import Products, passes
from ppomax.tools.bench_rollout import LARGE, SMALL
from ppomax.tools.bench_timing import Ceilings, ceilings, synchronize
from ppomax.tools.bench_workload import Workload, bench_config, shared_folder

TINY = SMALL["1 M (quickstart)"]
CASES = {
    "exact": Workload(TINY, 64, 32, 48, None, 2),
    "eos": Workload(TINY, 64, 32, 128, 32.0, 2),
    "1b": Workload(replace(LARGE["1.1 B"], tie_embeddings=False), 128, 512, 512, None, 4, "bf16"),
}
"""exact: responses of 48 tokens. eos: responses that end by chance, after a quarter of their limit in the mean."""
CPU_CASES, GPU_CASES = ("exact", "eos"), ("1b",)
WARM_UP = 2
CEILING_SECONDS = 0.3


@dataclass(frozen=True)
class Turn:
    """Seconds of one iteration: ours, the products alone by phase, TRL's where it runs."""

    seconds: float
    products: dict[str, float]
    trl: float | None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ppomax.tools.bench_ppo", description=__doc__)
    parser.add_argument("--case", nargs="*", choices=[*CASES], help="default: exact and eos on a CPU, 1b on a GPU")
    parser.add_argument("--iterations", type=int, default=7, help="turns that are counted (default 7)")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU (default 2)")
    parser.add_argument("--trl", metavar="PYTHON", help="of an environment with trl==1.12.0, to run beside")
    parser.add_argument("--overhead", action="store_true", help="the engine's own time and host syncs, too")
    parser.add_argument("--slopes", action="store_true", help="growth with prompts, length and layers, too")
    parser.add_argument("--output", type=Path, help="folder of the report")
    parser.add_argument("--profile", type=Path, help="write a torch profile of one more iteration of the last case")
    parser.add_argument("override", nargs="*", metavar="section.field=value")
    arguments = parser.parse_args(argv)
    usual = GPU_CASES if torch.cuda.is_available() else CPU_CASES
    cases = usual if arguments.case is None else arguments.case
    torch.set_num_threads(arguments.threads)
    results = []
    for name in cases:
        with tempfile.TemporaryDirectory() as scratch:
            folder = shared_folder(Path(scratch))
            results.append(run_case(name, CASES[name], folder, arguments))
    extras = {}
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.overhead:
            found = bench_overhead.overhead(CASES[usual[0]], Path(scratch), arguments)
            extras["overhead"] = Extra(found, bench_overhead.table(found))
        if arguments.slopes:
            found = bench_slopes.slopes(CASES[usual[0]], Path(scratch) / "slopes", arguments)
            extras["slopes"] = Extra(found, bench_slopes.table(found))
    if int(os.environ.get("RANK", "0")) == 0:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        environment = {
            "device": device_name(device),
            "ranks": int(os.environ.get("WORLD_SIZE", "1")),
            "versions": versions(),
            "command": " ".join(["python -m ppomax.tools.bench_ppo", *(argv if argv is not None else sys.argv[1:])]),
            "commit": commit(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }
        output = arguments.output or ROOT / "docs/benchmarks" / folder_name(environment).replace("-kernels-", "-ppo-")
        write_report(output, results, environment, extras)


def run_case(name: str, work: Workload, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the turns of one case; a record for the report."""
    count = WARM_UP + arguments.iterations
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    limits = ceilings(device, seconds=CEILING_SECONDS)
    own = ["monitor.trace=true", f"train.steps={count + bool(arguments.profile)}"]
    config, parts = bench_config(work, folder, [*arguments.override, *own]), Parts()
    is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    products = ProductTimer(work, config) if is_alone and work.mean_new_tokens is None else None
    turns, steps = [], iterations(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(parts.installed())
        trl = Trl(arguments.trl, work, folder, arguments.threads) if arguments.trl and is_alone else None
        if trl is not None:
            stack.callback(trl.close)
        for number in range(count):
            begin = time.perf_counter()
            next(steps)
            seconds = time.perf_counter() - begin
            turns.append(Turn(seconds, products.seconds() if products else {}, trl.turn() if trl else None))
            print(f"{name} {number + 1}/{count}: {turns[-1]}", flush=True)
    if arguments.profile:
        with torch.profiler.profile() as profile:
            next(steps)
        rank = os.environ.get("RANK", "")
        profile.export_chrome_trace(str(arguments.profile.with_stem(arguments.profile.stem + rank)))
    for _ in steps:  # to its end: it writes what a run leaves, and leaves the process group
        pass
    if int(os.environ.get("RANK", "0")) > 0:
        return {}
    result = record(name, work, turns[WARM_UP:], Path(config.train.output))
    return result | details(work, config, parts, limits, result)


class ProductTimer:
    """The products of each phase of a case, timed; only for responses of a fixed length on one rank."""

    def __init__(self, work: Workload, config: RunConfig) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float32 if work.dtype == "fp32" else torch.bfloat16
        self._products = Products(work.shape, dtype, self._device)
        recomputes = config.ppo.old_logprobs == "recompute"
        new = work.max_new_tokens
        self._phases = passes(work.prompts, work.prompt_tokens, new, work.minibatches, recomputes=recomputes)

    def seconds(self) -> dict[str, float]:
        times = {}
        for phase, members in self._phases.items():
            synchronize(self._device)
            begin = time.perf_counter()
            for member in members:
                self._products.run(member)
            synchronize(self._device)
            times[phase] = time.perf_counter() - begin
        return times


class Trl:
    """TRL's trainer in a process of its own, which makes an iteration when it is asked to."""

    def __init__(self, python: str, work: Workload, folder: Path, threads: int) -> None:
        numbers = (work.prompts, work.prompt_tokens, work.max_new_tokens, work.minibatches, threads)
        ending = "exact" if work.mean_new_tokens is None else "eos"
        command = [python, str(Path(__file__).with_name("bench_trl.py")), str(folder), *map(str, numbers), ending]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def turn(self) -> float:
        """Seconds of its next iteration."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith('{"seconds"'):
                return json.loads(line)["seconds"]
        raise ConfigError(f"TRL's trainer ended with exit code {self._process.wait()}; its errors are above")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def record(name: str, work: Workload, turns: Sequence[Turn], run: Path) -> dict[str, Any]:
    """What the report says of a case: medians over the turns."""
    timing = _lines(run / "timing.jsonl")[WARM_UP : WARM_UP + len(turns)]
    metrics = [line for line in _lines(run / "metrics.jsonl") if line["kind"] == "ppo"][WARM_UP : WARM_UP + len(turns)]
    seconds = statistics.median(turn.seconds for turn in turns)
    phases: dict[str, dict[str, float]] = {}
    for phase in ("rollout", "scoring", "update", "checkpoint"):
        times = [line[f"{phase}_seconds"] for line in timing if f"{phase}_seconds" in line]
        if times:
            phases[phase] = {"seconds": statistics.median(times), "share": statistics.median(times) / seconds}
            for rate in ("tokens_per_second", "mfu"):
                rates = [line[f"{phase}_{rate}"] for line in timing if f"{phase}_{rate}" in line]
                phases[phase] |= {rate: statistics.median(rates)} if rates else {}
        if turns[0].products and phase in turns[0].products:
            alone = [turn.products[phase] for turn in turns]
            phases[phase]["products_seconds"] = statistics.median(alone)
    other = seconds - sum(values["seconds"] for values in phases.values())
    phases["other"] = {"seconds": other, "share": other / seconds}
    sampled = statistics.mean(line["response_length"] for line in metrics)
    result: dict[str, Any] = {
        "case": name,
        "workload": dataclasses.asdict(work),
        "iterations": len(turns),
        "seconds": seconds,
        "tokens_per_second": work.prompts * (work.prompt_tokens + sampled) / seconds,
        "response_length": sampled,
        "longest_response": statistics.mean(line["response_length_max"] for line in metrics),
        "phases": phases,
    }
    for key in ("gpu_peak_gib", "host_rss_gib"):
        if key in timing[-1]:
            result[key] = max(line[key] for line in timing)
    if turns[0].products:
        result["seconds / products"] = statistics.median(t.seconds / sum(t.products.values()) for t in turns)
    if turns[0].trl is not None:
        result["trl_seconds"] = statistics.median(t.trl or 0.0 for t in turns)
        result["trl / ours"] = statistics.median((t.trl or 0.0) / t.seconds for t in turns)
    return result


def details(
    work: Workload, config: RunConfig, parts: Parts, limits: Ceilings, result: dict[str, Any]
) -> dict[str, Any]:
    """Parts of the iterations against the roofline, padding, and when each rank did what in the last one."""
    run, ranks = Path(config.train.output), int(os.environ.get("WORLD_SIZE", "1"))
    timing = _lines(run / "timing.jsonl")
    counted = slice(WARM_UP, WARM_UP + result["iterations"])
    traces = [by_iteration(read_trace(path)) for path in sorted((run / "traces").glob("rank_*.json"))]
    own = by_iteration([*(event for events in traces[0] for event in events), *parts.events])[counted]
    each = [seconds_of_parts(events, line) for events, line in zip(own, timing[counted], strict=True)]
    seconds = {name: statistics.median(one.get(name, 0.0) for one in each) for name in each[-1]}
    seconds["other"] = result["seconds"] - sum(seconds.values())  # timing.jsonl has the time between turns there
    needed = least(work, config, result["response_length"], result["longest_response"])
    last = [own[-1], *(events[counted][-1] for events in traces[1:])]
    return {
        "ceilings": dataclasses.asdict(limits),
        "parts": part_rows(seconds, needed, limits, ranks, result["seconds"]),
        "padding_of_packs": 1 - parts.real_tokens / parts.packed_tokens,
        "padding_of_a_padded_batch": 1
        - (work.prompt_tokens + result["response_length"]) / (work.prompt_tokens + result["longest_response"]),
        "timeline": [[dataclasses.asdict(event) for event in events] for events in last],
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
