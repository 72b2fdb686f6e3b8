"""Attention over pages against attention written out in fp64, on pages that hold NaN wherever nothing was stored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from ppomax.kernels import paged_attention as paged_attention_file
from ppomax.kernels import paged_attention_reference as reference
from ppomax.kernels.dispatch import implementation, use_triton
from ppomax.kernels.paged_attention import paged_attention, store_pages

CPU = torch.zeros(1)
ANYTHING = 2**31 - 1
MIXED = ((1, 40), (0, 7), (6, 6), (1, 1), (5, 33), (1, 70), (0, 0), (19, 20))
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Errors that are allowed of values near 1; probabilities and results of 16 bits are rounded once each."""


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that 40 tokens are several blocks, splits or batches."""
    monkeypatch.setattr(reference, "GROUP_BYTES", 8192)
    if use_triton(CPU):
        module = implementation("paged_attention", CPU)
        for name, value in {"TILE_BYTES": 1, "MIN_SPLIT": 32, "QUERY_ROWS": 16, "SEARCH_BLOCK": 4}.items():
            monkeypatch.setattr(module, name, value)


@dataclass(frozen=True)
class Scene:
    """A call, and the keys and values [context, groups, d] of each request."""

    query: Tensor
    key_pages: Tensor
    value_pages: Tensor
    page_tables: Tensor
    context_lengths: Tensor
    cu_queries: Tensor
    keys: list[Tensor]
    values: list[Tensor]

    def tensors(self) -> tuple[Tensor, ...]:
        return (
            *(self.query, self.key_pages, self.value_pages),
            *(self.page_tables, self.context_lengths, self.cu_queries),
        )

    def bounds(self) -> dict[str, int]:
        lengths = (self.cu_queries.diff(), self.context_lengths)
        return dict(zip(("max_query", "max_context"), (max([*x.tolist(), 0]) for x in lengths), strict=True))

    def attend(self, **settings: Any) -> Tensor:
        return paged_attention(*self.tensors(), **(self.bounds() | settings))

    def rows(self, request: int) -> slice:
        return slice(int(self.cu_queries[request]), int(self.cu_queries[request + 1]))


def scene(
    requests: Sequence[tuple[int, int]],
    *,
    heads: int = 4,
    groups: int = 2,
    d: int = 8,
    page_size: int = 4,
    dtype: torch.dtype = torch.float64,
    num_padding: int = 0,
    seed: int = 0,
) -> Scene:
    """Requests of (number of queries, context) on shuffled pages; what nothing may read is NaN, or no page at all."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    keys, values = ([normal(context, groups, d) for _, context in requests] for _ in range(2))
    cu_queries = torch.tensor([0, *(count for count, _ in requests)]).cumsum(0).int()
    padding = torch.full((num_padding, heads, d), float("nan"), dtype=dtype)
    query = torch.cat([normal(int(cu_queries[-1]), heads, d), padding])
    num_pages = [-(-context // page_size) for _, context in requests]
    order = torch.randperm(sum(num_pages) + 3, generator=generator).int()
    tables = torch.full((len(requests), max([*num_pages, 0]) + 1), ANYTHING, dtype=torch.int32)
    pages = [torch.full((order.numel(), page_size, groups, d), float("nan"), dtype=dtype) for _ in range(2)]
    for row, count, mine in zip(range(len(requests)), num_pages, order.split([*num_pages, 3]), strict=False):
        tables[row, :count] = mine
        for target, source in zip(pages, (keys[row], values[row]), strict=True):
            for token in range(source.shape[0]):
                target[mine[token // page_size], token % page_size] = source[token]
    contexts = torch.tensor([context for _, context in requests], dtype=torch.int32)
    return Scene(query, *pages, tables, contexts, cu_queries, keys, values)


def written_out(given: Scene, scale: float | None = None) -> Tensor:
    """Every query and head on its own, in fp64."""
    num_tokens, heads, d = given.query.shape
    out = torch.zeros(num_tokens, heads, d, dtype=torch.float64)
    for request, (keys, values) in enumerate(zip(given.keys, given.values, strict=True)):
        rows = given.rows(request)
        for row in range(rows.start, rows.stop):
            seen = keys.shape[0] - (rows.stop - rows.start) + (row - rows.start) + 1
            for head in range(heads):
                group = head * keys.shape[1] // heads
                scores = keys[:seen, group].double() @ given.query[row, head].double()
                probabilities = (scores * (d**-0.5 if scale is None else scale)).softmax(0)
                out[row, head] = probabilities @ values[:seen, group].double()
    return out


def assert_right(given: Scene, **settings: Any) -> None:
    out = given.attend(**settings)
    assert out.shape == given.query.shape
    assert out.dtype == given.query.dtype
    expected = written_out(given, settings.get("scale"))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[out.dtype])


BATCHES: dict[str, Sequence[tuple[int, int]]] = {
    "one token each": ((1, 1), (1, 16), (1, 17), (1, 90), (1, 33)),
    "prompts": ((5, 5), (2, 2), (37, 37), (33, 33)),
    "chunks": ((5, 40), (16, 17), (2, 90)),
    "mixed, some without queries": MIXED,
    "one": ((1, 3),),
    "none has a query": ((0, 9), (0, 0)),
}


@pytest.mark.parametrize("requests", BATCHES.values(), ids=BATCHES)
def test_ragged_batches_equal_attention_written_out(requests: Sequence[tuple[int, int]]) -> None:
    assert_right(scene(requests))


@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (8, 2), (8, 1), (6, 2), (20, 1)])
def test_query_heads_share_the_keys_of_their_group(heads: int, groups: int) -> None:
    assert_right(scene(((1, 20), (7, 19)), heads=heads, groups=groups))


@pytest.mark.parametrize("d", [1, 16, 24, 80])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_sizes_of_heads_and_pages_are_free(d: int, page_size: int) -> None:
    assert_right(scene(((1, 35), (3, 18)), d=d, page_size=page_size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_narrow_types_are_computed_in_fp32(dtype: torch.dtype) -> None:
    assert_right(scene(MIXED, dtype=dtype, d=16))


def test_sums_of_bf16_do_not_grow_with_the_context() -> None:
    given = scene(((1, 300),), dtype=torch.bfloat16, heads=1, groups=1)
    for x in (given.value_pages, *given.values):
        x.fill_(1)
    torch.testing.assert_close(given.attend(), torch.ones_like(given.query), rtol=0, atol=2**-8)


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_scale_is_multiplied_to_the_scores(scale: float) -> None:
    assert_right(scene(((1, 40), (4, 21))), scale=scale)


def test_scores_of_any_size_are_survived() -> None:
    given = scene(((1, 40), (4, 21)), dtype=torch.float32)
    given.query.mul_(1e4)
    assert_right(given)


def test_padding_behind_the_queries_gives_zeros() -> None:
    for requests in (MIXED, BATCHES["one token each"]):
        assert_right(scene(requests, num_padding=3))


@pytest.mark.parametrize("num_padding", [0, 4])
def test_no_requests_give_zeros(num_padding: int) -> None:
    assert_right(scene((), num_padding=num_padding))


@settings(max_examples=12, deadline=None)
@given(
    requests=st.lists(
        st.integers(0, 50).flatmap(
            lambda n: st.tuples(st.one_of(st.sampled_from((min(n, 1), n)), st.integers(0, n)), st.just(n))
        ),
        max_size=5,
    ),
    heads=st.sampled_from((1, 3)),
    seed=st.integers(0, 9),
)
def test_any_batch_equals_attention_written_out(requests: list[tuple[int, int]], heads: int, seed: int) -> None:
    assert_right(scene(requests, heads=heads, groups=1, d=4, page_size=5, seed=seed))


def test_shared_pages_are_like_copies_of_them() -> None:
    """Two requests with the same first 8 tokens."""
    apart = scene(((1, 20), (4, 18)))
    for pages, tokens in ((apart.key_pages, apart.keys), (apart.value_pages, apart.values)):
        tokens[1][:8] = tokens[0][:8]
        pages[apart.page_tables[1, :2]] = pages[apart.page_tables[0, :2]]
    shared_tables = apart.page_tables.clone()
    shared_tables[1, :2] = shared_tables[0, :2]
    shared = replace(apart, page_tables=shared_tables)
    apart.key_pages[apart.page_tables[1, :2]].fill_(float("nan"))
    assert_right(shared)
    assert torch.equal(shared.attend(), apart.attend())


def test_the_size_of_pages_changes_no_bit() -> None:
    few, many = (scene(MIXED, page_size=size, dtype=torch.float32).attend() for size in (2, 32))
    assert torch.equal(few, many)


def test_a_request_gives_the_same_whatever_else_is_in_the_batch() -> None:
    """To the last bit in Triton; in the reference up to how many keys stand in one product."""
    whole = scene(MIXED, dtype=torch.float32)
    outputs = whole.attend()
    for request in (0, 2, 4, 7):
        rows = whole.rows(request)
        count = torch.tensor([0, rows.stop - rows.start], dtype=torch.int32)
        tables, contexts = (x[request : request + 1] for x in (whole.page_tables, whole.context_lengths))
        alone = replace(
            whole, query=whole.query[rows], page_tables=tables, context_lengths=contexts, cu_queries=count
        ).attend()
        torch.testing.assert_close(alone, outputs[rows], rtol=0, atol=0 if use_triton(CPU) else 1e-6)


def test_bounds_need_not_be_tight() -> None:
    given = scene(MIXED, page_size=32)
    loose = given.attend(max_query=50, max_context=96)
    torch.testing.assert_close(loose, given.attend(), rtol=0, atol=0)


def test_chunks_of_a_prompt_give_what_the_whole_gives() -> None:
    """To the last bit in Triton where chunks begin at whole tiles, here of 8 queries: rows are products of a matrix."""
    whole = scene(((37, 37),), dtype=torch.float32)
    expected = whole.attend()
    for sizes in ((16, 8, 13), (20, 17), (2, 3, 32), (36, 1)):
        done = 0
        for size in sizes:
            rows = slice(done, done + size)
            done += size
            context, count = torch.tensor([done], dtype=torch.int32), torch.tensor([0, size], dtype=torch.int32)
            chunk = replace(whole, query=whole.query[rows], context_lengths=context, cu_queries=count).attend()
            exact = use_triton(CPU) and rows.start % 8 == 0 and size > 1
            torch.testing.assert_close(chunk, expected[rows], rtol=0, atol=0 if exact else 1e-6)


def test_two_runs_agree_bit_for_bit() -> None:
    given = scene(MIXED, dtype=torch.float32)
    assert torch.equal(given.attend(), given.attend())


def test_every_entry_of_the_result_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    given = scene(MIXED, num_padding=2)

    def poisoned(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def fill(*args: Any, **kwargs: Any) -> Tensor:
            x = original(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return fill

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    assert given.attend().isfinite().all()


def test_tensors_need_not_be_contiguous() -> None:
    """Pages of one layer in a cache of keys and values, a query cut from a wider tensor, columns of wide tables."""
    given = scene(MIXED)
    cache = torch.stack([given.key_pages, given.value_pages], dim=1)
    wide = torch.cat([given.query, given.query], dim=2)
    strided = replace(
        given,
        query=wide[..., : given.query.shape[2]],
        key_pages=cache[:, 0],
        value_pages=cache[:, 1],
        page_tables=given.page_tables.repeat(1, 2)[:, : given.page_tables.shape[1]],
    )
    assert torch.equal(strided.attend(), given.attend())


@pytest.mark.one_version
def test_bounds_alone_are_enough_for_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU without triton, where lengths cannot be read: everything is padded."""
    for requests in (MIXED, BATCHES["one token each"]):
        given = scene(requests, num_padding=1)
        num, (max_query, max_context) = len(requests), given.bounds().values()
        batch = reference._Batch(0, num, max_query, max_context, 0, False)
        monkeypatch.setattr(reference, "_like_lengths", lambda *_, n=num, batch=batch: (torch.arange(n), [batch]))
        assert_right(given)


@pytest.mark.one_version
def test_the_reference_waits_for_no_other_device() -> None:
    given = scene(MIXED)
    on_meta = [x.to("meta") for x in given.tensors()]
    assert reference.paged_attention(*on_meta, **given.bounds(), scale=1.0).shape == given.query.shape
    slots = torch.zeros(given.query.shape[0], dtype=torch.int64, device="meta")
    tokens = [given.query[:, :2].to("meta") for _ in range(2)]
    reference.store_pages(*tokens, *on_meta[1:3], slots)


@pytest.mark.one_version
@settings(max_examples=50, deadline=None)
@given(
    requests=st.lists(st.integers(0, 99).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), max_size=20),
    max_tokens=st.integers(1, 300),
)
def test_batches_hold_every_request_once_with_little_padding(requests: list[tuple[int, int]], max_tokens: int) -> None:
    counts, contexts = (torch.tensor([r[i] for r in requests], dtype=torch.int32) for i in (0, 1))
    order, batches = reference._like_lengths(
        reference._Requests(counts, counts, contexts, contexts[:, None]), max_tokens
    )
    assert sorted(order.tolist()) == [r for r, (count, _) in enumerate(requests) if count > 0]
    assert [x.start for x in batches] == [0, *(x.stop for x in batches)][: len(batches)]
    for batch in batches:
        members = [requests[r] for r in order[batch.start : batch.stop].tolist()]
        assert batch.max_query == max(count for count, _ in members)
        assert batch.max_context == max(context for _, context in members)
        assert batch.min_context == min(context for _, context in members)
        assert batch.is_fresh == all(1 < count == context for count, context in members)
        assert len(members) == 1 or len(members) * batch.max_context <= max_tokens


def test_stored_tokens_stand_in_their_slots_and_nothing_else_changes() -> None:
    key, value = (torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    key_pages, value_pages = torch.zeros(4, 4, 2, 3), torch.ones(4, 4, 2, 3)
    slots = torch.tensor([-1, 9, 0, -7, 15])
    store_pages(key, value, key_pages, value_pages, slots)
    expected_keys, expected_values = torch.zeros(16, 2, 3), torch.ones(16, 2, 3)
    for token, slot in ((1, 9), (2, 0), (4, 15)):
        expected_keys[slot], expected_values[slot] = key[token], value[token]
    assert torch.equal(key_pages.view(16, 2, 3), expected_keys)
    assert torch.equal(value_pages.view(16, 2, 3), expected_values)


@pytest.mark.parametrize("slots", [[], [-1], [-1, -1, -5]])
def test_skipped_tokens_leave_the_pages_as_they_are(slots: list[int]) -> None:
    pages = torch.arange(24.0).view(2, 2, 2, 3), torch.full((2, 2, 2, 3), float("nan"))
    before = [x.clone() for x in pages]
    tokens = torch.full((len(slots), 2, 3), 7.0)
    store_pages(tokens, tokens, *pages, torch.tensor(slots, dtype=torch.int64))
    assert all(torch.equal(x.nan_to_num(-1), y.nan_to_num(-1)) for x, y in zip(pages, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_tokens_are_stored_from_and_to_strided_tensors(dtype: torch.dtype) -> None:
    """Key and value as parts of one projection, pages as one layer of a cache of keys and values."""
    mixed = torch.arange(3 * 2 * 10).view(3, 2, 10).to(dtype)
    key, value = mixed[..., :5], mixed[..., 5:]
    cache = torch.zeros(2, 2, 4, 2, 5, dtype=dtype)
    slots = torch.tensor([6, 1, 7], dtype=torch.int32)
    store_pages(key, value, cache[:, 0], cache[:, 1], slots)
    stored = cache.transpose(1, 2).reshape(8, 2, 2, 5)
    assert torch.equal(stored[slots.long(), 0], key)
    assert torch.equal(stored[slots.long(), 1], value)
    assert (stored[[0, 2, 3, 4, 5]] == 0).all()
    backwards = mixed.flip(0).transpose(0, 2).contiguous().transpose(0, 2)
    store_pages(backwards[..., :5], backwards[..., 5:], cache[:, 0], cache[:, 1], slots)
    assert torch.equal(cache.transpose(1, 2).reshape(8, 2, 2, 5)[slots.long(), 0], key.flip(0))


def test_prompts_then_tokens_decode_to_what_one_pass_gives() -> None:
    """A prompt of 9 tokens, then four tokens one by one, through both operations."""
    whole = scene(((13, 13),), dtype=torch.float32)
    expected = whole.attend()
    pages = [torch.full_like(whole.key_pages, float("nan")) for _ in range(2)]
    table = torch.tensor([[2, 0, 3, 1]], dtype=torch.int32)
    for begin, end in ((0, 9), (9, 10), (10, 11), (11, 12), (12, 13)):
        position = torch.arange(begin, end)
        slots = table[0, position // 4].long() * 4 + position % 4
        store_pages(whole.keys[0][begin:end], whole.values[0][begin:end], *pages, slots)
        lengths = (torch.tensor([end], dtype=torch.int32), torch.tensor([0, end - begin], dtype=torch.int32))
        out = paged_attention(whole.query[begin:end], *pages, table, *lengths, max_query=end - begin, max_context=end)
        torch.testing.assert_close(out, expected[begin:end], rtol=0, atol=1e-6)


def test_compiled_calls_give_what_they_gave() -> None:
    given = scene(MIXED)
    bounds = given.bounds()

    def step(query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, *lengths: Tensor) -> Tensor:
        store_pages(query[:, :2] * 2, query[:, 2:] * 3, keys, values, slots)
        return paged_attention(query, keys, values, *lengths, **bounds) + 1

    slots = torch.full((given.query.shape[0],), -1)
    slots[3] = int(given.page_tables[2, 0]) * 4 + 2
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        pages = [given.key_pages.clone(), given.value_pages.clone()]
        results.append((function(given.query, *pages, slots, *given.tensors()[3:]), *pages))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    assert (results[0][0] != given.attend() + 1).any()


def test_opcheck_passes() -> None:
    given = scene(((1, 6), (2, 5)))
    opcheck(paged_attention_file._paged_attention, (*given.tensors(), 2, 6, 0.5))
    pages = [torch.zeros_like(given.key_pages) for _ in range(2)]
    opcheck(paged_attention_file._store_pages, (given.keys[0], given.values[0], *pages, torch.arange(6)))


@pytest.mark.one_version
def test_what_does_not_fit_is_refused() -> None:
    given = scene(((1, 6), (2, 5)))
    wrong: list[tuple[dict[str, Tensor], str]] = [
        ({"query": given.query[:, :3]}, "multiple of 2"),
        ({"query": given.query[..., :4]}, r"must be \[N, heads, 8\]"),
        ({"query": given.query.float()}, "expected torch.float32"),
        ({"value_pages": given.value_pages[1:]}, "both"),
        ({"value_pages": given.value_pages.transpose(0, 1).contiguous().transpose(0, 1)}, "strides"),
        ({"context_lengths": given.context_lengths[:1]}, r"expected \[R, P\]"),
        ({"cu_queries": given.cu_queries[:2]}, r"expected \[R, P\]"),
        ({"page_tables": given.page_tables[:, :1]}, "too few"),
    ]
    for changed, message in wrong:
        with pytest.raises(ValueError, match=message):
            replace(given, **changed).attend()
    key, pages, slots = torch.zeros(3, 2, 8), torch.zeros(2, 4, 2, 8), torch.arange(3)
    for arguments, message in (
        ((key[:2], key, pages, pages, slots), r"expected \[N, 2, 8\]"),
        ((key, key[:, :1], pages, pages, slots), r"expected \[N, 2, 8\]"),
        ((key, key.double(), pages, pages, slots), r"expected \[N, 2, 8\]"),
        ((key.double(), key.double(), pages, pages, slots), "expected torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            store_pages(*arguments)
