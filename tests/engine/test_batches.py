"""Packs: every sequence once, replicas alike, limits kept, and rows that point at the right tokens."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from ppomax.engine.data.batches import Rows, balance, last_token_rows, make_packs, response_rows, unpad

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=25)


def sequences_of(lengths: list[int]) -> list[torch.Tensor]:
    """Tokens that tell sequence and position: 1000 * (sequence + 1) + position."""
    return [1000 * (i + 1) + torch.arange(length) for i, length in enumerate(lengths)]


def every_token(lengths: list[int]) -> Rows:
    """A row at every token, labelled with the next one (-1 at the end); results go to consecutive places."""
    labels = [torch.cat([sequence[1:], torch.tensor([-1])]) for sequence in sequences_of(lengths)]
    starts = [0, *itertools.accumulate(lengths)]
    index = [start + torch.arange(length) for start, length in zip(starts, lengths, strict=False)]
    return Rows([torch.arange(length) for length in lengths], labels, index)


@given(LENGTHS, st.integers(1, 5), st.integers(1, 60))
def test_balance_deals_every_unit_once_in_equally_many_packs(lengths: list[int], replicas: int, limit: int) -> None:
    dealt = balance(lengths, replicas, limit)
    assert len(dealt) == replicas
    assert len({len(packs) for packs in dealt}) == 1
    assert sorted(unit for packs in dealt for pack in packs for unit in pack) == list(range(len(lengths)))


@given(LENGTHS, st.integers(1, 5), st.integers(1, 60), st.integers(1, 4))
def test_balance_exceeds_the_limit_only_for_a_unit_that_does(
    lengths: list[int], replicas: int, limit: int, multiple_of: int
) -> None:
    for packs in balance(lengths, replicas, limit, multiple_of=multiple_of):
        for pack in packs:
            assert len(pack) <= 1 or sum(lengths[unit] for unit in pack) <= limit


def test_balance_makes_even_packs_and_no_more_than_needed() -> None:
    lengths = [30, 10, 20, 20, 10, 30, 25, 15]
    dealt = balance(lengths, 2, 40)
    assert [len(packs) for packs in dealt] == [2, 2]
    assert [[sum(lengths[unit] for unit in pack) for pack in packs] for packs in dealt] == [[40, 40], [40, 40]]


def test_replicas_without_a_unit_get_empty_packs() -> None:
    assert balance([5], 3, 10) == [[[0]], [[]], [[]]]


def test_balance_rounds_the_number_of_packs_up_to_a_multiple() -> None:
    assert balance([5, 9, 7], 1, 10, multiple_of=2) == [[[1], [2], [0], []]]
    assert balance([5, 5, 5], 1, 10, multiple_of=2) == [[[0, 2], [1]]]
    assert balance([5], 2, 10, multiple_of=2) == [[[0], []], [[], []]]


@given(LENGTHS, st.integers(1, 3), st.integers(20, 60), st.sampled_from([1, 2, 4]), st.booleans())
def test_packs_hold_the_sequences_end_to_end(
    lengths: list[int], replicas: int, limit: int, multiple_of: int, equal_lengths: bool
) -> None:
    sequences = sequences_of(lengths)
    seen: list[int] = []
    for members in balance(lengths, replicas, limit):
        packs = make_packs(
            sequences, every_token(lengths), members, multiple_of=multiple_of, equal_lengths=equal_lengths
        )
        if equal_lengths:
            assert len({pack.tokens.numel() for pack in packs}) == 1
        for pack in packs:
            num_tokens, bounds = pack.tokens.numel(), pack.cu_seqlens.tolist()
            assert num_tokens > 0
            assert num_tokens % multiple_of == 0
            assert (bounds[0], bounds[-1]) == (0, num_tokens)
            pieces = [(pack.tokens[a:b], pack.positions[a:b]) for a, b in itertools.pairwise(bounds)]
            assert max(tokens.numel() for tokens, _ in pieces) == pack.max_seqlen
            for tokens, positions in pieces:
                assert positions.tolist() == list(range(tokens.numel()))
            for i, (tokens, _) in zip(pack.sequences, pieces, strict=False):
                assert tokens.tolist() == sequences[i].tolist()
            assert not any(tokens.any() for tokens, _ in pieces[len(pack.sequences) :])
            if pack.sequences:
                assert pack.max_seqlen == max(lengths[i] for i in pack.sequences)  # padding is cut to fit
            seen += pack.sequences
    assert sorted(seen) == list(range(len(lengths)))


@given(LENGTHS, st.integers(1, 3), st.sampled_from([1, 4]))
def test_rows_labels_and_index_stay_together(lengths: list[int], replicas: int, multiple_of: int) -> None:
    tokens = torch.cat(sequences_of(lengths))
    labels = torch.cat(list(every_token(lengths).labels))
    found_tokens, found_labels = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for members in balance(lengths, replicas, 50):
        for pack in make_packs(sequences_of(lengths), every_token(lengths), members, multiple_of=multiple_of):
            found_tokens[pack.index] += pack.tokens[pack.rows]
            found_labels[pack.index] += pack.labels
    assert torch.equal(found_tokens, tokens)
    assert torch.equal(found_labels, labels)


def test_response_rows_predict_the_kept_tokens() -> None:
    tokens = torch.tensor([[5, 6, 7, 8, 0], [1, 2, 3, 4, 9]])
    mask = torch.tensor([[False, True, True, False], [True, False, False, True]])
    rows = response_rows(tokens, mask)
    assert [row.tolist() for row in rows.rows] == [[1, 2], [0, 3]]
    assert [row.tolist() for row in rows.labels] == [[7, 8], [2, 9]]
    assert [row.tolist() for row in rows.index] == [[1, 2], [4, 7]]
    assert [sequence.tolist() for sequence in unpad(tokens, torch.tensor([4, 5]))] == [[5, 6, 7, 8], [1, 2, 3, 4, 9]]


def test_last_token_rows_name_the_end_of_each_sequence() -> None:
    rows = last_token_rows([3, 1])
    assert [row.tolist() for row in rows.rows] == [[2], [0]]
    assert [row.tolist() for row in rows.labels] == [[-1], [-1]]
    assert [row.tolist() for row in rows.index] == [[0], [1]]
