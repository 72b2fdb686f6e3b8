"""One group of requests on its way through the pipeline stages, step by step.

The host plans steps from lengths alone, so a step can be launched before the host knows the tokens of the one before
it: `launch` does not wait for a GPU, `collect` reads the tokens of launched steps and ends the requests that they end.
"""

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ppomax.engine.config import SamplingConfig
from ppomax.engine.models.roles import Role
from ppomax.engine.models.transformer import PackedModel
from ppomax.engine.parallel.stages import receive_from_previous_stage, start_broadcast_of_last_stage, start_send_to_next
from ppomax.engine.rollout.batch import NUM_DRAWN, Batch
from ppomax.engine.rollout.draw import StopRule, draw
from ppomax.engine.rollout.graphs import DecodeGraphs, uses_graphs
from ppomax.engine.rollout.inference import InferenceStage
from ppomax.engine.rollout.many_steps import MOST_STEPS, ManySteps
from ppomax.engine.rollout.paged_cache import PagedCache, PagedStep
from ppomax.engine.rollout.pages import pages_for
from ppomax.engine.rollout.scheduler import Limits, Request, Scheduler, Step
from ppomax.engine.rollout.step_inputs import StepNumbers, StepSizes, StepTables, split_inputs, to_device
from ppomax.kernels.decoding_c import can_decode


@dataclass
class Drawn:
    """What a launched step draws for the tokens at positions [R] of requests: values [NUM_DRAWN, R], once they arrive.

    index [R]: the requests, on the device. tokens [R]: on the host, once `ready`; None before the values are there.
    """

    requests: list[int]
    index: Tensor
    positions: Tensor
    values: Tensor
    arrival: dist.Work | None
    tokens: Tensor | None = None
    ready: torch.cuda.Event | None = None

    def start_reading(self) -> None:
        """The host does not wait: the tokens follow when the device has drawn them."""
        self.tokens = self.values[0]
        if self.values.is_cuda:
            self.tokens = torch.empty(len(self.requests), dtype=torch.float64, pin_memory=True)
            self.tokens.copy_(self.values[0], non_blocking=True)
            self.ready = torch.cuda.Event()
            self.ready.record()

    def read(self) -> list[int]:
        """Waits for the device."""
        assert self.tokens is not None
        if self.ready is not None:
            self.ready.synchronize()
        return [int(token) for token in self.tokens.tolist()]


@dataclass(frozen=True)
class Known:
    """Tokens of a step that the host has already."""

    requests: list[int]
    tokens: list[int]

    def read(self) -> list[int]:
        return self.tokens


@dataclass(frozen=True)
class Launched:
    """A step on its way through the chunks."""

    numbers: StepNumbers
    sizes: StepSizes


