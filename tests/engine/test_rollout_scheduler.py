"""The scheduler around a model whose cache is simulated: what is in every slot, and which tokens come out.

The fake model is recurrent: what it writes at a position is made of what the cache holds for the position before
and of the token, and the next token of what it wrote last. One wrong slot changes everything after it.
"""

import random
import sys
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppomax.engine.errors import DoesNotFitError
from ppomax.engine.rollout.pages import pages_for
from ppomax.engine.rollout.scheduler import Limits, Request, Scheduler, Step

EOS = 0
START = 0
AMPLE = Limits(max_running=8, tokens_per_step=64, max_context=100, page_size=4, num_pages=100)
NO_EOS = 1


def written(before: int, token: int) -> int:
    """What the fake model writes at a position, from what it wrote at the one before."""
    return hash((before, token))


def drawn(last: int, request: int) -> int:
    """The token that follows what was written last; EOS is one of 17."""
    return hash((last, request)) % 17


def alone(request: Request, limits: Limits) -> list[int]:
    """Prompt and response of a request that runs by itself, without a cache."""
    tokens, longest = list(request.prompt), min(len(request.prompt) + request.max_new_tokens, limits.max_context)
    while len(tokens) < longest and (len(tokens) == len(request.prompt) or tokens[-1] != EOS):
        tokens.append(drawn(states_after(tokens)[-1], request.index))
    return tokens


def states_after(tokens: Sequence[int]) -> list[int]:
    """What belongs in the cache at each position."""
    states = [START]
    for token in tokens:
        states.append(written(states[-1], token))
    return states[1:]


@dataclass
class Moment:
    """A step with what was to be seen after it was planned. tables: pages of every request that has some.

    gone: requests that had ended before. wrong_reads: (request, position) where the cache holds something else than
    the request's token.
    shared_writes: pages that were written while they had several owners.
    """

    step: Step
    tables: dict[int, list[int]]
    num_free_pages: int
    gone: set[int]
    wrong_reads: list[tuple[int, int]] = field(default_factory=list)
    shared_writes: list[int] = field(default_factory=list)


@dataclass
class Served:
    """scheduler: at the end. moments: one per step."""

    scheduler: Scheduler
    moments: list[Moment] = field(default_factory=list)


def serve(
    requests: Sequence[Request],
    limits: Limits,
    *,
    delay: int = 0,
    in_bursts: bool = False,
    aborts: Mapping[int, Sequence[int]] | None = None,
) -> Served:
    """Runs the fake model to the end.

    delay: steps that are planned ahead of what is recorded; in_bursts: those are then recorded together.
    aborts: requests to abort, by the number of the step before which that happens.
    """
    served = Served(Scheduler(requests, limits))
    scheduler, gone = served.scheduler, set[int]()
    tokens = {request.index: list(request.prompt) for request in requests}
    cache: list[int | None] = [None] * (limits.num_pages * limits.page_size)
    samples: deque[dict[int, int]] = deque()
    while True:
        for request in (aborts or {}).get(len(served.moments), ()):
            scheduler.abort(request)
            gone.add(request)
        step = scheduler.plan()
        if step is None and not samples:
            return served
        if step is not None:
            samples.append(run(served, step, tokens, cache, set(gone)))
        is_full = len(samples) > delay or step is None
        while is_full and samples:
            sampled = samples.popleft()
            finished = {request for request, token in sampled.items() if token == EOS}
            scheduler.record(sampled, finished)
            gone |= finished
            is_full = in_bursts


