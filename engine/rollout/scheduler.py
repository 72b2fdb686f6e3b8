"""Which tokens of which requests run in the next step, and in which pages of the cache they lie.

Continuous batching: every step decodes one token of each running request, and what is left of the step's token budget
goes to prompts, in chunks. Numbers only, no tensors: the same requests and the same recorded tokens give the same
steps on every rank. Running the steps, sampling and deciding where a response ends are the engine's.

A step may be planned before the tokens of earlier ones are known: a request's length is known though its newest tokens
are not. Steps run in the order in which they were planned. A page that is given back may be written by the next step:
what earlier ones still write into it comes before.
"""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ppomax.engine.errors import DoesNotFitError
from ppomax.engine.rollout.pages import PagePool, pages_for


@dataclass(frozen=True)
class Request:
    """index: names the request. prompt: at least one token. max_new_tokens: where its response ends at the latest.

    parent: index that several samples of one prompt have in common (that of the first of them): they share the pages
    of the prompt. The parent itself may be absent.
    """

    index: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    parent: int | None = None


@dataclass(frozen=True)
class Limits:
    """max_running: requests decoded at once (at most tokens_per_step are). tokens_per_step: tokens of one step.
    max_context: tokens of prompt and response. page_size: tokens. num_pages: pages of the cache.
    """

    max_running: int
    tokens_per_step: int
    max_context: int
    page_size: int
    num_pages: int


@dataclass(frozen=True, slots=True)
class Entry:
    """Tokens of one request in one step: `count` of them from position `start` on.

    is_last: they reach the end of the request, so a token is sampled after them.
    """

    request: int
    start: int
    count: int
    is_last: bool


@dataclass(frozen=True)
class Step:
    """entries: decoding requests first. copies: (source, target) pages, copied in the cache before the step, in any
    order: no page is both. preempted: requests that lost their pages; they come back by themselves.
    """

    entries: tuple[Entry, ...]
    copies: tuple[tuple[int, int], ...]
    preempted: tuple[int, ...]


@dataclass(eq=False)
class _Family:
    """Requests with one prompt.

    source: the running request that computes or has computed the prompt; the others take its pages.
    held: pages of the prompt that the family owns itself, for those that wait, once the source is gone; or empty.
    """

    prompt: tuple[int, ...]
    num_waiting: int = 0
    source: "_State | None" = None
    held: list[int] = field(default_factory=list)


@dataclass(eq=False)
class _State:
    """known: tokens of prompt and response so far. num_planned: those and the samples that are still to be recorded.

    num_cached: positions whose keys and values are in `pages`, or will be when the planned steps have run.
    prompt_step: number of the step that completes the prompt in `pages`; 0 before it is planned.
    """

    request: Request
    family: _Family
    max_length: int
    known: list[int]
    num_planned: int
    num_cached: int = 0
    pages: list[int] = field(default_factory=list)
    prompt_step: int = 0
    is_waiting: bool = False
    has_ended: bool = False


