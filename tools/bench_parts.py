"""The parts of an iteration, finer than the phases of timing.jsonl, and the least that the machine needs for each.

Most parts come from the spans that a run itself traces (monitor.trace); the rollout is split into bringing weights into
the form that decoding wants, steps with prompts, and steps that only decode: from one launch of a step to the next.
The least time of a part is that of its operations or of the bytes that must move, whichever is longer, at the rates of
a product and a copy that were measured in the same process.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ppomax.engine.config import RunConfig
from ppomax.engine.data.batches import Pack
from ppomax.engine.models import roles
from ppomax.engine.plan.timing import OPTIMIZER_BYTES, forward_flops
from ppomax.engine.plan.weights import ITEMSIZE, vocabulary_matrix
from ppomax.engine.rollout.flight import Flight
from ppomax.engine.rollout.inference import InferenceStage
from ppomax.tools.bench_timing import Ceilings
from ppomax.tools.bench_workload import Workload

HAND_OVER, PREFILL, DECODE = "weights for decoding", "prefill", "decoding"
SPANS = {
    "scoring": ("reward scores", "process scores", "reference log-probs", "critic values", "policy log-probs"),
    "update": ("policy gradients", "critic gradients"),
    "checkpoint": (),
    "rollout": (HAND_OVER, PREFILL, DECODE),
}
REST = {"rollout": "rest of the rollout", "scoring": "experience", "update": "optimizer", "checkpoint": "checkpoint"}
"""What a phase has besides its spans: of scoring rewards and advantages, of an update minibatches and steps."""


@dataclass(frozen=True)
class Event:
    """start, end: seconds since the epoch."""

    name: str
    start: float
    end: float


@dataclass
class Parts:
    """What this rank notes of rollouts and packs while `installed` is open."""

    events: list[Event] = field(default_factory=list)
    packed_tokens: int = 0
    real_tokens: int = 0
    _open: tuple[str, float] | None = None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        launch, prepare, pack = Flight.launch, InferenceStage.__init__, roles.make_packs

        @wraps(launch)
        def noted_launch(flight: Flight) -> bool:
            self._close()
            started, has_launched = time.time(), launch(flight)
            if has_launched:  # several steps at once are decoding
                is_prefill = flight._launched is not None and not flight._launched.sizes.only_decodes
                self._open = (PREFILL if is_prefill else DECODE, started)
            return has_launched

        @wraps(prepare)
        def noted_prepare(*args: Any, **kwargs: Any) -> None:
            started = time.time()
            prepare(*args, **kwargs)
            self.events.append(Event(HAND_OVER, started, time.time()))

        @wraps(pack)
        def noted_packs(*args: Any, **kwargs: Any) -> list[Pack]:
            self._close()  # the rollout is over
            packs = pack(*args, **kwargs)
            self.packed_tokens += sum(one.tokens.numel() for one in packs)
            self.real_tokens += sum(int(one.cu_seqlens[len(one.sequences)]) for one in packs)
            return packs

        with contextlib.ExitStack() as stack:
            stack.enter_context(patch.object(Flight, "launch", noted_launch))
            stack.enter_context(patch.object(InferenceStage, "__init__", noted_prepare))
            stack.enter_context(patch.object(roles, "make_packs", noted_packs))
            yield

    def _close(self) -> None:
        if self._open is not None:
            self.events.append(Event(*self._open, time.time()))
            self._open = None


def read_trace(path: Path) -> list[Event]:
    """The spans of one rank."""
    lines = [json.loads(line.rstrip(",")) for line in path.read_text().splitlines()[1:]]
    return [Event(one["name"], one["ts"] / 1e6, (one["ts"] + one["dur"]) / 1e6) for one in lines]


def by_iteration(events: Sequence[Event]) -> list[list[Event]]:
    """Those of each iteration: it begins with its rollout."""
    ordered = sorted(events, key=lambda event: (event.start, -event.end))
    begins = [event.start for event in ordered if event.name == "rollout"]
    ends = [*begins[1:], float("inf")]
    return [[e for e in ordered if begin <= e.start < end] for begin, end in zip(begins, ends, strict=True)]


def seconds_of_parts(events: Sequence[Event], timing: Mapping[str, float]) -> dict[str, float]:
    """Of one iteration. timing: its line of timing.jsonl."""
    found: dict[str, float] = {}
    for phase in ("rollout", "scoring", "update", "checkpoint"):
        whole = timing.get(f"{phase}_seconds", 0.0)
        own = _shared([event for event in events if event.name in SPANS[phase]])
        found |= {name: own[name] for name in SPANS[phase] if own.get(name, 0.0) > 0}
        found[REST[phase]] = max(0.0, whole - sum(own.values()))
    return found


def _shared(events: Sequence[Event]) -> dict[str, float]:
    """Seconds by name; a time that several events have in common counts for each in equal parts."""
    found: dict[str, float] = {}
    for begin, end in pairwise(sorted({moment for event in events for moment in (event.start, event.end)})):
        under_way = [event.name for event in events if event.start <= begin and end <= event.end]
        for name in under_way:
            found[name] = found.get(name, 0.0) + (end - begin) / len(under_way)
    return found


@dataclass(frozen=True)
class Least:
    """Of a part, over all ranks: operations without recomputation, and bytes of the device's memory."""

    flops: float
    num_bytes: float

    def seconds(self, limits: Ceilings, ranks: int) -> float:
        return limits.floor(self.num_bytes, self.flops) / ranks


