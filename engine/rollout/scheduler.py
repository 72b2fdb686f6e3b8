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


class Scheduler:
    """Plans the steps of a group of requests from the first to the last.

    Raises DoesNotFitError where the pages do not hold a single one of them.
    """

    def __init__(self, requests: Sequence[Request], limits: Limits) -> None:
        raise NotImplementedError

    @property
    def num_running(self) -> int:
        """Requests that have pages."""
        raise NotImplementedError

    @property
    def num_waiting(self) -> int:
        raise NotImplementedError

    @property
    def is_done(self) -> bool:
        """All requests have ended."""
        raise NotImplementedError

    def known(self, request: int) -> list[int]:
        """Prompt and response as far as recorded; the scheduler's own list, not to be changed."""
        raise NotImplementedError

    def page_table(self, request: int) -> list[int]:
        """Pages of the request's positions 0, page_size, ...: right until the next plan() or record(), not to be
        changed, empty where it does not run.
        """
        raise NotImplementedError

    def plan(self) -> Step | None:
        """The next step; None where there is none before more is recorded, or, if all is recorded, none at all."""
        raise NotImplementedError

    def record(self, tokens: Mapping[int, int], finished: Collection[int] = ()) -> None:
        """Appends the token sampled after each `is_last` entry of the oldest step not recorded yet.

        finished: requests that end with what is recorded now (EOS, a stop sequence). Others end by max_new_tokens or
        max_context without being named. Tokens of requests that have ended are dropped.
        """
        raise NotImplementedError

    def abort(self, request: int) -> None:
        """Ends a request as it is; nothing happens where it has ended."""
        raise NotImplementedError
