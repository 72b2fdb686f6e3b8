"""Decoding steps as CUDA graphs: the host starts a step by one call, whatever the number of layers.

A graph reads and writes fixed memory for a fixed number of requests; a step takes the next larger of some sizes. Graphs
live as long as their flight: the cache that they read has other addresses in each call of the generator.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppomax.engine.config import SamplingConfig
from ppomax.engine.rollout.step_inputs import StepNumbers, StepSizes, to_device

Compute = Callable[[Tensor, StepSizes, Tensor | None], Tensor]

COARSE = 16
"""Beyond this number of requests sizes are multiples of it, below powers of two."""

RECORD_AT_USE = 3
"""Recording costs about as much as some steps: a size that comes less often is run as it is."""


def graph_size(num_requests: int) -> int:
    """Requests of the graph that serves so many."""
    if num_requests <= COARSE:
        return 1 << (num_requests - 1).bit_length()
    return -(-num_requests // COARSE) * COARSE


def uses_graphs(sampling: SamplingConfig, device: torch.device) -> bool:
    """Whether decoding steps are recorded and replayed."""
    return sampling.cuda_graphs and device.type == "cuda"


@dataclass(frozen=True)
class Recording:
    """A step for a fixed number of requests. vector, received: what `replay` reads; output: what it writes."""

    vector: Tensor
    received: Tensor | None
    output: Tensor
    replay: Callable[[], None]


class DecodeGraphs:
    """compute(vector, sizes, received) takes a step through one chunk; width: pages of one request.

    requests_dim: dimension of its result that counts requests: 0 for hidden states, 1 for drawn tokens.
    Every rank of the replica runs, and records, the same sizes at the same steps: collectives of the step are in it.
    """

    def __init__(self, compute: Compute, *, width: int, requests_dim: int, device: torch.device) -> None:
        self._compute, self._width, self._requests_dim, self._device = compute, width, requests_dim, device
        self._recordings: dict[int, Recording] = {}
        self._uses: dict[int, int] = {}
        self._pool: Any = None

    def run(self, numbers: StepNumbers, received: Tensor | None) -> Tensor:
        """The result of `compute` for a step that only decodes; received [N, H] as `compute` takes it."""
        num_requests = len(numbers.contexts)
        size = graph_size(num_requests)
        self._uses[size] = self._uses.get(size, 0) + 1
        if self._uses[size] < RECORD_AT_USE:
            sizes = self._sizes(num_requests)
            return self._compute(to_device(numbers.packed(), self._device), sizes, received)
        vector = to_device(numbers.padded(size).packed(), self._device)
        if size not in self._recordings:
            if received is not None:
                more = received.new_zeros(size - num_requests, received.shape[1])
                received = torch.cat([received, more])
            self._recordings[size] = self._record(vector, self._sizes(size), received)
        else:
            recording = self._recordings[size]
            recording.vector.copy_(vector)
            if received is not None and recording.received is not None:
                recording.received[:num_requests] = received
        recording = self._recordings[size]
        recording.replay()
        # A copy: the next replay writes to the same memory.
        return recording.output.narrow(self._requests_dim, 0, num_requests).clone()

    def _sizes(self, num: int) -> StepSizes:
        return StepSizes(tokens=num, requests=num, drawn=num, max_query=1, width=self._width)

    def _record(self, vector: Tensor, sizes: StepSizes, received: Tensor | None) -> Recording:
        """Runs the step once, so that kernels are compiled and collectives set up, and records it: a step may be run
        twice, it then writes the same keys and values to the same places.
        """

        def compute() -> Tensor:
            # The chunk works in place on what it receives.
            return self._compute(vector, sizes, None if received is None else received.clone())

        compute()
        if self._pool is None:
            # One for all sizes: a replay's result is copied before the next one starts.
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's watchdog, may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = compute()
        return Recording(vector, received, output, graph.replay)