class Scheduler:
    """Plans the steps of a group of requests from the first to the last.

    First come, first served. A request starts when there are pages for all its known tokens. Where a running one finds
    no page for its next token, prompts held for waiting requests go first, then the requests that started last: they
    wait at the head of the queue and compute their tokens again. Only the request that started last can be in
    the middle of its prompt. Raises DoesNotFitError where the pages do not hold one of the requests alone.
    """

    def __init__(self, requests: Sequence[Request], limits: Limits) -> None:
        self._limits = limits
        self._max_running = min(limits.max_running, limits.tokens_per_step)
        assert self._max_running > 0, f"nothing can run with {limits}"
        self._pool = PagePool(limits.num_pages, limits.page_size)
        self._step = 0
        self._states = _new_states(requests, limits)
        # In the order in which they started.
        self._running: dict[int, _State] = {}
        self._waiting: deque[_State] = deque()
        for state in self._states.values():
            if not state.has_ended:
                self._waiting.append(state)
                _wait(state)
        self._num_open = len(self._waiting)
        # Families with held pages, in the order in which they lose them. Dicts, not sets: every rank has this order.
        self._holding: dict[_Family, None] = {}
        # Of the step planned last: families whose held pages it reads, and requests that need no step after it.
        self._read: dict[_Family, None] = {}
        self._planned_out: list[_State] = []

    @property
    def num_running(self) -> int:
        """Requests that have pages."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_free_pages(self) -> int:
        return self._pool.num_free

    @property
    def is_done(self) -> bool:
        """All requests have ended."""
        return self._num_open == 0

    def known(self, request: int) -> list[int]:
        """Prompt and response as far as recorded; the scheduler's own list, not to be changed."""
        return self._states[request].known

    def page_table(self, request: int) -> list[int]:
        """Pages of the request's positions 0, page_size, ...: right until the next plan(), record() or abort(), not to
        be changed, empty where it does not run.
        """
        return self._states[request].pages

    def plan(self) -> Step | None:
        """The next step; None where there is none before more is recorded, or, if all is recorded, none at all."""
        self._step += 1
        self._finish_last_step()
        left = self._limits.tokens_per_step
        entries: list[Entry] = []
        copies: list[tuple[int, int]] = []
        preempted: list[int] = []
        for state in tuple(self._running.values()):
            if not self._extend(state, preempted):
                break  # those behind it lost their pages before
            entries.append(self._run(state, left))
            left -= entries[-1].count
        if not preempted:
            self._admit(left, entries, copies)
        return Step(tuple(entries), tuple(copies), tuple(preempted)) if entries else None

    def record(self, tokens: Mapping[int, int], finished: Collection[int] = ()) -> None:
        """Appends the token sampled after each `is_last` entry of the oldest step not recorded yet.

        finished: requests that end with what is recorded now (EOS, a stop sequence). Others end by max_new_tokens or
        max_context without being named. Tokens of requests that have ended are dropped.
        """
        for request, token in tokens.items():
            state = self._states[request]
            if state.has_ended:
                continue
            assert len(state.known) < state.num_planned, f"a token of request {request} comes without a step for it"
            state.known.append(token)
            if len(state.known) == state.max_length:
                self._end(state)
        for request in finished:
            self.abort(request)

    def abort(self, request: int) -> None:
        """Ends a request as it is; nothing happens where it has ended."""
        if not self._states[request].has_ended:
            self._end(self._states[request])

    def _finish_last_step(self) -> None:
        """Gives back what the step planned last was the last to need."""
        for family in self._read:
            if family.num_waiting == 0:
                self._let_go(family)
        self._read.clear()
        for state in self._planned_out:
            if self._running.pop(state.request.index, None):
                self._release(state)
        self._planned_out.clear()

    def _extend(self, state: _State, preempted: list[int]) -> bool:
        """Finds room for the next token of a running request, at the cost of those that started after it; False where
        the request itself has lost its pages.
        """
        if state.is_waiting:
            return False
        if state.num_cached < len(state.pages) * self._pool.page_size:
            return True
        while not self._make_room(1):
            index, last = self._running.popitem()
            self._waiting.appendleft(last)
            _wait(last)
            self._release(last)
            preempted.append(index)
            if last is state:
                return False
        state.pages += self._pool.take(1)
        return True

    def _run(self, state: _State, left: int) -> Entry:
        """Plans the next tokens of a request that has pages for them, at most `left`."""
        start = state.num_cached
        count = min(state.num_planned - start, left)
        state.num_cached += count
        if state.prompt_step == 0 and state.num_cached >= len(state.family.prompt):
            state.prompt_step = self._step
        is_last = state.num_cached == state.num_planned
        if is_last:
            state.num_planned += 1
            if state.num_planned == state.max_length:
                self._planned_out.append(state)
        return Entry(state.request.index, start, count, is_last)

    def _admit(self, left: int, entries: list[Entry], copies: list[tuple[int, int]]) -> None:
        """Starts waiting requests as long as tokens, places and pages are left."""
        delayed: list[_State] = []
        while left and self._waiting and len(self._running) + len(delayed) < self._max_running:
            state, family = self._waiting[0], self._waiting[0].family
            if len(state.known) < state.num_planned:
                break  # its newest tokens are still to be recorded
            if family.source and not self._prompt_pages(family):
                delayed.append(self._waiting.popleft())  # the prompt will be there in a step or more
                continue
            if not self._start(state, copies):
                break
            self._waiting.popleft()
            entries.append(self._run(state, left))
            left -= entries[-1].count
        self._waiting.extendleft(reversed(delayed))

    def _prompt_pages(self, family: _Family) -> list[int]:
        """Pages in which the steps before this one leave the family's prompt; empty where there are none."""
        if family.held or family.source is None or not 0 < family.source.prompt_step < self._step:
            return family.held
        return family.source.pages[: pages_for(len(family.prompt), self._pool.page_size)]

    def _start(self, state: _State, copies: list[tuple[int, int]]) -> bool:
        """Gives a waiting request pages for its known tokens; False where there are too few."""
        family, page_size = state.family, self._pool.page_size
        prompt_pages = self._prompt_pages(family)
        # The last known token is computed in any case: the next one is sampled from its hidden state.
        num_cached = min(len(family.prompt), len(state.known) - 1) if prompt_pages else 0
        num_shared = num_cached // page_size
        num_new = pages_for(len(state.known), page_size) - num_shared
        if not self._make_room(num_new, keep=family):
            if self._running or not family.held:
                return False
            # Its family holds the partly filled page that it would copy: alone it fits.
            self._let_go(family)
            return self._start(state, copies)
        new = self._pool.take(num_new)
        self._pool.share(prompt_pages[:num_shared])
        if num_cached % page_size:
            copies.append((prompt_pages[num_shared], new[0]))
        if family.held:
            self._read[family] = None
        state.pages, state.num_cached = prompt_pages[:num_shared] + new, num_cached
        state.is_waiting = False
        family.num_waiting -= 1
        family.source = family.source or state
        self._running[state.request.index] = state
        return True

    def _make_room(self, num_pages: int, *, keep: _Family | None = None) -> bool:
        """Gives up held pages until num_pages are free; False where that does not suffice."""
        while self._pool.num_free < num_pages:
            family = next((f for f in self._holding if f is not keep and f not in self._read), None)
            if family is None:
                return False
            self._let_go(family)
        return True

    def _let_go(self, family: _Family) -> None:
        self._pool.give_back(family.held)
        family.held = []
        self._holding.pop(family, None)

    def _release(self, state: _State) -> None:
        """Gives back the pages of a request that no longer runs; its family keeps the prompt if anyone waits for it."""
        family = state.family
        if family.source is state:
            family.source = None
        if family.num_waiting and not family.source and not family.held and state.prompt_step:
            family.held = state.pages[: pages_for(len(family.prompt), self._pool.page_size)]
            self._pool.share(family.held)
            self._holding[family] = None
        self._pool.give_back(state.pages)
        state.pages, state.num_cached, state.prompt_step = [], 0, 0

    def _end(self, state: _State) -> None:
        state.has_ended = True
        self._num_open -= 1
        if state.is_waiting:
            self._waiting.remove(state)
            state.is_waiting = False
            state.family.num_waiting -= 1
            if state.family.num_waiting == 0:
                self._let_go(state.family)
        elif self._running.pop(state.request.index, None):
            self._release(state)


