"""What looks on while responses are generated, and may end some of them early.

The generator lets it look after the same turns on every rank of a replica. What replicas must agree on they exchange
there: one that has nothing left to generate stays for that. Results must be functions of the responses alone, not of
when somebody looked.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ppomax.engine.models.roles import Role
from ppomax.engine.parallel.stages import max_over_replica, sum_over_replicas
from ppomax.engine.ppo.types import Rollout
from ppomax.engine.rollout.batch import Batch, make_rollout


class Running(Protocol):
    """Requests under way on this replica: a `flight.Flight`."""

    @property
    def open_requests(self) -> list[int]:
        """Rows of the batch that have not ended, as far as known."""

    def end(self, request: int) -> None:
        """Ends one with the tokens known so far."""


class Watch(Protocol):
    """every: turns between two looks. goes_on: replicas without requests must still look."""

    every: int
    goes_on: bool

    def look(self, flights: Sequence[Running]) -> None:
        """flights: those of this replica that are not done."""


MakeWatch = Callable[[Batch, Sequence[int], Role], Watch]
"""From the batch, the rows of this replica and the role that samples."""


class Quota:
    """Ends generation when num_wanted responses of the global batch have ended: the first in the order of (tokens
    drawn in this call, row).

    Of the others no more is kept than as many tokens as the last of these has drawn: `num_tokens` of the result. That
    depends on no layout, limit or interval. All replicas must look together.
    """

    every = 8

    def __init__(self, num_wanted: int, batch: Batch, share: Sequence[int], role: Role) -> None:
        assert num_wanted <= len(batch.prompts), f"{num_wanted} of {len(batch.prompts)} responses wanted"
        self.goes_on = True
        self._num_wanted, self._batch, self._share, self._role = num_wanted, batch, share, role
        self._most = max(most - len(known) for most, known in zip(batch.max_lengths, batch.known, strict=True))
        self._stopped: set[int] = set()

    def look(self, flights: Sequence[Running]) -> None:
        if not self.goes_on:
            return
        running = [(flight, request) for flight in flights for request in flight.open_requests]
        has_ended = set(self._share) - {request for _, request in running} - self._stopped
        # Responses that have ended, by the tokens drawn for them; then those that have not.
        counts = torch.zeros(self._most + 2, dtype=torch.int64)
        for request in has_ended:
            counts[self._num_drawn(request)] += 1
        counts[-1] = len(running)
        counts = counts.to(self._role.device)
        sum_over_replicas(counts, self._role.groups)
        counts = counts.cpu()
        # No response that is longer than this can be among the first; it only falls as more of them end.
        longest = int((counts[:-1].cumsum(0) < self._num_wanted).sum())
        for flight, request in running:
            if self._num_drawn(request) >= longest:
                flight.end(request)
                self._stopped.add(request)
        if counts[-1] == 0:
            self._cut(longest)
            self.goes_on = False

    def _num_drawn(self, request: int) -> int:
        return self._batch.lengths[request] - len(self._batch.known[request])

    def _cut(self, longest: int) -> None:
        """Takes back what was drawn beyond the last response that is wanted."""
        for request in self._share:
            if self._num_drawn(request) > longest:
                self._batch.lengths[request] = len(self._batch.known[request]) + longest
                self._batch.finished[request] = 0


class Ended:
    """Tells, while others are still being sampled, which responses have ended: at least chunk_size at a time.

    on_ended: called with their rows of the batch and the rollout of these rows alone, on every rank of the role with
    the same ones. Those that end last are not told. All replicas must look together.
    """

    every = 8

    def __init__(
        self,
        chunk_size: int,
        on_ended: Callable[[Sequence[int], Rollout], None],
        pad_id: int,
        batch: Batch,
        share: Sequence[int],
        role: Role,
    ) -> None:
        self.goes_on = True
        self._chunk_size, self._on_ended, self._pad_id = chunk_size, on_ended, pad_id
        self._batch, self._share, self._role = batch, share, role
        self._told: set[int] = set()

    def look(self, flights: Sequence[Running]) -> None:
        if not self.goes_on:
            return
        running = {request for flight in flights for request in flight.open_requests}
        has_ended = torch.zeros(len(self._batch.prompts), dtype=torch.int64)
        has_ended[[request for request in self._share if request not in running]] = 1
        has_ended = has_ended.to(self._role.device)
        sum_over_replicas(has_ended, self._role.groups)
        ended = has_ended.nonzero().flatten().tolist()
        new = [request for request in ended if request not in self._told]
        if len(ended) == len(self._batch.prompts):
            self.goes_on = False
        elif len(new) >= self._chunk_size:
            self._told |= set(new)
            self._on_ended(new, self._rollout(new))

    def _rollout(self, rows: Sequence[int]) -> Rollout:
        """Some responses that have ended, from the replicas that have them."""
        batch, device, own = self._batch, self._role.device, set(self._share)
        index = torch.tensor(rows, device=device)
        is_own = torch.tensor([row in own for row in rows], device=device)

        def shared(x: Tensor) -> Tensor:
            part = x.to(device)[index]
            part[~is_own] = 0
            sum_over_replicas(part, self._role.groups)
            return part

        return make_rollout(
            shared(batch.tokens),
            batch.prompt_lengths[index],
            shared(torch.tensor(batch.lengths)),
            shared(torch.tensor(batch.finished)),
            shared(batch.logprobs),
            shared(batch.margins),
            pad_id=self._pad_id,
        )


class Aborts:
    """Ends requests that somebody gives up while they run: from another thread, or a signal handler.

    aborted: rows of the batch given up so far. Ranks of a replica may learn of one at different steps: they agree, so
    one that knows is enough, and look less often for it. Replicas need not look together.
    """

    goes_on = False

    def __init__(self, aborted: Callable[[], Sequence[int]], batch: Batch, share: Sequence[int], role: Role) -> None:
        self._aborted, self._num_rows, self._role = aborted, len(batch.prompts), role
        self.every = 1 if role.groups.megatron.mp.size() == 1 else 4

    def look(self, flights: Sequence[Running]) -> None:
        aborted = set(self._agreed(self._aborted()))
        for flight in flights if aborted else ():
            for request in flight.open_requests:
                if request in aborted:
                    flight.end(request)

    def _agreed(self, rows: Sequence[int]) -> Sequence[int]:
        """What any rank of the replica knows."""
        if self._role.groups.megatron.mp.size() == 1:
            return rows
        most = torch.tensor(len(rows), device=self._role.device)
        max_over_replica(most, self._role.groups)
        if int(most) == 0:
            return ()
        flags = torch.zeros(self._num_rows, dtype=torch.int64)
        flags[list(rows)] = 1
        flags = flags.to(self._role.device)
        max_over_replica(flags, self._role.groups)
        return flags.nonzero().flatten().tolist()
