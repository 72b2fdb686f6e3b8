"""What the device is told of one step: a single vector of numbers, so that it takes one copy, and the views of it."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ppomax.engine.rollout.scheduler import Entry

ALIGNMENT = 4
"""Numbers, 16 bytes: Triton compiles a kernel once more for each set of pointers that are no multiples of 16."""


@dataclass(frozen=True)
class StepSizes:
    """tokens: of the step. requests: that it serves. drawn: tokens that are drawn after it. max_query: tokens of one
    request. width: pages of one request.
    """

    tokens: int
    requests: int
    drawn: int
    max_query: int
    width: int

    @property
    def only_decodes(self) -> bool:
        """Each request has one token and draws the next."""
        return self.tokens == self.requests == self.drawn


@dataclass(frozen=True)
class StepNumbers:
    """N tokens of R requests, M of which draw a token afterwards; int32 each, on the host.

    index, positions, slots [N]: of each token the request (a row of Batch), the place in it, and that in the cache.
    contexts [R], cu_queries [R + 1], page_tables [R, width]: see kernels/paged_attention.py.
    rows [M]: the tokens after which one is drawn. drawn_index, drawn_positions [M]: the request and place of that one.
    """

    index: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    contexts: np.ndarray
    cu_queries: np.ndarray
    page_tables: np.ndarray
    rows: np.ndarray
    drawn_index: np.ndarray
    drawn_positions: np.ndarray

    def packed(self) -> np.ndarray:
        """All of it end to end, each part at a multiple of ALIGNMENT."""
        parts = [part.ravel() for part in vars(self).values()]
        vector = np.zeros(sum(_aligned(part.size) for part in parts), dtype=np.int32)
        begin = 0
        for part in parts:
            vector[begin : begin + part.size] = part
            begin += _aligned(part.size)
        return vector

    def padded(self, num: int) -> "StepNumbers":
        """A step that only decodes, for `num` requests: those behind repeat the first, but store nothing and see one
        token; what they draw is not wanted.
        """
        more = num - len(self.contexts)
        again = {
            name: np.concatenate([part, np.repeat(part[:1], more, axis=0)])
            for name, part in vars(self).items()
            if name not in ("cu_queries", "rows")
        }
        again["slots"][num - more :], again["contexts"][num - more :] = -1, 1
        every = np.arange(num + 1, dtype=np.int32)
        return StepNumbers(**again, cu_queries=every, rows=every[:-1])


@dataclass(frozen=True)
class StepInputs:
    """As StepNumbers, on the device: views of one vector."""

    index: Tensor
    positions: Tensor
    slots: Tensor
    contexts: Tensor
    cu_queries: Tensor
    page_tables: Tensor
    rows: Tensor
    drawn_index: Tensor
    drawn_positions: Tensor


PARTS = tuple(field.name for field in fields(StepInputs))
"""In the order of the vector, which is that of StepNumbers."""


def split_inputs(vector: Tensor, sizes: StepSizes) -> StepInputs:
    """The parts of what `StepNumbers.packed` gives."""
    n, r, m = sizes.tokens, sizes.requests, sizes.drawn
    counts = [n, n, n, r, r + 1, r * sizes.width, m, m, m]
    ends = accumulate(map(_aligned, counts), initial=0)
    parts = {name: vector[at : at + count] for name, count, at in zip(PARTS, counts, ends, strict=False)}
    return StepInputs(**{**parts, "page_tables": parts["page_tables"].view(r, sizes.width)})


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


class StepTables:
    """Turns the entries of a step into numbers. It remembers the page tables of the last step.

    requests: all that may come. width: pages of the longest one.
    """

    def __init__(self, requests: Sequence[int], page_size: int, width: int) -> None:
        self._page_size, self._width = page_size, width
        self._place = {request: place for place, request in enumerate(requests)}
        self._tables = np.zeros((len(requests), width), dtype=np.int32)
        self._known: list[tuple[list[int], int]] = [([], 0)] * len(requests)

    def of(self, entries: Sequence[Entry], tables: Sequence[list[int]]) -> tuple[StepNumbers, StepSizes]:
        """tables: the pages of each entry's request."""
        places = [self._remember(entry.request, table) for entry, table in zip(entries, tables, strict=True)]
        request = np.array([entry.request for entry in entries], dtype=np.int32)
        start = np.array([entry.start for entry in entries], dtype=np.int32)
        count = np.array([entry.count for entry in entries], dtype=np.int32)
        is_last = np.array([entry.is_last for entry in entries], dtype=bool)
        ends = np.zeros(len(entries) + 1, dtype=np.int32)
        np.cumsum(count, out=ends[1:])
        num_tokens = int(ends[-1])
        of_token = np.repeat(np.arange(len(entries)), count) if num_tokens > len(entries) else slice(None)
        positions = (start - ends[:-1])[of_token] + np.arange(num_tokens, dtype=np.int32)
        page_tables = self._tables[places]
        page = page_tables[np.arange(len(entries))[of_token], positions // self._page_size]
        numbers = StepNumbers(
            index=request[of_token],
            positions=positions,
            slots=page * self._page_size + positions % self._page_size,
            contexts=start + count,
            cu_queries=ends,
            page_tables=page_tables,
            rows=ends[1:][is_last] - 1,
            drawn_index=request[is_last],
            drawn_positions=(start + count)[is_last],
        )
        return numbers, StepSizes(num_tokens, len(entries), int(is_last.sum()), int(count.max()), self._width)

    def _remember(self, request: int, table: list[int]) -> int:
        """Brings the row of a request up to date; returns its place. A request keeps its list while it runs."""
        place = self._place[request]
        known, num_known = self._known[place]
        if table is not known or len(table) != num_known:
            first = num_known if table is known else 0
            self._tables[place, first : len(table)] = table[first:]
            self._known[place] = (table, len(table))
        return place


def to_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """The vector on the device; the host does not wait for the copy."""
    vector = torch.from_numpy(numbers)
    return vector.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else vector
