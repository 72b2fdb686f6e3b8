"""The numbers of a step against a plain count, and what padding for graphs must not touch."""

from dataclasses import fields

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppomax.engine.rollout.scheduler import Entry
from ppomax.engine.rollout.step_inputs import StepNumbers, StepTables, split_inputs

PAGE_SIZE, WIDTH = 4, 6


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 15), st.integers(1, 8), st.booleans(), st.permutations(range(20))),
        min_size=1,
        max_size=6,
    )
)
def test_numbers_are_those_counted_token_by_token(requests) -> None:
    entries = [Entry(10 + r, start, count, is_last) for r, (start, count, is_last, _) in enumerate(requests)]
    tables = [
        list(pages[: -(-(e.start + e.count) // PAGE_SIZE)]) for e, (*_, pages) in zip(entries, requests, strict=True)
    ]
    numbers, sizes = StepTables([e.request for e in entries], PAGE_SIZE, WIDTH).of(entries, tables)
    tokens = [
        (e, table, p) for e, table in zip(entries, tables, strict=True) for p in range(e.start, e.start + e.count)
    ]
    last = [e for e in entries if e.is_last]
    inputs = split_inputs(torch.from_numpy(numbers.packed()), sizes)
    assert inputs.index.tolist() == [e.request for e, _, _ in tokens]
    assert inputs.positions.tolist() == [p for *_, p in tokens]
    assert inputs.slots.tolist() == [table[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for _, table, p in tokens]
    assert inputs.contexts.tolist() == [e.start + e.count for e in entries]
    assert inputs.cu_queries.diff().tolist() == [e.count for e in entries]
    for row, table in zip(inputs.page_tables.tolist(), tables, strict=True):
        assert row[: len(table)] == table
    assert [tokens[row][0] for row in inputs.rows.tolist()] == last
    assert inputs.drawn_index.tolist() == [e.request for e in last]
    assert inputs.drawn_positions.tolist() == [e.start + e.count for e in last]
    assert sizes.only_decodes == all(e.count == 1 and e.is_last for e in entries)


def test_tables_follow_a_request_that_grows_and_one_that_starts_anew() -> None:
    tables = StepTables([0, 1], PAGE_SIZE, WIDTH)
    grows, other = [7], [3, 9]
    entries = [Entry(0, 3, 1, True), Entry(1, 4, 1, True)]
    tables.of(entries, [grows, other])
    grows.append(5)
    numbers, _ = tables.of([Entry(0, 4, 1, True), Entry(1, 5, 1, True)], [grows, other])
    assert numbers.slots.tolist() == [5 * PAGE_SIZE, 9 * PAGE_SIZE + 1]
    numbers, _ = tables.of([Entry(1, 0, 5, True)], [[11, 2]])  # pre-empted, then computed again in other pages
    assert numbers.slots.tolist() == [44, 45, 46, 47, 8]


def test_padding_repeats_a_request_but_stores_nothing() -> None:
    entries = [Entry(4, 5, 1, True), Entry(2, 9, 1, True)]
    numbers, _ = StepTables([2, 4], PAGE_SIZE, WIDTH).of(entries, [[1, 6], [3, 5, 8]])
    padded = numbers.padded(4)
    for field in fields(StepNumbers):
        part, whole = getattr(numbers, field.name), getattr(padded, field.name)
        assert np.array_equal(whole[: len(part)], part), field.name
    assert padded.slots.tolist()[2:] == [-1, -1]
    assert padded.contexts.tolist()[2:] == [1, 1]
    assert padded.cu_queries.tolist() == [0, 1, 2, 3, 4]
    assert padded.rows.tolist() == [0, 1, 2, 3]
    assert padded.index.tolist() == padded.drawn_index.tolist() == [4, 2, 4, 4]