def _wait(state: _State) -> None:
    state.is_waiting = True
    state.family.num_waiting += 1


def _new_states(requests: Sequence[Request], limits: Limits) -> dict[int, _State]:
    """The requests by index; those that have nothing to generate have ended. Raises DoesNotFitError."""
    families: dict[int, _Family] = {}
    states: dict[int, _State] = {}
    for request in requests:
        prompt, index = request.prompt, request.index
        assert prompt, f"request {index} has no prompt"
        assert index not in states, f"two requests have the index {index}"
        family = families.setdefault(index if request.parent is None else request.parent, _Family(prompt))
        assert family.prompt == prompt, f"request {index} has another prompt than others with parent {request.parent}"
        max_length = min(len(prompt) + request.max_new_tokens, limits.max_context)
        states[index] = _State(request, family, max_length, list(prompt), len(prompt))
        states[index].has_ended = max_length <= len(prompt)
        # The last token of a response is never the input of a step.
        num_pages = pages_for(max_length - 1, limits.page_size)
        if num_pages > limits.num_pages and not states[index].has_ended:
            raise DoesNotFitError(
                f"request {index} can grow to {max_length} tokens (a prompt of {len(prompt)}), which need {num_pages} "
                f"pages of {limits.page_size} tokens, and the cache has {limits.num_pages}; give the cache more memory,"
                " or lower max_new_tokens or the context"
            )
    return states
