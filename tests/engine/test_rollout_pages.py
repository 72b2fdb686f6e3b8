"""The page pool against a count of owners kept by hand."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppomax.engine.rollout.pages import OutOfPages, PagePool, num_pages_for_budget, pages_for

ACTIONS = st.lists(st.tuples(st.sampled_from(["take", "share", "give back"]), st.integers(0, 7)), max_size=60)


@given(st.integers(0, 12), ACTIONS)
def test_owners_and_free_pages_always_add_up(num_pages: int, actions: list[tuple[str, int]]) -> None:
    pool, owned = PagePool(num_pages, 4), Counter[int]()
    for action, number in actions:
        if action == "take" and number <= pool.num_free:
            taken = pool.take(number)
            assert len(set(taken)) == number
            assert not owned.keys() & set(taken)
            owned.update(taken)
        elif action != "take" and owned:
            page = sorted(owned)[number % len(owned)]
            (pool.share if action == "share" else pool.give_back)([page])
            owned[page] += 1 if action == "share" else -1
            owned += Counter()  # drops the pages at 0
        assert pool.num_free == num_pages - len(owned)
        assert [pool.owners(page) for page in range(num_pages)] == [owned[page] for page in range(num_pages)]


def test_low_pages_are_taken_first_and_returned_ones_before_fresh_ones() -> None:
    pool = PagePool(6, 4)
    assert pool.take(3) == [0, 1, 2]
    pool.give_back([0, 1])
    assert pool.take(3) == [1, 0, 3]


def test_taking_more_than_is_free_takes_nothing() -> None:
    pool = PagePool(3, 4)
    pool.take(1)
    with pytest.raises(OutOfPages, match="3 pages wanted, 2 of 3 are free"):
        pool.take(3)
    assert pool.num_free == 2


def test_a_shared_page_is_free_when_its_last_owner_gives_it_back() -> None:
    pool = PagePool(1, 4)
    pages = pool.take(1)
    pool.share(pages)
    pool.give_back(pages)
    assert (pool.num_free, pool.owners(0)) == (0, 1)
    pool.give_back(pages)
    assert (pool.num_free, pool.owners(0)) == (1, 0)


def test_a_free_page_is_neither_shared_nor_given_back() -> None:
    pool = PagePool(1, 4)
    with pytest.raises(AssertionError, match="page 0 is free"):
        pool.share([0])
    with pytest.raises(AssertionError, match="page 0 is free"):
        pool.give_back([0])


@given(st.integers(0, 1000), st.integers(1, 64))
def test_pages_hold_the_tokens_with_less_than_a_page_to_spare(num_tokens: int, page_size: int) -> None:
    assert 0 <= pages_for(num_tokens, page_size) * page_size - num_tokens < page_size


def test_a_budget_counts_keys_and_values_of_all_layers() -> None:
    # One page: 16 tokens x 2 (key, value) x 4 layers x 2 groups x 8 numbers x 2 bytes = 4096 bytes.
    sizes = {"page_size": 16, "num_layers": 4, "num_groups": 2, "head_dim": 8, "itemsize": 2}
    assert [num_pages_for_budget(budget, **sizes) for budget in (4095, 4096, 100 * 4096 + 1)] == [0, 1, 100]