class Flight:
    """Requests of one replica, with a scheduler and a cache. All ranks of the replica take the same steps."""

    def __init__(
        self,
        role: Role,
        stage: InferenceStage,
        batch: Batch,
        requests: Sequence[Request],
        limits: Limits,
        sampling: SamplingConfig,
        stop: StopRule,
        on_token: Callable[[int, int], None] | None = None,
        *,
        is_watched: bool = True,
    ) -> None:
        """is_watched: somebody looks on between steps."""
        self.role, self.batch, self.limits, self.sampling, self.stop = role, batch, limits, sampling, stop
        self.stage, self.on_token = stage, on_token
        self.scheduler = Scheduler(requests, limits)
        self.cache = PagedCache(role.chunks, num_pages=limits.num_pages, page_size=limits.page_size)
        self._indices = [request.index for request in requests]
        width = pages_for(limits.max_context, limits.page_size)
        self._tables = StepTables(self._indices, limits.page_size, width)
        self._graphs: list[DecodeGraphs] = []
        if uses_graphs(sampling, role.device):
            self._graphs = [
                DecodeGraphs(
                    # A proxy: a flight whose graphs hold it would keep its cache until Python looks for cycles.
                    partial(Flight._compute, weakref.proxy(self), number),
                    width=width,
                    requests_dim=1 if chunk.post_process else 0,
                    device=role.device,
                )
                for number, chunk in enumerate(role.chunks)
            ]
        self._many_steps: ManySteps | None = None
        is_alone = not is_watched and on_token is None
        if is_alone and stage.model is not None and ManySteps.fits(stage.model, sampling):
            rule = {"eos_id": stop.eos_id, "min_new_tokens": stop.min_new_tokens}
            self._many_steps = ManySteps(stage.model, batch, sampling, vocab_size=role.shape.vocab_size, **rule)
        self._launched: Launched | None = None
        self._arriving: list[Drawn] = []
        self._unread: deque[Drawn | Known] = deque()
        self._ended: set[int] = set()
        self._sent: tuple[Tensor, dist.Work] | None = None

    @property
    def is_done(self) -> bool:
        return self.scheduler.is_done and not self._unread

    @property
    def open_requests(self) -> list[int]:
        """Those that have not ended, as far as collected."""
        return [request for request in self._indices if request not in self._ended]

    def end(self, request: int) -> None:
        """Ends a request with the tokens collected so far. All ranks of the replica must call it at the same step."""
        self._ended.add(request)
        self.scheduler.abort(request)

    def launch(self) -> bool:
        """Plans the next step and takes it through the first chunk; False where there is none before `collect`."""
        step, self._launched = self.scheduler.plan(), None
        if step is None:
            return False
        self._settle()
        if self._many_steps is not None and self.scheduler.only_decodes(step) and can_decode(step.entries):
            self._launch_many(self._many_steps, step)
            return True
        self.cache.copy_pages(step.copies)
        tables = [self.scheduler.page_table(entry.request) for entry in step.entries]
        self._launched = Launched(*self._tables.of(step.entries, tables))
        self.run_chunk(0)
        return True

    def _launch_many(self, many_steps: ManySteps, step: Step) -> None:
        """Takes the planned step, and those that follow with the same requests, in one call."""
        num_steps, most = 1, self.scheduler.num_steps_with_pages
        while num_steps < min(most, MOST_STEPS) and not self.scheduler.has_planned_ends:
            following = self.scheduler.plan()
            assert following is not None
            assert len(following.entries) == len(step.entries), "the requests have changed"
            step, num_steps = following, num_steps + 1
        requests = [entry.request for entry in step.entries]
        numbers, _ = self._tables.of(step.entries, [self.scheduler.page_table(request) for request in requests])
        positions = numbers.positions - np.int32(num_steps - 1)
        tokens = many_steps.run(self.cache, numbers.index, positions, numbers.page_tables, num_steps)
        self._unread.extend(Known(requests, of_step) for of_step in tokens)

    def run_chunk(self, number: int) -> None:
        """Takes the launched step, if there is one, through a chunk of this stage; after the last one it draws."""
        if self._launched is None:
            return
        numbers, sizes, chunk = self._launched.numbers, self._launched.sizes, self.role.chunks[number]
        device = self.batch.tokens.device
        received = self._receive(chunk, sizes.tokens)
        if self._graphs and sizes.only_decodes:
            result = self._graphs[number].run(numbers, received)
        else:
            result = self._compute(number, to_device(numbers.packed(), device), sizes, received)
        if not chunk.post_process:
            self._send(result)
            result = torch.empty(NUM_DRAWN, sizes.drawn, dtype=torch.float64, device=device)
        if chunk is self.role.chunks[-1] and sizes.drawn > 0:
            arrival = start_broadcast_of_last_stage(result, self.role.groups)
            index, positions = to_device(np.stack([numbers.drawn_index, numbers.drawn_positions]), device)
            drawn = Drawn(numbers.drawn_index.tolist(), index, positions, result, arrival)
            self._arriving.append(drawn)
            self._unread.append(drawn)

    def collect(self, *, leave: int) -> None:
        """Reads the tokens of all launched steps but the newest `leave`; waits for the device as far as it must."""
        self._settle()
        for _ in range(len(self._unread) - leave):
            step = self._unread.popleft()
            tokens = dict(zip(step.requests, step.read(), strict=True))
            running = [request for request in step.requests if request not in self._ended]
            self.scheduler.record(tokens, [request for request in running if self._ends(request, tokens[request])])
            if self.on_token is not None:
                for request in running:
                    self.on_token(request, tokens[request])

    def _ends(self, request: int, token: int) -> bool:
        """Whether EOS or a stop sequence ends a running request with this token; notes its length in the batch."""
        known, num_prompt = self.scheduler.known(request), len(self.batch.prompts[request])
        length = len(known) + 1
        ends = self.stop.ends(token, known, num_prompt)
        self.batch.lengths[request] = length
        if ends:
            self.batch.finished[request] = 1
        if ends or length == self.batch.max_lengths[request]:
            self._ended.add(request)
        return ends

    def _settle(self) -> None:
        """Puts the tokens of launched steps where the next step reads them."""
        for drawn in self._arriving:
            if drawn.arrival is not None:
                drawn.arrival.wait()
            self.batch.put(drawn.index, drawn.positions, drawn.values)
            drawn.start_reading()
        self._arriving = []

    def _compute(self, number: int, numbers: Tensor, sizes: StepSizes, received: Tensor | None) -> Tensor:
        """Takes the tokens of a step through a chunk of this stage: what the next chunk gets, [N, H], or after the last
        of all what is drawn, [NUM_DRAWN, M].
        """
        inputs = split_inputs(numbers, sizes)
        view = PagedStep(
            cache=self.cache,
            slots=inputs.slots,
            page_tables=inputs.page_tables,
            context_lengths=inputs.contexts,
            cu_queries=inputs.cu_queries,
            max_query=sizes.max_query,
            max_context=self.limits.max_context,
        )
        rows = inputs.rows if sizes.drawn < sizes.tokens else None
        tokens = self.batch.tokens[inputs.index, inputs.positions]
        hidden = self.stage.run_chunk(number, tokens, inputs.positions, rows, received, view)
        if not self.role.chunks[number].post_process:
            return hidden
        return draw(
            self.role,
            self.stage.logits(hidden),
            self.batch,
            inputs.drawn_index,
            inputs.drawn_positions.long(),
            self.sampling,
            self.stop,
        )

    def _receive(self, chunk: PackedModel, num_tokens: int) -> Tensor | None:
        """What the chunk before sends; None for the first of all."""
        if chunk.pre_process:
            return None
        sizes = (num_tokens, self.role.shape.hidden_size)
        return receive_from_previous_stage(sizes, chunk.config.params_dtype, self.role.device, self.role.groups)

    def _send(self, hidden: Tensor) -> None:
        if self._sent is not None:
            self._sent[1].wait()
        self._sent = start_send_to_next(hidden, self.role.groups)