def run(
    served: Served, step: Step, tokens: dict[int, list[int]], cache: list[int | None], gone: set[int]
) -> dict[int, int]:
    """One step of the fake model: copies, then writes, then reads. Returns the sampled tokens."""
    scheduler, page_size = served.scheduler, served.scheduler._pool.page_size
    tables = {request: list(scheduler.page_table(request)) for request in tokens if scheduler.page_table(request)}
    moment = Moment(step, tables, scheduler.num_free_pages, gone)
    served.moments.append(moment)
    copied = [cache[source * page_size : (source + 1) * page_size] for source, _ in step.copies]
    for (_, target), page in zip(step.copies, copied, strict=True):
        cache[target * page_size : (target + 1) * page_size] = page
    sampled = {}
    for entry in step.entries:
        own, table, end = tokens[entry.request], tables[entry.request], entry.start + entry.count
        known = scheduler.known(entry.request)[entry.start : end]
        assert known == own[entry.start : end][: len(known)]
        slots = [table[position // page_size] * page_size + position % page_size for position in range(end)]
        for position in range(entry.start, end):
            if scheduler._pool.owners(slots[position] // page_size) != 1:
                moment.shared_writes.append(slots[position] // page_size)
            before = cache[slots[position - 1]] if position else START
            cache[slots[position]] = written(before, own[position])
        if entry.is_last:
            sampled[entry.request] = drawn(cache[slots[-1]], entry.request)
    for entry in step.entries:
        own, end = tokens[entry.request], entry.start + entry.count
        for position, state in enumerate(states_after(own[:end])):
            if cache[tables[entry.request][position // page_size] * page_size + position % page_size] != state:
                moment.wrong_reads.append((entry.request, position))
    for request, token in sampled.items():
        tokens[request].append(token)
    return sampled


@dataclass(frozen=True)
class Scenario:
    requests: list[Request]
    limits: Limits
    delay: int
    in_bursts: bool
    aborts: dict[int, list[int]]

    def serve(self) -> Served:
        return serve(self.requests, self.limits, delay=self.delay, in_bursts=self.in_bursts, aborts=self.aborts)


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    """A few prompts of a few samples each, in any order, in limits that are mostly tight."""
    random_numbers = draw(st.randoms(use_true_random=False))
    requests: list[Request] = []
    for _ in range(draw(st.integers(1, 5))):
        prompt = tuple(random_numbers.randint(1, 16) for _ in range(draw(st.integers(1, 14))))
        parent = len(requests)
        for sample in range(draw(st.integers(1, 4))):
            max_new_tokens = draw(st.integers(0, 14))
            requests.append(Request(len(requests), prompt, max_new_tokens, parent if sample else None))
    if draw(st.booleans()):
        random_numbers.shuffle(requests)
    limits = Limits(
        max_running=draw(st.integers(1, 9)),
        tokens_per_step=draw(st.integers(1, 24)),
        max_context=draw(st.integers(2, 30)),
        page_size=draw(st.integers(1, 6)),
        num_pages=0,
    )
    num_pages = fewest_pages(requests, limits) + draw(st.integers(0, 12))
    steps, indices = st.integers(0, 30), st.lists(st.integers(0, len(requests) - 1), min_size=1, max_size=3)
    return Scenario(
        requests,
        replace(limits, num_pages=num_pages),
        delay=draw(st.integers(0, 4)),
        in_bursts=draw(st.booleans()),
        aborts=draw(st.dictionaries(steps, indices, max_size=3)),
    )


def fewest_pages(requests: Sequence[Request], limits: Limits) -> int:
    """Pages that hold any one of the requests; the last token of a response needs no place."""
    longest = [min(len(r.prompt) + r.max_new_tokens, limits.max_context) for r in requests]
    lengths = [n - 1 for n, request in zip(longest, requests, strict=True) if n > len(request.prompt)]
    return max((pages_for(length, limits.page_size) for length in lengths), default=0)


for_many_scenarios = settings(max_examples=100, deadline=None)


@for_many_scenarios
@given(scenarios())
def test_tokens_depend_on_neither_limits_nor_sharing_nor_delay(scenario: Scenario) -> None:
    scheduler = scenario.serve().scheduler
    aborted = {request for requests in scenario.aborts.values() for request in requests}
    for request in scenario.requests:
        known, wanted = scheduler.known(request.index), alone(request, scenario.limits)
        assert known == (wanted[: len(known)] if request.index in aborted else wanted)


@for_many_scenarios
@given(scenarios())
def test_at_every_step_the_cache_holds_the_tokens_of_each_request_at_all_its_positions(scenario: Scenario) -> None:
    assert [moment.wrong_reads for moment in scenario.serve().moments if moment.wrong_reads] == []


@for_many_scenarios
@given(scenarios())
def test_no_page_is_written_while_it_has_several_owners(scenario: Scenario) -> None:
    assert [moment.shared_writes for moment in scenario.serve().moments if moment.shared_writes] == []


@for_many_scenarios
@given(scenarios())
def test_a_page_in_two_tables_holds_tokens_that_both_have(scenario: Scenario) -> None:
    families = {r.index: r.index if r.parent is None else r.parent for r in scenario.requests}
    for moment in scenario.serve().moments:
        users: dict[tuple[int, int], set[int]] = {}
        for request, table in moment.tables.items():
            for place, page in enumerate(table):
                users.setdefault((page, place), set()).add(families[request])
        assert len({page for page, _ in users}) == len(users)
        assert all(len(prompts) == 1 for prompts in users.values())


@for_many_scenarios
@given(scenarios())
def test_all_pages_are_free_at_the_end_and_never_more_in_use_than_there_are(scenario: Scenario) -> None:
    served = scenario.serve()
    scheduler, num_pages = served.scheduler, scenario.limits.num_pages
    assert scheduler.num_free_pages == num_pages
    assert (scheduler.is_done, scheduler.num_running, scheduler.num_waiting) == (True, 0, 0)
    for moment in served.moments:
        in_use = {page for table in moment.tables.values() for page in table}
        assert in_use <= set(range(num_pages))
        assert len(in_use) + moment.num_free_pages <= num_pages


@for_many_scenarios
@given(scenarios())
def test_steps_keep_within_their_limits_and_get_on(scenario: Scenario) -> None:
    for moment in scenario.serve().moments:
        counts = {entry.request: entry.count for entry in moment.step.entries}
        assert len(counts) == len(moment.step.entries) <= scenario.limits.max_running
        assert min(counts.values()) >= 1
        assert sum(counts.values()) <= scenario.limits.tokens_per_step


@for_many_scenarios
@given(scenarios())
def test_a_decoding_request_is_in_every_step_before_all_prompts(scenario: Scenario) -> None:
    longest = {r.index: min(len(r.prompt) + r.max_new_tokens, scenario.limits.max_context) for r in scenario.requests}
    decoding: dict[int, int] = {}
    for moment in scenario.serve().moments:
        wanted = decoding.keys() - moment.gone - set(moment.step.preempted)
        first = moment.step.entries[: len(wanted)]
        assert {entry.request: (entry.start, entry.count) for entry in first} == {
            request: (decoding[request], 1) for request in wanted
        }
        ends = {entry.request: entry.start + entry.count for entry in moment.step.entries if entry.is_last}
        decoding = {request: end for request, end in ends.items() if end + 1 < longest[request]}


@for_many_scenarios
@given(scenarios())
def test_positions_are_computed_in_order_without_gaps_and_again_only_after_preemption(scenario: Scenario) -> None:
    ends: Counter[int] = Counter()
    started: set[int] = set()
    for moment in scenario.serve().moments:
        for request in moment.step.preempted:
            started.remove(request)
        for entry in moment.step.entries:
            if entry.request in started:
                assert entry.start == ends[entry.request]
            started.add(entry.request)
            ends[entry.request] = entry.start + entry.count


@for_many_scenarios
@given(scenarios())
def test_no_page_is_source_and_target_of_copies_of_one_step(scenario: Scenario) -> None:
    for moment in scenario.serve().moments:
        sources, targets = ({copy[side] for copy in moment.step.copies} for side in (0, 1))
        assert not sources & targets
        assert len(targets) == len(moment.step.copies)


@for_many_scenarios
@given(scenarios())
def test_two_schedulers_that_are_told_the_same_plan_the_same(scenario: Scenario) -> None:
    first, second = scenario.serve(), scenario.serve()
    assert [(m.step, m.tables) for m in first.moments] == [(m.step, m.tables) for m in second.moments]


def test_a_thousand_requests_leave_no_page_behind() -> None:
    draw = random.Random(0)
    requests: list[Request] = []
    while len(requests) < 1000:
        prompt, parent = tuple(draw.choices(range(1, 17), k=draw.randint(1, 24))), len(requests)
        requests.append(Request(parent, prompt, draw.randint(0, 40)))
        requests += [Request(parent + s, prompt, draw.randint(0, 40), parent) for s in range(1, draw.randint(1, 6))]
    limits = Limits(max_running=24, tokens_per_step=48, max_context=56, page_size=4, num_pages=40)
    aborts = {draw.randrange(200): draw.sample(range(1000), 3) for _ in range(30)}
    served = serve(requests, limits, delay=2, aborts=aborts)
    aborted = {request for requests in aborts.values() for request in requests}
    assert served.scheduler.num_free_pages == limits.num_pages
    assert not any(moment.wrong_reads or moment.shared_writes for moment in served.moments)
    assert sum(len(moment.step.preempted) for moment in served.moments) > 10
    assert sum(len(moment.step.copies) for moment in served.moments) > 100
    for request in requests:
        if request.index not in aborted:
            assert served.scheduler.known(request.index) == alone(request, limits)


def next_steps(scheduler: Scheduler, num: int) -> list[Step]:
    """Plans and records steps in which nothing ends by itself."""
    steps: list[Step] = []
    for _ in range(num):
        step = scheduler.plan()
        assert step is not None
        steps.append(step)
        scheduler.record({entry.request: NO_EOS for entry in step.entries if entry.is_last})
    return steps


def entries(steps: Sequence[Step]) -> list[list[tuple[int, int, int, bool]]]:
    """(request, start, count, is_last) of each entry of each step."""
    return [[(e.request, e.start, e.count, e.is_last) for e in step.entries] for step in steps]


def test_a_long_prompt_runs_in_chunks_of_what_decoding_leaves() -> None:
    requests = [Request(0, (1, 2), 9), Request(1, tuple(range(9)), 9), Request(2, (3,), 9)]
    scheduler = Scheduler(requests, replace(AMPLE, tokens_per_step=4))
    assert entries(next_steps(scheduler, 5)) == [
        [(0, 0, 2, True), (1, 0, 2, False)],
        [(0, 2, 1, True), (1, 2, 3, False)],
        [(0, 3, 1, True), (1, 5, 3, False)],
        [(0, 4, 1, True), (1, 8, 1, True), (2, 0, 1, True)],
        [(0, 5, 1, True), (1, 9, 1, True), (2, 1, 1, True)],
    ]


@pytest.mark.parametrize(
    ("prompt_length", "tables", "copies"),
    [
        (10, [[0, 1, 2], [0, 1, 3], [0, 1, 4]], ((2, 3), (2, 4))),
        # The last token of the prompt is computed again, in a page that is not shared.
        (8, [[0, 1, 2], [0, 3], [0, 4]], ((1, 3), (1, 4))),
        (9, [[0, 1, 2], [0, 1, 3], [0, 1, 4]], ()),
        (1, [[0], [1], [2]], ()),
    ],
    ids=["part of a page", "full pages", "one token more", "one token"],
)
def test_samples_of_a_prompt_share_its_full_pages_and_copy_the_rest(
    prompt_length: int, tables: list[list[int]], copies: tuple[tuple[int, int], ...]
) -> None:
    prompt = tuple(range(prompt_length))
    requests = [Request(0, prompt, 9), Request(1, prompt, 9, parent=0), Request(2, prompt, 9, parent=0)]
    scheduler = Scheduler(requests, AMPLE)
    first, second = next_steps(scheduler, 2)
    assert entries([first]) == [[(0, 0, prompt_length, True)]]
    last = prompt_length - 1
    assert entries([second]) == [[(0, prompt_length, 1, True), (1, last, 1, True), (2, last, 1, True)]]
    assert [scheduler.page_table(request) for request in range(3)] == tables
    assert (first.copies, second.copies) == ((), copies)


def test_other_prompts_run_while_samples_wait_for_theirs() -> None:
    requests = [Request(0, (1, 2, 3), 9), Request(1, (1, 2, 3), 9, parent=0), Request(2, (4, 5), 9)]
    assert entries(next_steps(Scheduler(requests, AMPLE), 2)) == [
        [(0, 0, 3, True), (2, 0, 2, True)],
        [(0, 3, 1, True), (2, 2, 1, True), (1, 2, 1, True)],
    ]


def test_samples_that_wait_for_their_prompt_keep_their_places() -> None:
    requests = [Request(0, (1, 2, 3), 9), Request(1, (1, 2, 3), 9, parent=0), Request(2, (4, 5), 9)]
    assert entries(next_steps(Scheduler(requests, replace(AMPLE, max_running=2)), 2)) == [
        [(0, 0, 3, True)],
        [(0, 3, 1, True), (1, 2, 1, True)],
    ]


def test_a_prompt_outlives_its_request_for_the_sake_of_those_that_wait() -> None:
    requests = [Request(0, (1, 2, 3), 1), Request(1, (1, 2, 3), 2, parent=0)]
    scheduler = Scheduler(requests, replace(AMPLE, max_running=1))
    assert entries(next_steps(scheduler, 3)) == [[(0, 0, 3, True)], [(1, 2, 1, True)], [(1, 3, 1, True)]]
    assert scheduler.is_done
    assert scheduler.num_free_pages == AMPLE.num_pages


def test_a_kept_prompt_goes_before_a_running_request_is_preempted() -> None:
    requests = [Request(0, (1, 2, 3), 1), Request(1, (4, 5), 6), Request(2, (1, 2, 3), 4, parent=0)]
    scheduler = Scheduler(requests, replace(AMPLE, page_size=1, num_pages=7))
    steps = next_steps(scheduler, 7)
    # Request 2 needs one page more than the prompt it shares, and finds none before request 1 needs all of them.
    assert [step.preempted for step in steps] == [()] * 7
    assert entries(steps)[1:] == [[(1, length, 1, True)] for length in range(2, 7)] + [[(2, 0, 3, True)]]


def test_a_kept_prompt_is_taken_by_one_after_the_other() -> None:
    requests = [Request(0, (1, 2, 3), 1), *(Request(index, (1, 2, 3), index, parent=0) for index in (1, 2))]
    steps = next_steps(Scheduler(requests, replace(AMPLE, max_running=1)), 3)
    assert entries(steps) == [[(0, 0, 3, True)], [(1, 2, 1, True)], [(2, 2, 1, True)]]


def test_a_kept_prompt_goes_when_a_running_request_has_it_too() -> None:
    requests = [Request(0, (1, 2), 1), *(Request(index, (1, 2), 9, parent=0) for index in (1, 2))]
    scheduler = Scheduler(requests, replace(AMPLE, max_running=1))
    next_steps(scheduler, 3)
    assert scheduler.num_free_pages == AMPLE.num_pages - len(scheduler.page_table(1))


def test_a_kept_prompt_goes_where_only_the_copy_of_its_last_page_does_not_fit() -> None:
    requests = [Request(0, (1, 2, 3, 4, 5, 6), 1), Request(1, (1, 2, 3, 4, 5, 6), 2, parent=0)]
    scheduler = Scheduler(requests, replace(AMPLE, num_pages=2))
    assert entries(next_steps(scheduler, 2)) == [[(0, 0, 6, True)], [(1, 0, 6, True)]]


def test_a_kept_prompt_stays_until_the_step_that_copies_it_is_over() -> None:
    requests = [
        Request(0, (1, 2, 3), 1),
        Request(1, (4, 5, 6), 1),
        Request(2, (1, 2, 3), 2, parent=0),
        Request(3, (4, 5, 6), 2, parent=1),
        Request(4, (1, 2, 3), 2, parent=0),
    ]
    scheduler = Scheduler(requests, replace(AMPLE, num_pages=4, max_running=2))
    steps = next_steps(scheduler, 2)
    # Request 3 and a page to spare would fit if the page that request 2 copies from were free.
    assert entries(steps) == [[(0, 0, 3, True), (1, 0, 3, True)], [(2, 2, 1, True)]]
    assert steps[1].copies == ((0, 2),)


def test_a_prompt_is_not_kept_twice() -> None:
    requests = [Request(index, tuple(range(10)), 9, parent=0) for index in range(3)]
    scheduler = Scheduler(requests, replace(AMPLE, max_running=2))
    next_steps(scheduler, 2)
    scheduler.abort(1)
    assert scheduler.num_free_pages == AMPLE.num_pages - len(scheduler.page_table(0))


def test_a_kept_prompt_goes_with_the_last_that_waits_for_it() -> None:
    requests = [Request(0, (1, 2, 3), 1), Request(1, (1, 2, 3), 2, parent=0)]
    scheduler = Scheduler(requests, replace(AMPLE, max_running=1))
    next_steps(scheduler, 1)
    assert scheduler.num_free_pages == AMPLE.num_pages - 1
    scheduler.abort(1)
    assert scheduler.num_free_pages == AMPLE.num_pages


def test_half_a_prompt_is_not_kept() -> None:
    requests = [Request(0, (1,), 10), Request(1, tuple(range(6)), 2)]
    steps = next_steps(Scheduler(requests, replace(AMPLE, page_size=1, num_pages=10, tokens_per_step=2)), 11)
    assert [step.preempted for step in steps] == [(), (), (), (), (1,), (), (), (), (), (), ()]
    assert entries(steps[3:5] + steps[10:]) == [
        [(0, 3, 1, True), (1, 3, 1, False)],
        [(0, 4, 1, True)],
        [(1, 0, 2, False)],
    ]


def test_the_request_that_started_last_is_preempted_and_the_first_to_come_back() -> None:
    requests = [Request(index, (index, index), 6) for index in range(4)]
    scheduler = Scheduler(requests, replace(AMPLE, page_size=1, num_pages=10, max_running=3))
    preempted: list[int] = []
    started: list[int] = []
    running: set[int] = set()
    while not scheduler.is_done:
        (step,) = next_steps(scheduler, 1)
        preempted += step.preempted
        running -= set(step.preempted)
        started += [entry.request for entry in step.entries if entry.request not in running]
        running |= {entry.request for entry in step.entries}
    assert preempted == [2, 1, 3]
    assert started == [0, 1, 2, 1, 2, 3, 3]


def test_a_preempted_request_takes_its_own_prompt_up_again() -> None:
    """Page size 1. Request 0 ends in the step in which request 1 is pre-empted, before its prompt is given up."""
    requests = [Request(0, (1, 2, 3, 4), 4), Request(1, (5, 6, 7), 7)]
    scheduler = Scheduler(requests, replace(AMPLE, page_size=1, num_pages=11))
    steps = next_steps(scheduler, 5)
    assert [step.preempted for step in steps] == [(), (), (), (1,), ()]
    assert entries(steps)[3:] == [[(0, 6, 1, True)], [(1, 3, 3, True)]]


def test_steps_are_planned_ahead_up_to_the_longest_response() -> None:
    scheduler = Scheduler([Request(0, (1, 2), 3)], AMPLE)
    assert [scheduler.plan() is None for _ in range(5)] == [False, False, False, True, True]
    assert not scheduler.is_done
    for _ in range(3):
        scheduler.record({0: NO_EOS})
    assert scheduler.is_done
    assert scheduler.known(0) == [1, 2, NO_EOS, NO_EOS, NO_EOS]


def test_tokens_planned_beyond_the_end_are_dropped() -> None:
    scheduler = Scheduler([Request(0, (1, 2), 9)], AMPLE)
    for _ in range(3):
        scheduler.plan()
    scheduler.record({0: EOS}, finished={0})
    assert scheduler.is_done
    scheduler.record({0: 7})
    assert scheduler.known(0) == [1, 2, EOS]
    assert scheduler.num_free_pages == AMPLE.num_pages


def test_an_aborted_request_ends_at_once_wherever_it_is() -> None:
    requests = [Request(index, (1, 2), 9) for index in range(3)]
    scheduler = Scheduler(requests, replace(AMPLE, max_running=2))
    next_steps(scheduler, 1)
    for request in (0, 0, 2):
        scheduler.abort(request)
    assert entries(next_steps(scheduler, 1)) == [[(1, 2, 1, True)]]
    scheduler.abort(1)
    assert (scheduler.is_done, scheduler.plan()) == (True, None)
    assert scheduler.known(1) == [1, 2, NO_EOS, NO_EOS]


def test_nothing_to_generate_means_nothing_to_run() -> None:
    requests = [Request(0, (1, 2), 0), Request(1, tuple(range(100)), 5), Request(2, tuple(range(1000)), 5)]
    for scheduler in (Scheduler(requests, AMPLE), Scheduler([], AMPLE)):
        assert (scheduler.is_done, scheduler.num_waiting, scheduler.plan()) == (True, 0, None)


def test_a_request_that_does_not_fit_alone_is_refused_with_the_numbers() -> None:
    limits = replace(AMPLE, num_pages=3)
    Scheduler([Request(0, (1, 2, 3), 10)], limits)  # the last of 13 tokens needs no place
    with pytest.raises(DoesNotFitError, match=r"request 0 can grow to 14 tokens .* 4 pages of 4 tokens.* has 3; give"):
        Scheduler([Request(0, (1, 2, 3), 11)], limits)


@pytest.mark.parametrize(
    ("requests", "fault"),
    [
        ([Request(0, (), 1)], "request 0 has no prompt"),
        ([Request(0, (1,), 1), Request(0, (2,), 1)], "two requests have the index 0"),
        ([Request(0, (1,), 1), Request(1, (2,), 1, parent=0)], "request 1 has another prompt"),
    ],
    ids=["empty prompt", "one index twice", "parent of another prompt"],
)
def test_impossible_requests_are_our_own_mistake(requests: list[Request], fault: str) -> None:
    with pytest.raises(AssertionError, match=fault):
        Scheduler(requests, AMPLE)


def test_a_token_that_no_step_has_sampled_is_our_own_mistake() -> None:
    scheduler = Scheduler([Request(0, tuple(range(9)), 5)], replace(AMPLE, tokens_per_step=8))
    scheduler.plan()
    with pytest.raises(AssertionError, match="request 0 comes without a step"):
        scheduler.record({0: NO_EOS})


def calls_to_plan(num_requests: int, max_running: int) -> int:
    """Function calls of one decode step."""
    requests = [Request(index, (1, 2, 3), 50) for index in range(num_requests)]
    limits = replace(AMPLE, max_running=max_running, tokens_per_step=1000, num_pages=1000)
    scheduler, num_calls = Scheduler(requests, limits), 0
    next_steps(scheduler, 3)

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    sys.setprofile(count)
    scheduler.plan()
    sys.setprofile(None)
    return num_calls


def test_a_step_costs_a_few_calls_per_entry_however_many_wait() -> None:
    few, many, crowded = calls_to_plan(50, 8), calls_to_plan(50, 40), calls_to_plan(3000, 8)
    assert few == crowded
    assert many - few <= 12 * (40 - 8)