def least(work: Workload, config: RunConfig, sampled: float, longest: float) -> dict[str, Least]:
    """sampled: mean tokens of a response. longest: of them all."""
    shape, size, prompts = work.shape, ITEMSIZE[work.dtype], work.prompts
    whole = work.prompt_tokens + sampled
    head, read = 2.0 * vocabulary_matrix(shape, 1), float(size * (shape.num_parameters() - vocabulary_matrix(shape, 1)))
    body = prompts * whole * forward_flops(shape, whole)
    prefill = prompts * (work.prompt_tokens * forward_flops(shape, work.prompt_tokens) + head)
    cached = 2 * size * shape.num_layers * shape.num_query_groups * shape.head_dim
    with_head, steps = body + prompts * sampled * head, work.minibatches * config.ppo.epochs
    gradients = steps * (2 * read + 4 * shape.num_parameters())
    found = {
        PREFILL: Least(prefill, read),
        DECODE: Least(
            max(0.0, with_head - prefill),
            max(0.0, longest - 1) * read + prompts * sampled * (work.prompt_tokens + sampled / 2) * cached,
        ),
        "reward scores": Least(body, read),
        "reference log-probs": Least(with_head, read),
        "critic values": Least(body, read),
        "policy gradients": Least(3 * config.ppo.epochs * with_head, gradients),
        "critic gradients": Least(3 * config.ppo.epochs * body, gradients),
        "optimizer": Least(0.0, 2 * steps * OPTIMIZER_BYTES[work.dtype] * shape.num_parameters()),
    }
    return found | ({"policy log-probs": Least(with_head, read)} if config.ppo.old_logprobs == "recompute" else {})


def part_rows(
    seconds: Mapping[str, float], needed: Mapping[str, Least], limits: Ceilings, ranks: int, iteration: float
) -> dict[str, dict[str, float]]:
    """What the report says of each part; "iteration" is the sum."""
    rows: dict[str, dict[str, float]] = {}
    for name, value in seconds.items():
        rows[name] = {"seconds": value, "share": value / iteration}
        if name in needed and value > 0:
            rows[name] |= _against(needed[name].flops, needed[name].num_bytes, value, ranks)
            rows[name]["least_seconds"] = needed[name].seconds(limits, ranks)
    whole = Least(sum(x.flops for x in needed.values()), sum(x.num_bytes for x in needed.values()))
    rows["iteration"] = {"seconds": iteration, "share": 1.0, **_against(whole.flops, whole.num_bytes, iteration, ranks)}
    rows["iteration"]["least_seconds"] = sum(x.seconds(limits, ranks) for x in needed.values())
    for row in rows.values():
        if "least_seconds" in row:
            row["of_roofline"] = row["least_seconds"] / row["seconds"]
    return rows


def _against(flops: float, num_bytes: float, seconds: float, ranks: int) -> dict[str, float]:
    """Rates of one rank."""
    return {"tflops": flops / seconds / ranks / 1e12, "gb_per_second": num_bytes / seconds / ranks / 1e9}


COLUMNS: dict[str, Callable[[Mapping[str, float]], str]] = {
    "seconds": lambda row: f"{row['seconds']:.3g}",
    "share": lambda row: f"{100 * row['share']:.1f} %",
    "TFLOP/s": lambda row: f"{row['tflops']:.3g}" if "tflops" in row else "",
    "GB/s": lambda row: f"{row['gb_per_second']:.3g}" if "gb_per_second" in row else "",
    "least, s": lambda row: f"{row['least_seconds']:.3g}" if "least_seconds" in row else "",
    "of the roofline": lambda row: f"{100 * row['of_roofline']:.0f} %" if "of_roofline" in row else "",
}


def part_table(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    text = [f"| part | {' | '.join(COLUMNS)} |", "|" + "---|" * (1 + len(COLUMNS))]
    return [
        *text,
        *(f"| {name} | {' | '.join(cell(row) for cell in COLUMNS.values())} |" for name, row in rows.items()),
    ]
