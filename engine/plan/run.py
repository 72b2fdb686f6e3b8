"""The plan of a run on the machine that it runs on: checked before anything is allocated, compared at the end."""

import os
import resource
from collections.abc import Callable

import psutil
import torch
import torch.distributed as dist

from ppomax.engine.config import RunConfig
from ppomax.engine.errors import DoesNotFitError
from ppomax.engine.plan.plan import Plan, make_plan

RESERVE = 3 * 2**30
"""Of a GPU's memory: CUDA context, cuBLAS workspaces, NCCL's buffers, what the allocator cannot use."""


def plan_run(config: RunConfig, command: str, world_size: int, *, vocab_size: Callable[[], int]) -> Plan:
    """The plan of a stage for this rank's device; no process group, nothing allocated.

    vocab_size: the tokenizer's, asked where [model.init] has none. Raises DoesNotFitError where the plan exceeds the
    memory of the GPU, unless parallel.check_memory is off.
    """
    capacity = _gpu_memory()
    device = "cpu" if capacity is None else "cuda"
    plan = make_plan(config, command, world_size, capacity=capacity, device=device, vocab_size=vocab_size)
    if plan.faults and config.parallel.check_memory:
        raise DoesNotFitError(
            "\n".join(
                [
                    f"the plan of {command} on {world_size} ranks does not fit this GPU:",
                    *plan.faults,
                    "`ppomax plan` with the same configuration says what to change; parallel.check_memory=false starts "
                    "the run nevertheless",
                ]
            )
        )
    return plan


class MemoryMeter:
    """What this rank takes from now on. what: in words, for the log."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            self.what = "most that was allocated on the GPU"
            torch.cuda.reset_peak_memory_stats(device)
        else:
            self.what = "growth of the process's peak resident memory"
            self._before = psutil.Process().memory_info().rss

    def peaks(self) -> list[int]:
        """Bytes by rank. Collective over all ranks."""
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self._before)
        peaks = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=self._device)
        peaks[dist.get_rank()] = peak
        dist.all_reduce(peaks)
        return peaks.tolist()


def _gpu_memory() -> int | None:
    """Bytes of this rank's GPU that a run can use; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    number = min(int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count() - 1)
    return torch.cuda.get_device_properties(number).total_memory - RESERVE
