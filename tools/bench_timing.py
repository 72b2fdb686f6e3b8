"""Times of functions on one device, against what the device can do at best; nothing here knows an operation.

On CUDA every call starts with a cold L2 cache and is timed by events on the stream, as `triton.testing.do_bench` does;
on a CPU by the clock.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Function = Callable[[], object]

FLUSH_BYTES = 2**28
"""Written before every timed call: more than the L2 cache of any GPU holds."""

NUM_REPEATS = 2
LEAST_CALLS, MOST_CALLS = 3, 500
WARM_UP_SHARE = 0.25


@dataclass(frozen=True)
class Time:
    """Seconds of one call: quantiles over all calls, and how far the medians of the repeats lie apart, relative."""

    median: float
    p20: float
    p80: float
    spread: float
    num_calls: int


@dataclass(frozen=True)
class Ceilings:
    """Measured here and now: bytes per second, read and written, of a copy; operations per second of a product."""

    bytes_per_second: float
    flops_per_second: float
    what: str

    def floor(self, num_bytes: float, num_flops: float) -> float:
        """Seconds that the device needs at least."""
        return max(num_bytes / self.bytes_per_second, num_flops / self.flops_per_second)


@dataclass
class Measured:
    """What is known of one function after its repeats; failure: why there are no samples."""

    repeats: list[list[float]]
    extra_bytes: int | None = None
    failure: str = ""


def measure(
    builders: Mapping[str, Callable[[], Function]], device: torch.device, *, seconds: float
) -> dict[str, Measured]:
    """Samples of each function, `seconds` long in each repeat.

    Repeats go round all functions, so that drift meets them alike. A function is built when its turn comes and dropped
    behind it, so that the memory of one is not in the way of the others.
    """
    measured = {name: Measured([]) for name in builders}
    for _ in range(NUM_REPEATS):
        for name, build in builders.items():
            if measured[name].failure:
                continue
            try:
                _add_repeat(measured[name], build(), device, seconds)
            except Exception as error:  # of another library: the rest is still worth measuring
                measured[name].failure = f"{type(error).__name__}: {error}"
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return measured


def _add_repeat(measured: Measured, function: Function, device: torch.device, seconds: float) -> None:
    measured.repeats.append(_samples(function, device, seconds))
    if measured.extra_bytes is None:
        measured.extra_bytes = extra_bytes(function, device)


def summary(repeats: list[list[float]]) -> Time:
    """Quantiles of all samples together; spread: largest median of a repeat over the smallest, minus 1."""
    medians = [statistics.median(repeat) for repeat in repeats]
    pooled = sorted(sample for repeat in repeats for sample in repeat)
    return Time(
        median=statistics.median(pooled),
        p20=_quantile(pooled, 0.2),
        p80=_quantile(pooled, 0.8),
        spread=max(medians) / max(min(medians), 1e-12) - 1,
        num_calls=len(pooled),
    )


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _samples(function: Function, device: torch.device, seconds: float) -> list[float]:
    function()  # compiles, perhaps
    synchronize(device)
    start = time.perf_counter()
    num_warm = 0
    while num_warm == 0 or time.perf_counter() - start < WARM_UP_SHARE * seconds:
        function()
        num_warm += 1
        synchronize(device)
    each = (time.perf_counter() - start) / num_warm
    num_calls = min(MOST_CALLS, max(LEAST_CALLS, int(seconds / each)))
    return _cuda_samples(function, device, num_calls) if device.type == "cuda" else _cpu_samples(function, num_calls)


def _cpu_samples(function: Function, num_calls: int) -> list[float]:
    samples = []
    for _ in range(num_calls):
        start = time.perf_counter()
        function()
        samples.append(time.perf_counter() - start)
    return samples


def _cuda_samples(function: Function, device: torch.device, num_calls: int) -> list[float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(num_calls)] for _ in range(2))
    for start, end in zip(starts, ends, strict=True):
        flush.zero_()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in zip(starts, ends, strict=True)]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def captured(function: Function) -> Function:
    """The replay of a CUDA graph of one call: the work of the device alone, without that of launching it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def replay() -> object:
        graph.replay()
        return result

    return replay


def extra_bytes(function: Function, device: torch.device) -> int | None:
    """Memory that a call needs beyond what was there before, at its peak; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    kept = function()
    torch.cuda.synchronize(device)
    del kept
    return torch.cuda.max_memory_allocated(device) - before


def ceilings(device: torch.device, *, seconds: float) -> Ceilings:
    """A copy of 2 GiB and a product of 8192 x 8192 bf16 matrices; 256 MiB and 1024 x 1024 fp32 on a CPU."""
    on_cuda = device.type == "cuda"
    num_bytes, size, dtype = (2**31, 8192, torch.bfloat16) if on_cuda else (2**28, 1024, torch.float32)
    # Random numbers: a product of zeros runs faster, since it needs less power.
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    measured = measure(
        {"copy": lambda: _copy(num_bytes, device), "product": lambda: lambda: a @ b}, device, seconds=seconds
    )
    copy, product = (summary(measured[name].repeats).median for name in ("copy", "product"))
    what = f"copy of {num_bytes >> 20} MiB, product of {size} x {size} {str(dtype).removeprefix('torch.')} matrices"
    return Ceilings(2 * num_bytes / copy, 2 * size**3 / product, what)


def _copy(num_bytes: int, device: torch.device) -> Function:
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
