"""Compares the planner's iteration times with real runs of several layouts on two ranks, one CPU thread each or a GPU.

    python -m ppomax.tools.plan_check [--rates rates.json] [--iterations N] [--output FOLDER] [--layout NAME ...]

Each layout is a run of `ppo` on random models under torchrun; the rates come from measure_rates.py, in the same way,
unless a file is given. What is compared is the order of the layouts: Kendall's rank correlation, and the pairs whose
predictions differ by more than MARGIN. Two times are measured, each the least of the iterations: by the clock, which
says something on an idle machine only, and "busy": in each phase the CPU time of the rank that has the most, which
other programs touch less. It leaves out waiting, so pipelines are compared by the clock alone.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from ppomax.engine.plan.gpus import Gpu, read_rates
from ppomax.engine.plan.plan import Plan, make_plan
from ppomax.engine.train_ppo import iterations
from ppomax.tools.bench_overhead import Span, watched_step
from ppomax.tools.bench_rollout import llama
from ppomax.tools.bench_workload import Workload, bench_config, load_bench_config

RANKS = 2
WORK = Workload(llama(1024, 256, 4, 4, 2, 768, 512), 32, 32, 24, None, 2)
LAYOUTS: dict[str, tuple[str, ...]] = {
    "dp 2": (),
    "dp 2, recompute full": ("model.recompute=full",),
    "dp 2, offload all": ("parallel.offload=all",),
    "tp 2": ("parallel.tp=2",),
    "pp 2, two micro-batches": ("parallel.pp=2", "train.tokens_per_microbatch=448"),
    "pp 2, one micro-batch": ("parallel.pp=2",),
    "policy, reference / critic, reward": (
        *("parallel.policy.num_ranks=1", "parallel.reference.num_ranks=1"),
        *("parallel.critic.first_rank=1", "parallel.reward.first_rank=1"),
    ),
    "policy, critic / reference, reward": (
        *("parallel.policy.num_ranks=1", "parallel.critic.num_ranks=1"),
        *("parallel.reference.first_rank=1", "parallel.reward.first_rank=1"),
    ),
}
"""/: of roles on the first rank and on the second."""
WARM_UP = 1
MARGIN = 1.25
"""Predictions that differ by less say little about which layout is faster."""


@dataclass(frozen=True)
class Row:
    """One layout: seconds of an iteration."""

    layout: str
    predicted: float
    wall: float
    busy: float

    @property
    def is_pipeline(self) -> bool:
        return "parallel.pp=2" in LAYOUTS.get(self.layout, ())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ppomax.tools.plan_check", description=__doc__)
    parser.add_argument("--rates", type=Path, help="a file of measure_rates.py; default: measured now")
    parser.add_argument("--iterations", type=int, default=5, help="of each layout, counted (default 5)")
    parser.add_argument("--layout", nargs="+", choices=[*LAYOUTS], default=[*LAYOUTS], help="default: all")
    parser.add_argument("--output", type=Path, help="folder for plan_check.md and plan_check.json")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # a rank of one layout, with its folder
    arguments = parser.parse_args(argv)
    if arguments.worker:
        _work(arguments.worker, arguments.layout[0], arguments.iterations)
        return
    with tempfile.TemporaryDirectory() as scratch:
        rates = arguments.rates or Path(scratch) / "rates.json"
        if arguments.rates is None:
            _torchrun("ppomax.tools.measure_rates", "--output", str(rates))
        gpu, rows = read_rates(rates), []
        for number, layout in enumerate(arguments.layout):
            folder = Path(scratch) / str(number)
            options = ("--worker", str(folder), "--layout", layout, "--iterations", str(arguments.iterations))
            _torchrun("ppomax.tools.plan_check", *options)
            ranks = [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(RANKS)]
            rows.append(row(layout, predicted(folder, layout, gpu), ranks))
            print(rows[-1], flush=True)
    text = report(rows, gpu)
    print(text)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "plan_check.md").write_text(text)
        content = {"rates": vars(gpu), "rows": [vars(one) for one in rows], "load": os.getloadavg()}
        (arguments.output / "plan_check.json").write_text(json.dumps(content, indent=1) + "\n")


def _torchrun(module: str, *options: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, module, *options], check=True, env=environment, stdout=subprocess.DEVNULL)


def _work(folder: Path, layout: str, num_iterations: int) -> None:
    """A rank of one layout: its times go to the folder."""
    folder.mkdir(exist_ok=True, parents=True)
    times = measure_layout(folder, layout, num_iterations)
    (folder / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(times))


def measure_layout(folder: Path, layout: str, num_iterations: int) -> list[dict[str, Any]]:
    """Of each iteration on this rank: seconds by the clock, and CPU seconds of each phase. Every rank must call it."""
    torch.set_num_threads(1)
    config = bench_config(WORK, folder, [*LAYOUTS[layout], f"train.steps={WARM_UP + num_iterations}"])
    steps, found = iterations(config), []
    for number in range(WARM_UP + num_iterations):
        step = watched_step(steps, now=_process_now)
        if number >= WARM_UP:
            phases = {phase: span.cpu for phase, span in step.phases.items()}
            found.append({"wall": step.whole.wall, "cpu": phases})
    for _ in steps:
        pass
    return found


def _process_now() -> Span:
    """Of all threads: gloo sums in threads of its own."""
    return Span(time.perf_counter(), time.process_time())


def row(layout: str, plan: Plan, ranks: Sequence[Sequence[Mapping[str, Any]]]) -> Row:
    """ranks: what measure_layout gave on each."""
    wall = min(max(each["wall"] for each in turn) for turn in zip(*ranks, strict=True))
    phases = ranks[0][0]["cpu"]
    busy = sum(min(max(each["cpu"][phase] for each in turn) for turn in zip(*ranks, strict=True)) for phase in phases)
    return Row(layout, plan.seconds, wall, busy)


def predicted(folder: Path, layout: str, gpu: Gpu) -> Plan:
    """The plan of a layout, whose models lie in the folder already."""
    config = load_bench_config(folder, [*LAYOUTS[layout], "train.steps=1"])
    return make_plan(config, "ppo", RANKS, gpu=gpu, prompt=WORK.prompt_tokens, response=WORK.max_new_tokens)


def kendall(first: Sequence[float], second: Sequence[float]) -> float:
    """Pairs that both order alike, less those that they order differently, over all pairs."""
    pairs = list(combinations(range(len(first)), 2))
    agree = [(first[i] - first[j]) * (second[i] - second[j]) for i, j in pairs]
    return sum((x > 0) - (x < 0) for x in agree) / len(pairs)


def clear_pairs(rows: Sequence[Row], measured: Callable[[Row], float]) -> list[tuple[str, str, bool]]:
    """(faster, slower by the prediction, whether the measurement says so) of pairs that differ by MARGIN."""
    pairs = [(a, b) for a in rows for b in rows if b.predicted > MARGIN * a.predicted]
    return [(a.layout, b.layout, measured(a) < measured(b)) for a, b in pairs]


def report(rows: Sequence[Row], gpu: Gpu) -> str:
    """Markdown."""
    lines = ["| layout | predicted, s | by the clock, s | busy, s |", "|---|---|---|---|"]
    for one in sorted(rows, key=lambda one: one.predicted):
        lines.append(f"| {one.layout} | {one.predicted:.3f} | {one.wall:.3f} | {one.busy:.3f} |")
    lines.append("")
    whole = [one for one in rows if not one.is_pipeline]
    kinds: list[tuple[str, Sequence[Row], Callable[[Row], float]]] = [
        ("By the clock", rows, lambda one: one.wall),
        ("Busy, without pipelines", whole, lambda one: one.busy),
    ]
    for name, members, measured in kinds:
        tau = kendall([one.predicted for one in members], [measured(one) for one in members])
        clear = clear_pairs(members, measured)
        right = sum(agrees for *_, agrees in clear)
        lines.append(
            f"{name}: Kendall's rank correlation {tau:.2f}; of {len(clear)} pairs whose predictions differ by a factor "
            f"of more than {MARGIN}, {right} are in the predicted order."
        )
        lines += [f"* predicted faster, but slower: {a}, than {b}" for a, b, agrees in clear if not agrees]
    rates = (
        f"{gpu.flops / 1e9:.1f} GFLOP/s, copy {gpu.bandwidth / 1e9:.1f} GB/s, link {gpu.link / 1e9:.2f} GB/s, "
        f"a collective {1e6 * gpu.collective_seconds:.0f} us, a layer {1e6 * gpu.layer_seconds:.0f} us in a pass and "
        f"{1e6 * gpu.decode_layer_seconds:.0f} us in a decoding step"
    )
    load = ", ".join(f"{value:.0f}" for value in os.getloadavg())
    return "\n".join([*lines, "", f"Rates of a rank: {rates}. Load of the machine (1, 5, 15 minutes): {load}.", ""])


if __name__ == "__main__":
    main()
