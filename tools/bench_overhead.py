"""What a PPO step costs beside the mathematics of its models, for `make bench-ppo ARGS=--overhead`.

The engine's own time is that of whole iterations less that of the calls in MODEL_CALLS, outermost ones, measured with a
model of almost no compute, and set against the step of the quickstart's model on the same prompts. The same iterations
with ever smaller micro-batches give the cost of one (a slope), and the host's waits for the device (host_syncs.py),
which must not grow with their number. On CUDA the calls are launches: the times are the host's.
"""

import argparse
import contextlib
import functools
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.distributed import DistributedDataParallel

from ppomax.engine.models.transformer import PackedModel
from ppomax.engine.optim import FlatAdamW
from ppomax.engine.ppo import losses, scoring
from ppomax.engine.rollout import flight
from ppomax.engine.rollout.inference import InferenceStage
from ppomax.engine.rollout.many_steps import ManySteps
from ppomax.engine.throughput import PhaseClock
from ppomax.engine.train_ppo import iterations
from ppomax.tools.bench_workload import Workload, bench_config
from ppomax.tools.host_syncs import host_syncs

MODEL_CALLS: tuple[tuple[str, Any, str], ...] = (
    ("forward", PackedModel, "forward"),
    ("backward", torch.autograd, "backward"),
    ("heads and losses", losses, "head_policy_loss"),
    ("heads and losses", losses, "value_head_loss"),
    ("heads and losses", scoring, "head_logprobs"),
    ("heads and losses", PackedModel, "scalars"),
    ("optimizer", DistributedDataParallel, "zero_grad_buffer"),
    ("optimizer", FlatAdamW, "squared_grad_norm"),
    ("optimizer", FlatAdamW, "launch_step"),
    ("weights for decoding", InferenceStage, "__init__"),
    ("decoding", InferenceStage, "run_chunk"),
    ("decoding", InferenceStage, "logits"),
    ("sampling", flight, "draw"),
    ("decoding", ManySteps, "run"),
)
"""Kind, where the name is looked up, name."""
SPLITS = (1, 2, 4, 8, 16)
"""Micro-batches of a minibatch, about."""
WARM_UP = 2
TARGET = 0.05


def nearly_empty(work: Workload) -> Workload:
    """The same prompts and lengths for a model of almost no compute, which takes the same ways through the engine."""
    heads = replace(work.shape, num_heads=2, num_query_groups=1, head_dim=16)
    return replace(work, shape=replace(heads, hidden_size=16, num_layers=1, ffn_hidden_size=16, vocab_size=64))


@dataclass(frozen=True)
class Span:
    """Seconds by the clock, and CPU seconds of the thread, which other programs do not lengthen."""

    wall: float = 0.0
    cpu: float = 0.0

    @staticmethod
    def now() -> "Span":
        return Span(time.perf_counter(), time.thread_time())

    def __add__(self, other: "Span") -> "Span":
        return Span(self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: "Span") -> "Span":
        return Span(self.wall - other.wall, self.cpu - other.cpu)


@dataclass
class ModelClock:
    """Time of phases and, by phase and kind, of the model calls in them; num_passes: micro-batches by phase."""

    phases: dict[str, Span] = field(default_factory=lambda: defaultdict(Span))
    calls: dict[tuple[str, str], Span] = field(default_factory=lambda: defaultdict(Span))
    num_passes: Counter[str] = field(default_factory=Counter)
    now: Callable[[], Span] = Span.now
    _phase: str = "other"
    _is_inside: bool = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Watches all iterations of the process while it is open."""
        clock, phase_of = self, PhaseClock.phase

        @contextlib.contextmanager
        def phase(phase_clock: PhaseClock, name: str) -> Iterator[None]:
            start, clock._phase = clock.now(), name
            with phase_of(phase_clock, name):
                yield
            clock.phases[name] += clock.now() - start
            clock._phase = "other"

        with contextlib.ExitStack() as stack:
            stack.enter_context(patch.object(PhaseClock, "phase", phase))
            for kind, owner, name in MODEL_CALLS:
                stack.enter_context(patch.object(owner, name, self._timed(kind, getattr(owner, name))))
            yield

    def _timed(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._is_inside:  # recomputation in a backward pass
                return function(*args, **kwargs)
            self._is_inside, start = True, self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.calls[self._phase, kind] += self.now() - start
                self.num_passes[self._phase] += kind == "forward"
                self._is_inside = False

        return call


@dataclass(frozen=True)
class Step:
    """One iteration. phases: with "other"; calls: of models, by phase and kind."""

    whole: Span
    phases: dict[str, Span]
    calls: dict[tuple[str, str], Span]
    num_passes: Counter[str]

    def own(self, phase: str) -> Span:
        """The engine's own part of a phase."""
        return self.phases[phase] - sum((span for (name, _), span in self.calls.items() if name == phase), Span())

    @property
    def all_own(self) -> Span:
        return sum(map(self.own, self.phases), Span())


def watched_step(steps: Iterator[int], now: Callable[[], Span] = Span.now) -> Step:
    """Makes one iteration. now: the clocks."""
    clock = ModelClock(now=now)
    with clock.installed():
        start = now()
        next(steps)
        whole = now() - start
    phases = {**clock.phases, "other": whole - sum(clock.phases.values(), Span())}
    return Step(whole, phases, dict(clock.calls), clock.num_passes)


@dataclass(frozen=True)
class Measured:
    """steps: timed iterations. syncs: of one more, by place; decoding is left out on a CPU (host_syncs.py)."""

    steps: list[Step]
    syncs: Counter[str]

    def best(self, value: Callable[[Step], float]) -> float:
        """The least of the iterations: other programs only add."""
        return min(map(value, self.steps))


