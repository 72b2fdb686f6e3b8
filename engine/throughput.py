"""What an iteration took and how much it did: seconds, tokens a second and model FLOPs utilisation per phase, memory.

Times are of this rank's host clock. No phase is waited for: each of them ends with numbers that the host reads, so what
is still under way on a GPU when a phase ends is the launch of the next one.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import psutil
import torch

from ppomax.engine.config import RunConfig
from ppomax.engine.config_ppo import PpoConfig
from ppomax.engine.models.shape import ModelShape
from ppomax.engine.plan.gpus import gpu_of_device
from ppomax.engine.plan.timing import forward_flops
from ppomax.engine.plan.weights import vocabulary_matrix

PHASES = ("rollout", "scoring", "update", "evaluation", "checkpoint")


@dataclass(frozen=True)
class Work:
    """Of one phase of an iteration, over all ranks. flops: floating-point operations that the model needs, without
    recomputation; 0 where they are not counted.
    """

    tokens: float
    flops: float = 0.0


class PhaseClock:
    """Seconds of each phase since the last `record`."""

    def __init__(self, peak_flops: float | None, device: torch.device) -> None:
        """peak_flops: operations a second of all GPUs together, None where unknown: no utilisation is reported."""
        self._peak, self._device = peak_flops, device
        self._seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The body belongs to a phase of PHASES; it may happen several times. Where torch's profiler looks on it is a
        named range.
        """
        start = time.perf_counter()
        try:
            with torch.profiler.record_function(name):
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def record(self, work: Mapping[str, Work]) -> dict[str, float]:
        """A line of timing.jsonl (docs/metrics.md), and the clock starts anew."""
        now = time.perf_counter()
        values = {"seconds": now - self._start}
        for name in PHASES:
            if name not in self._seconds:
                continue
            seconds = self._seconds[name]
            values[f"{name}_seconds"] = seconds
            if name in work and seconds > 0:
                values[f"{name}_tokens_per_second"] = work[name].tokens / seconds
                if self._peak is not None and work[name].flops > 0:
                    values[f"{name}_mfu"] = work[name].flops / (seconds * self._peak)
        values["other_seconds"] = values["seconds"] - sum(self._seconds.values())
        if self._device.type == "cuda":
            values["gpu_peak_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        values["host_rss_gib"] = psutil.Process().memory_info().rss / 2**30
        self._seconds, self._start = {}, now
        return values


def phase_clock(config: RunConfig, device: torch.device, world_size: int) -> PhaseClock:
    """The clock of a run. Utilisation is of the GPU's bf16 rate: on a CPU, a GPU without figures and in fp32 there is
    none.
    """
    peak = None
    if device.type == "cuda" and config.model.dtype == "bf16":
        gpu = gpu_of_device(torch.cuda.get_device_name(device))
        peak = None if gpu is None else gpu.flops * world_size
    return PhaseClock(peak, device)


@dataclass(frozen=True)
class Shapes:
    """Of the models that an iteration runs. reference None: its log-probs are the policy's. judges: reward model and
    process model, where there are such.
    """

    policy: ModelShape
    critic: ModelShape
    reference: ModelShape | None
    judges: tuple[ModelShape, ...]


def iteration_work(
    shapes: Shapes, lengths: Sequence[float], response_lengths: Sequence[float], config: PpoConfig, *, trains: bool
) -> dict[str, Work]:
    """Of sampling, scoring and learning from sequences of `lengths` tokens, `response_lengths` of them sampled.

    trains: the policy learns too. Dialogues of data.ptx and what is sampled and then dropped are not counted.
    """
    total, sampled = sum(lengths), sum(response_lengths)
    policy = _forward(shapes.policy, lengths, sampled)
    critic = _forward(shapes.critic, lengths, sampled)
    scoring = critic + sum(_forward(judge, lengths, len(lengths)) for judge in shapes.judges)
    if shapes.reference is not None:
        scoring += _forward(shapes.reference, lengths, sampled)
    if config.old_logprobs == "recompute":
        scoring += policy
    learning = 3 * config.epochs * (critic + (policy if trains else 0.0))
    return {
        "rollout": Work(sampled, policy),
        "scoring": Work(total, scoring),
        "update": Work(config.epochs * total, learning),
    }


def _forward(shape: ModelShape, lengths: Sequence[float], num_rows: float) -> float:
    """One forward pass, with a head on num_rows of the tokens."""
    head = 2.0 * (shape.hidden_size if shape.scalar else vocabulary_matrix(shape, 1))
    return sum(length * forward_flops(shape, length) for length in lengths) + num_rows * head
