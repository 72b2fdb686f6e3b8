"""The order of rows: resumable by position, complete in every pass, faithful to the weights."""

import random
from collections import Counter

import pytest

from ppomax.engine.data.order import Order, shuffle
from ppomax.engine.errors import ConfigError

MIXTURES = [
    ((7,), (1.0,)),
    ((5, 3), (1.0, 1.0)),
    ((4, 9, 1), (0.1, 0.7, 0.2)),
    ((3, 3, 3, 50), (1e-3, 5.0, 1 / 3, 1.0)),
]


@pytest.mark.parametrize(("sizes", "weights"), MIXTURES)
def test_any_split_into_calls_gives_the_same_sequence(sizes, weights):
    whole = Order(sizes, weights, seed=3).rows(0, 400)
    draw = random.Random(0)
    for _ in range(20):
        order, position, parts = Order(sizes, weights, seed=3), 0, []
        while position < 400:
            count = min(draw.randint(0, 60), 400 - position)
            parts += order.rows(position, count)
            position += count
        assert parts == whole
    starts = list(range(0, 400, 7))
    draw.shuffle(starts)
    fresh = Order(sizes, weights, seed=3)
    assert all(fresh.rows(start, 11) == Order(sizes, weights, seed=3).rows(0, start + 11)[start:] for start in starts)


@pytest.mark.parametrize(("sizes", "weights"), MIXTURES)
def test_every_pass_over_a_source_takes_each_row_once(sizes, weights):
    rows = Order(sizes, weights, seed=1).rows(0, 3000)
    for source, size in enumerate(sizes):
        taken = [row for origin, row in rows if origin == source]
        for start in range(0, len(taken) - size + 1, size):
            assert sorted(taken[start : start + size]) == list(range(size))


@pytest.mark.parametrize(("sizes", "weights"), MIXTURES)
def test_sources_keep_to_their_weights_at_every_position(sizes, weights):
    rows = Order(sizes, weights, seed=1).rows(0, 2000)
    counts = Counter()
    for position, (source, _) in enumerate(rows, 1):
        counts[source] += 1
        for each, weight in enumerate(weights):
            share = weight / sum(weights)
            assert abs(counts[each] - position * share) <= (1 + len(sizes) * share) / 2 + 1e-9


def test_passes_and_seeds_have_different_orders():
    order = Order((40,), (1.0,), seed=0)
    passes = [[row for _, row in order.rows(40 * number, 40)] for number in range(5)]
    passes += [[row for _, row in Order((40,), (1.0,), seed=seed).rows(0, 40)] for seed in range(1, 5)]
    assert len({tuple(rows) for rows in passes}) == 9


def test_two_sources_of_one_size_are_shuffled_differently():
    rows = Order((40, 40), (1.0, 1.0), seed=0).rows(0, 80)
    assert [row for source, row in rows if source == 0] != [row for source, row in rows if source == 1]


def test_shuffles_are_uniform():
    """Each row is equally likely at each place: 6 permutations of 3 rows, 6000 keys."""
    counts = Counter(tuple(shuffle(3, seed)) for seed in range(6000))
    assert len(counts) == 6
    assert all(abs(count - 1000) < 5 * (1000 * 5 / 6) ** 0.5 for count in counts.values())


def test_the_order_never_changes_between_versions():
    """A resumed run must go on with the rows it would have taken; these were written down when the rule was made."""
    written_down = [(0, 2), (1, 1), (0, 1), (0, 4), (1, 0), (0, 3), (0, 0), (1, 3), (0, 2), (0, 4)]
    assert Order((5, 4), (2.0, 1.0), seed=42).rows(0, 10) == written_down


def test_a_late_start_costs_no_walk_from_the_beginning():
    late = 10**15
    rows = Order((1000, 10), (0.9, 0.1), seed=0).rows(late, 20)
    assert Counter(source for source, _ in rows) == {0: 18, 1: 2}
    assert rows[5:] == Order((1000, 10), (0.9, 0.1), seed=0).rows(late + 5, 15)


@pytest.mark.parametrize(
    ("sizes", "weights"), [((), ()), ((3, 0), (1.0, 1.0)), ((3,), (1.0, 1.0)), ((3,), (0.0,)), ((3,), (-1.0,))]
)
def test_sources_without_rows_or_weight_are_refused(sizes, weights):
    with pytest.raises(ConfigError, match="expected one size and weight > 0 per source"):
        Order(sizes, weights, seed=0)