def measure(work: Workload, folder: Path, num_steps: int, overrides: Sequence[str]) -> Measured:
    """A run of WARM_UP iterations, num_steps timed ones and one whose waits are counted: on one thread, since with
    several on a CPU models compute side by side.
    """
    config = bench_config(work, folder, [*overrides, f"train.steps={WARM_UP + num_steps + 1}"])
    steps, num_threads = iterations(config), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(WARM_UP):
            next(steps)
        timed = [watched_step(steps) for _ in range(num_steps)]
        with host_syncs() as syncs:
            next(steps)
        for _ in steps:
            pass
    finally:
        torch.set_num_threads(num_threads)
    return Measured(timed, syncs)


def overhead(work: Workload, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The record of the report."""
    overrides = ["monitor.action=off", *arguments.override]  # an alarm reads samples
    whole = measure(work, folder / "whole", arguments.iterations, overrides)
    empty, tokens = nearly_empty(work), work.prompts * (work.prompt_tokens + work.max_new_tokens)
    rows, runs = [], []
    for split in SPLITS:
        limit = tokens // work.minibatches // split
        run = measure(
            empty,
            folder / f"empty_{split}",
            arguments.iterations,
            [*overrides, f"train.tokens_per_microbatch={limit}"],
        )
        runs.append(run)
        rows.append(
            {
                "tokens_per_microbatch": limit,
                "scoring_passes": run.steps[0].num_passes["scoring"],
                "update_passes": run.steps[0].num_passes["update"],
                "seconds": run.best(lambda step: step.whole.wall),
                "own_seconds": run.best(lambda step: step.all_own.wall),
                "own_cpu_seconds": run.best(lambda step: step.all_own.cpu),
                "syncs": sum(run.syncs.values()),
            }
        )
        print(rows[-1], flush=True)
    first = runs[0]
    step = {"seconds": whole.best(lambda s: s.whole.wall), "cpu_seconds": whole.best(lambda s: s.whole.cpu)}
    own = {"seconds": first.best(lambda s: s.all_own.wall), "cpu_seconds": first.best(lambda s: s.all_own.cpu)}
    return {
        "step": step,
        "own": own,
        "own / step": own["seconds"] / step["seconds"],
        "own / step, CPU time": own["cpu_seconds"] / step["cpu_seconds"],
        "own by phase": {phase: first.best(_own(phase)) for phase in first.steps[0].phases},
        "model calls": {
            f"{phase}: {kind}": {
                "almost empty": first.best(_calls(phase, kind)),
                "quickstart": whole.best(_calls(phase, kind)),
            }
            for phase, kind in first.steps[0].calls
        },
        "microbatches": rows,
        "microseconds of a micro-batch": {
            f"{phase}{', own' if is_own else ''}": 1e6 * _slope(runs, phase, is_own=is_own)
            for phase in ("scoring", "update")
            for is_own in (False, True)
        },
        "syncs are constant": len({row["syncs"] for row in rows}) == 1,
        "syncs by place": dict(first.syncs.most_common()),
    }


def _own(phase: str) -> Callable[[Step], float]:
    return lambda step: step.own(phase).cpu


def _calls(phase: str, kind: str) -> Callable[[Step], float]:
    return lambda step: step.calls[phase, kind].cpu


def _slope(runs: Sequence[Measured], phase: str, *, is_own: bool) -> float:
    """CPU seconds that one more micro-batch of a phase takes: the line of least squares through the runs."""

    def cost(step: Step) -> float:
        return (step.own(phase) if is_own else step.phases[phase]).cpu

    numbers = [run.steps[0].num_passes[phase] for run in runs]
    return statistics.linear_regression(numbers, [run.best(cost) for run in runs]).slope


def table(record: dict[str, Any]) -> list[str]:
    """Lines of the report."""
    own, step = record["own"], record["step"]
    return [
        "## The engine's own time",
        "",
        f"On one thread, with a model of almost no compute, an iteration takes {1e3 * own['seconds']:.0f} ms beside "
        f"the calls of models, {100 * record['own / step']:.1f} % of the {1e3 * step['seconds']:.0f} ms of the "
        f"quickstart's step (aim: {100 * TARGET:.0f} %). By CPU time of the main thread, which other programs hardly "
        f"touch: {1e3 * own['cpu_seconds']:.0f} ms, {100 * record['own / step, CPU time']:.1f} %. Each number "
        "is the least of the iterations.",
        "",
        "| phase | own, CPU ms |",
        "|---|---|",
        *(f"| {phase} | {1e3 * seconds:.1f} |" for phase, seconds in record["own by phase"].items()),
        "",
        "| model calls, CPU ms | almost empty | quickstart |",
        "|---|---|---|",
        *(
            f"| {name} | {1e3 * each['almost empty']:.1f} | {1e3 * each['quickstart']:.1f} |"
            for name, each in record["model calls"].items()
        ),
        "",
        "| tokens per micro-batch | passes in scoring | in update | own, CPU ms | host syncs, without decoding |",
        "|---|---|---|---|---|",
        *(
            f"| {row['tokens_per_microbatch']} | {row['scoring_passes']} | {row['update_passes']} | "
            f"{1e3 * row['own_cpu_seconds']:.1f} | {row['syncs']} |"
            for row in record["microbatches"]
        ),
        "",
        f"Host syncs are {'constant' if record['syncs are constant'] else 'NOT constant'}. CPU microseconds of a "
        "micro-batch with the almost empty model (slope): "
        + ", ".join(f"{name} {value:.0f}" for name, value in record["microseconds of a micro-batch"].items())
        + ".",
        "",
        "| host syncs of an iteration | place |",
        "|---|---|",
        *(f"| {count} | {place} |" for place, count in record["syncs by place"].items()),
        "",
    ]
