"""One group of requests on its way through the pipeline stages, step by step.

The host plans steps from lengths alone, so a step can be launched before the host knows the tokens of the one before
it: `launch` does not wait for a GPU, `collect` reads the tokens of launched steps and ends the requests that they end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from ppomax.engine.config import SamplingConfig
from ppomax.engine.data.batches import Pack
from ppomax.engine.models.roles import Role
from ppomax.engine.parallel.stages import receive_from_previous_stage, start_broadcast_of_last_stage, start_send_to_next
from ppomax.engine.rollout.batch import NUM_DRAWN, Batch
from ppomax.engine.rollout.draw import StopRule, draw
from ppomax.engine.rollout.paged_cache import PagedCache, PagedStep
from ppomax.engine.rollout.pages import pages_for
from ppomax.engine.rollout.scheduler import Entry, Limits, Request, Scheduler


@dataclass(frozen=True)
class Drawn:
    """What a launched step draws for the tokens at positions [R] of requests: values [NUM_DRAWN, R], once they arrive.

    index [R]: the requests, on the device.
    """

    requests: list[int]
    index: Tensor
    positions: Tensor
    values: Tensor
    arrival: dist.Work | None


class Flight:
    """Requests of one replica, with a scheduler and a cache. All ranks of the replica take the same steps."""

    def __init__(
        self,
        role: Role,
        batch: Batch,
        requests: Sequence[Request],
        limits: Limits,
        sampling: SamplingConfig,
        stop: StopRule,
        on_token: Callable[[int, int], None] | None = None,
    ) -> None:
        self.role, self.batch, self.limits, self.sampling, self.stop = role, batch, limits, sampling, stop
        self.on_token = on_token
        self.scheduler = Scheduler(requests, limits)
        self.cache = PagedCache(role.stage, num_pages=limits.num_pages, page_size=limits.page_size)
        self._arriving: list[Drawn] = []
        self._unread: list[Drawn] = []
        self._ended: set[int] = set()
        self._sent: tuple[Tensor, dist.Work] | None = None

    @property
    def is_done(self) -> bool:
        return self.scheduler.is_done and not self._unread

    def launch(self) -> None:
        """Plans and starts the next step, if there is one before `collect`."""
        step = self.scheduler.plan()
        if step is None:
            return
        self._settle()
        self.cache.copy_pages(step.copies)
        pack, view = self._inputs(step.entries)
        hidden = self._run_stage(pack, view)
        last = [entry for entry in step.entries if entry.is_last]
        device = self.role.device
        index = torch.tensor([entry.request for entry in last], dtype=torch.int64, device=device)
        positions = torch.tensor([entry.start + entry.count for entry in last], dtype=torch.int64, device=device)
        values, arrival = torch.empty(NUM_DRAWN, len(last), dtype=torch.float64, device=device), None
        if last:
            if hidden is not None:
                values = draw(self.role, hidden, self.batch, index, positions, self.sampling, self.stop)
            arrival = start_broadcast_of_last_stage(values, self.role.groups)
        drawn = Drawn([entry.request for entry in last], index, positions, values, arrival)
        self._arriving.append(drawn)
        self._unread.append(drawn)

    def collect(self) -> None:
        """Reads the tokens of every launched step; waits for the device."""
        self._settle()
        unread, self._unread = self._unread, []
        for step in unread:
            tokens = dict(zip(step.requests, step.values[0].long().tolist(), strict=True))
            running = [request for request in tokens if request not in self._ended]
            self.scheduler.record(tokens, [request for request in running if self._ends(request, tokens[request])])
            if self.on_token is not None:
                for request in running:
                    self.on_token(request, tokens[request])

    def _ends(self, request: int, token: int) -> bool:
        """Whether EOS or a stop sequence ends a running request with this token; notes its length in the batch."""
        prompt_length, known = len(self.batch.prompts[request]), self.scheduler.known(request)
        ends = self.stop.ends([*known[prompt_length:], token])
        self.batch.lengths[request] = len(known) + 1
        self.batch.finished[request] = int(ends)
        if ends or len(known) + 1 == self.batch.max_lengths[request]:
            self._ended.add(request)
        return ends

    def _settle(self) -> None:
        """Puts the tokens of launched steps where the next step reads them."""
        for drawn in self._arriving:
            if drawn.arrival is not None:
                drawn.arrival.wait()
            self.batch.put(drawn.index, drawn.positions, drawn.values)
        self._arriving = []

    def _inputs(self, entries: Sequence[Entry]) -> tuple[Pack, PagedStep]:
        """The packed tokens of a step, and where they go in the cache."""
        device, page_size = self.role.device, self.limits.page_size
        tables = [self.scheduler.page_table(entry.request) for entry in entries]
        width = pages_for(self.limits.max_context, page_size)
        requests = [entry.request for entry in entries for _ in range(entry.count)]
        positions = [entry.start + i for entry in entries for i in range(entry.count)]
        slots = [
            table[(entry.start + i) // page_size] * page_size + (entry.start + i) % page_size
            for entry, table in zip(entries, tables, strict=True)
            for i in range(entry.count)
        ]
        ends = [0, *accumulate(entry.count for entry in entries)]
        rows = [end - 1 for entry, end in zip(entries, ends[1:], strict=True) if entry.is_last]
        multiple_of = self.role.groups.layout.tp if self.role.stage.config.sequence_parallel else 1
        padding = [0] * (-len(positions) % multiple_of)

        def on_device(x: list, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(x, dtype=dtype).to(device, non_blocking=True)

        index, position = on_device(requests + padding), on_device(positions + padding)
        row = on_device(rows)
        pack = Pack(
            tokens=self.batch.tokens[index, position],
            positions=position,
            cu_seqlens=on_device(ends, torch.int32),
            max_seqlen=max(entry.count for entry in entries),
            rows=row,
            labels=torch.full_like(row, -1),
            index=row,
            sequences=(),
        )
        view = PagedStep(
            cache=self.cache,
            slots=on_device(slots + [-1] * len(padding)),
            page_tables=on_device([table + [0] * (width - len(table)) for table in tables], torch.int32),
            context_lengths=on_device([entry.start + entry.count for entry in entries], torch.int32),
            cu_queries=pack.cu_seqlens,
            max_query=pack.max_seqlen,
            max_context=self.limits.max_context,
        )
        return pack, view

    def _run_stage(self, pack: Pack, view: PagedStep) -> Tensor | None:
        """Takes the pack through this stage: on the last one hidden [R, H] of its rows, None on the others."""
        role, groups = self.role, self.role.groups
        if not groups.is_first_stage:
            num_tokens = pack.tokens.numel() // (groups.layout.tp if role.stage.config.sequence_parallel else 1)
            sizes = (num_tokens, 1, role.shape.hidden_size)
            received = receive_from_previous_stage(sizes, role.stage.config.params_dtype, role.device, groups)
            role.stage.decoder.set_input_tensor(received)
        hidden = role.stage(pack, view)
        if groups.is_last_stage:
            return hidden
        if self._sent is not None:
            self._sent[1].wait()
        self._sent = start_send_to_next(hidden, groups)
        return None
