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
from ppomax.engine.rollout.prompts import Family, Prompts


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
    """max_running: requests decoded at once. tokens_per_step: tokens of one step (and so requests decoded at once).
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
class _State:
    """known: tokens of prompt and response so far. num_planned: those and the samples that are still to be recorded.

    num_cached: positions whose keys and values are in `pages`, or will be when the planned steps have run.
    """

    request: Request
    family: Family
    max_length: int
    known: list[int]
    num_planned: int
    is_waiting: bool
    has_ended: bool
    num_cached: int = 0
    pages: list[int] = field(default_factory=list)


class Scheduler:
    """Plans the steps of a group of requests from the first to the last.

    First come, first served. A request starts when there are pages for all its known tokens. Where a running one finds
    no page for its next token, prompts held for waiting requests go first, then the requests that started last: they
    wait at the head of the queue and compute their tokens again. Only the request that started last can be in
    the middle of its prompt. Raises DoesNotFitError where the pages do not hold one of the requests alone.
    """

    def __init__(self, requests: Sequence[Request], limits: Limits) -> None:
        self._limits = limits
        assert min(limits.max_running, limits.tokens_per_step) > 0, f"nothing can run with {limits}"
        self._pool = PagePool(limits.num_pages, limits.page_size)
        self._prompts = Prompts(self._pool)
        self._step = 0
        self._states = _new_states(requests, limits)
        # In the order in which they started.
        self._running: dict[int, _State] = {}
        self._waiting = deque(state for state in self._states.values() if state.is_waiting)
        self._num_open = len(self._waiting)
        # Requests that need no step after the one planned last.
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
        """All requests have ended. Some of the last steps may not have been recorded: nothing of them is wanted."""
        return self._num_open == 0

    @property
    def has_planned_ends(self) -> bool:
        """Whether the step planned last is the last one of some request, by its length."""
        return bool(self._planned_out)

    @property
    def num_steps_with_pages(self) -> int:
        """Steps, the one planned last among them, for which every running request finds pages in any case."""
        return 1 + self._pool.num_free // max(1, len(self._running)) * self._pool.page_size

    def only_decodes(self, step: Step) -> bool:
        """Whether the step planned last adds a token to every running request, and no other waits."""
        is_usual = not (step.copies or step.preempted or self._waiting) and len(step.entries) == len(self._running)
        return is_usual and all(entry.count == 1 and entry.is_last for entry in step.entries)

    def known(self, request: int) -> list[int]:
        """Prompt and response as far as recorded; the scheduler's own list, not to be changed."""
        return self._states[request].known

    def page_table(self, request: int) -> list[int]:
        """Pages of positions 0, page_size, ...; empty unless it runs. Valid until the next plan, record or abort."""
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
        self._prompts.finish_step()
        for state in self._planned_out:
            if self._running.pop(state.request.index, None):
                self._release(state)
        self._planned_out.clear()

    def _extend(self, state: _State, preempted: list[int]) -> bool:
        """Finds room for a running request's next token, if need be by pre-empting; False where its own pages went."""
        if state.is_waiting:
            return False
        if state.num_cached < len(state.pages) * self._pool.page_size:
            return True
        while not self._prompts.make_room(1):
            index, last = self._running.popitem()
            self._waiting.appendleft(last)
            last.is_waiting = True
            last.family.num_waiting += 1
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
        if state.num_cached >= len(state.family.prompt):
            self._prompts.complete(state.family, state.request.index, state.pages, self._step)
        is_last = state.num_cached == state.num_planned
        if is_last:
            state.num_planned += 1
            if state.num_planned == state.max_length:
                self._planned_out.append(state)
        return Entry(state.request.index, start, count, is_last)

    def _admit(self, left: int, entries: list[Entry], copies: list[tuple[int, int]]) -> None:
        """Starts waiting requests as long as tokens, places and pages are left."""
        delayed: list[_State] = []
        while left and self._waiting and len(self._running) + len(delayed) < self._limits.max_running:
            state = self._waiting[0]
            if len(state.known) < state.num_planned:
                break  # its newest tokens are still to be recorded
            if state.family.is_coming(self._step):
                delayed.append(self._waiting.popleft())
                continue
            if not self._start(state, copies):
                break
            self._waiting.popleft()
            entries.append(self._run(state, left))
            left -= entries[-1].count
        self._waiting.extendleft(reversed(delayed))

    def _start(self, state: _State, copies: list[tuple[int, int]]) -> bool:
        """Gives a waiting request pages for its known tokens; False where there are too few."""
        family, page_size = state.family, self._pool.page_size
        prompt_pages = family.pages_before(self._step)
        # The last known token is computed in any case: the next one is sampled from its hidden state.
        num_cached = min(len(family.prompt), len(state.known) - 1) if prompt_pages else 0
        num_shared = num_cached // page_size
        num_new = pages_for(len(state.known), page_size) - num_shared
        # A page for each running request is left free, or the new one would soon be pre-empted for them.
        if not self._prompts.make_room(num_new + len(self._running), keep=family):
            if self._running or not family.held:
                return False
            # The page that it would copy is what is missing: without its family's pages it fits.
            self._prompts.let_go(family)
            return self._start(state, copies)
        new = self._pool.take(num_new)
        self._pool.share(prompt_pages[:num_shared])
        if num_cached % page_size:
            copies.append((prompt_pages[num_shared], new[0]))
        self._prompts.mark_read(family)
        state.pages, state.num_cached = prompt_pages[:num_shared] + new, num_cached
        state.is_waiting = False
        family.num_waiting -= 1
        if family.source is None:
            family.source = state.request.index
        self._running[state.request.index] = state
        return True

    def _release(self, state: _State) -> None:
        """Gives back the pages of a request that no longer runs."""
        has_prompt = state.num_cached >= len(state.family.prompt)
        self._prompts.leave(state.family, state.request.index, state.pages, has_prompt=has_prompt)
        self._pool.give_back(state.pages)
        state.pages, state.num_cached = [], 0

    def _end(self, state: _State) -> None:
        state.has_ended = True
        self._num_open -= 1
        if state.is_waiting:
            self._waiting.remove(state)
            state.is_waiting = False
            state.family.num_waiting -= 1
            self._prompts.let_go_unless_needed(state.family)
        elif self._running.pop(state.request.index, None):
            self._release(state)


def _new_states(requests: Sequence[Request], limits: Limits) -> dict[int, _State]:
    """The requests by index; those that have nothing to generate have ended. Raises DoesNotFitError."""
    families: dict[int, Family] = {}
    states: dict[int, _State] = {}
    for request in requests:
        prompt, index = request.prompt, request.index
        assert prompt, f"request {index} has no prompt"
        assert index not in states, f"two requests have the index {index}"
        family = families.setdefault(index if request.parent is None else request.parent, Family(prompt))
        assert family.prompt == prompt, f"request {index} has another prompt than others with parent {request.parent}"
        max_length = min(len(prompt) + request.max_new_tokens, limits.max_context)
        has_room = max_length > len(prompt)
        states[index] = _State(request, family, max_length, list(prompt), len(prompt), has_room, not has_room)
        family.num_waiting += has_room
        # The last token of a response is never the input of a step.
        num_pages = pages_for(max_length - 1, limits.page_size)
        if has_room and num_pages > limits.num_pages:
            raise DoesNotFitError(
                f"request {index} can grow to {max_length} tokens (a prompt of {len(prompt)}), which need {num_pages} "
                f"pages of {limits.page_size} tokens, and the cache has {limits.num_pages}; give the cache more memory,"
                " or lower max_new_tokens or the context"
            )
    return states
