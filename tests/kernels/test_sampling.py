"""The sampler: Philox against its published vectors, the filters against a loop, the draws against chi-square."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ppomax.kernels.philox import WORD, philox_4x32_10, token_uniforms, unit_interval
from ppomax.kernels.sampling import Draw, sample, sample_with_margins
from ppomax.kernels.sampling_reference import filtered

HAS_C = True


def philox_in_python(counter: list[int], key: list[int]) -> list[int]:
    """Ten rounds written with python's unbounded integers, apart from the code under test."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (second >> 32) ^ b ^ k, second % 2**32, (first >> 32) ^ d ^ m, first % 2**32
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return [a, b, c, d]


def philox(counter: list[int], key: list[int]) -> list[int]:
    c0, c1, c2, c3, k0, k1 = (torch.tensor(x) for x in (*counter, *key))
    return [int(word) for word in philox_4x32_10((c0, c1, c2, c3), (k0, k1))]


def draw(logits: Tensor, **changes: Any) -> Draw:
    """sample with neutral settings, request r on seed r, position 0, but for the changes."""
    R = logits.shape[0]
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "seen": None}
    keys = {"seeds": torch.arange(R), "positions": torch.zeros(R, dtype=torch.int64)}
    return sample_with_margins(logits, **{**neutral, **keys, **changes})


def chi_square(tokens: Tensor, probabilities: Tensor) -> tuple[float, int]:
    """(statistic, degrees of freedom) of the counts of tokens; a token of probability 0 must not occur."""
    counts = torch.bincount(tokens, minlength=probabilities.numel()).double()
    assert (counts[probabilities == 0] == 0).all()
    possible = probabilities > 0
    wanted = probabilities[possible].double() * tokens.numel()
    return ((counts[possible] - wanted) ** 2 / wanted).sum().item(), int(possible.sum()) - 1


def assert_drawn_from(tokens: Tensor, probabilities: Tensor) -> None:
    """The chi-square statistic is within five standard deviations of its mean."""
    statistic, freedom = chi_square(tokens, probabilities)
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.one_version
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([WORD] * 4, [WORD] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_words(counter: list[int], key: list[int], words: list[int]) -> None:
    assert philox(counter, key) == words
    assert philox_in_python(counter, key) == words


@pytest.mark.one_version
@settings(max_examples=30, deadline=None)
@given(words=st.lists(st.integers(0, WORD), min_size=6, max_size=6))
def test_philox_equals_unbounded_integers(words: list[int]) -> None:
    assert philox(words[:4], words[4:]) == philox_in_python(words[:4], words[4:])


@pytest.mark.one_version
def test_uniforms_are_never_zero_or_one() -> None:
    low, high = unit_interval(torch.tensor([0, WORD])).tolist()
    assert low == 2.0**-33
    assert high == 1 - 2.0**-33


@pytest.mark.one_version
def test_every_token_has_its_word() -> None:
    seeds, positions = torch.tensor([7, -1, 2**40 + 3]), torch.tensor([0, 5, 2**33 + 1])
    uniforms = token_uniforms(seeds, positions, 11)
    for r in range(3):
        seed, position = int(seeds[r]), int(positions[r])
        for token in range(11):
            counter = [token // 4, position % 2**32, (position >> 32) % 2**32, 0]
            word = philox_in_python(counter, [seed % 2**32, (seed >> 32) % 2**32])[token % 4]
            assert uniforms[r, token].item() == (word + 0.5) / 2**32


@pytest.mark.one_version
def test_uniforms_are_uniform() -> None:
    uniforms = token_uniforms(torch.arange(100), torch.arange(100) * 3, 1000)
    assert_drawn_from((uniforms * 64).long().flatten(), torch.full((64,), 1 / 64))
    assert_drawn_from((uniforms * 2**20 % 1 * 64).long().flatten(), torch.full((64,), 1 / 64))


@pytest.mark.one_version
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    tokens = draw(logits.expand(20_000, 50), temperature=temperature).tokens
    assert_drawn_from(tokens, (logits / temperature).softmax(dim=0))


@pytest.mark.one_version
def test_a_hundred_thousand_draws_follow_the_papers_distribution() -> None:
    """Penalty, temperature and nucleus of the paper, from logits of which each step is done by hand."""
    N, V = 100_000, 24
    logits = torch.randn(V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seen = torch.arange(V) % 7 == 0
    scores = torch.where(seen, torch.where(logits > 0, logits / 1.1, logits * 1.1), logits) / 0.8
    order = scores.argsort(descending=True)
    num_kept = 1 + int((scores.softmax(0)[order].cumsum(0) < 0.9).sum())
    wanted = torch.zeros(V, dtype=torch.float64)
    wanted[order[:num_kept]] = scores[order[:num_kept]].softmax(0)
    assert 8 < num_kept < V
    assert seen[order[:num_kept]].any()
    tokens = draw(
        logits.float().expand(N, V), temperature=0.8, top_p=0.9, repetition_penalty=1.1, seen=seen.expand(N, V)
    ).tokens
    assert_drawn_from(tokens, wanted)


@pytest.mark.one_version
def test_draws_of_one_seed_at_successive_positions_are_independent() -> None:
    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4])
    N = 20_000
    tokens = draw(probabilities.log().expand(N, 4), seeds=torch.full((N,), 3), positions=torch.arange(N)).tokens
    assert_drawn_from(tokens, probabilities)
    pairs = tokens[:-1] * 4 + tokens[1:]
    assert_drawn_from(pairs, torch.outer(probabilities, probabilities).flatten())


@pytest.mark.one_version
@pytest.mark.parametrize(
    ("settings", "kept"),
    [({"top_k": 3}, [4, 2, 5]), ({"top_p": 0.55}, [4, 2]), ({"top_k": 2, "top_p": 0.6}, [4])],
    ids=["top-k", "top-p", "top-k then top-p"],
)
def test_filtered_draws_follow_the_renormalised_softmax(settings: dict[str, Any], kept: list[int]) -> None:
    probabilities = torch.tensor([0.02, 0.03, 0.2, 0.1, 0.5, 0.15])
    tokens = draw(probabilities.log().expand(10_000, 6), **settings).tokens
    wanted = torch.zeros(6).index_copy_(0, torch.tensor(kept), probabilities[kept])
    if len(kept) == 1:
        assert (tokens == kept[0]).all()
    else:
        assert_drawn_from(tokens, wanted / wanted.sum())


def test_draw_depends_on_nothing_but_its_row_seed_and_position() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 30, generator=generator)
    seeds, positions = torch.randint(2**60, (2, 4), generator=generator)
    whole = draw(logits, seeds=seeds, positions=positions, top_p=0.9)
    order = torch.tensor([3, 1])
    part = draw(logits[order], seeds=seeds[order], positions=positions[order], top_p=0.9)
    torch.testing.assert_close(part, tuple(x[order] for x in whole), rtol=0, atol=0)


@pytest.mark.one_version
@pytest.mark.parametrize("bits", [0, 31, 32, 62])
def test_every_part_of_seed_and_position_changes_the_noise(bits: int) -> None:
    base = torch.zeros(1, dtype=torch.int64)
    plain = token_uniforms(base, base, 8)
    for changed in (token_uniforms(base + 2**bits, base, 8), token_uniforms(base, base + 2**bits, 8)):
        assert (changed != plain).all()


def test_padding_ids_are_never_drawn() -> None:
    logits = torch.zeros(30, 8)
    logits[:, 6:] = torch.tensor([math.inf, math.nan])
    tokens, logprobs, _, _ = draw(logits, vocab_size=6)
    assert set(tokens.tolist()) == set(range(6))
    torch.testing.assert_close(logprobs, torch.full((30,), -math.log(6)))


def test_zero_temperature_takes_the_largest_and_the_lowest_id_of_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [5.0, 3.0, 3.0, 2.0]])
    tokens, _, margin, _ = draw(logits, temperature=0.0, top_p=0.5, top_k=1)
    assert tokens.tolist() == [1, 0]
    assert margin.tolist() == [0.0, 2.0]


def test_repetition_penalty_applies_to_seen_tokens_of_either_sign() -> None:
    logits = torch.tensor([[2.0, 1.5, -1.0], [-1.0, -1.5, -3.0]])
    seen = torch.tensor([[True, False, False], [True, False, False]])
    tokens, logprobs, margin, _ = draw(logits, temperature=0.0, repetition_penalty=2.0, seen=seen)
    assert tokens.tolist() == [1, 1]  # 2 / 2 < 1.5 and -1 * 2 < -1.5
    torch.testing.assert_close(margin, torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(logprobs, logits.log_softmax(dim=1)[:, 1])


def test_penalty_comes_before_temperature_and_filters() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log() + 5
    seen = torch.tensor([[True, False, False]]).expand(8, 3)
    tokens = draw(logits.expand(8, 3), repetition_penalty=1.5, seen=seen, top_k=2).tokens
    assert set(tokens.tolist()) == {1, 2}


def test_seen_may_cover_more_than_the_vocabulary() -> None:
    seen = torch.zeros(1, 9, dtype=torch.bool)
    assert draw(torch.zeros(1, 6), seen=seen, repetition_penalty=1.1)[0].shape == (1,)


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0)).bfloat16()
    seen = torch.rand(5, 30, generator=torch.Generator().manual_seed(1)) < 0.5
    tokens, logprobs, _, _ = draw(logits, temperature=0.5, top_p=0.8, top_k=5, repetition_penalty=1.3, seen=seen)
    wanted = logits.double().log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), wanted, rtol=1e-6, atol=2e-6)


def test_margin_is_the_lead_of_the_winner() -> None:
    logits = torch.randn(8, 9, generator=torch.Generator().manual_seed(0))
    keys = {"seeds": torch.arange(8), "positions": torch.arange(8)}
    tokens, _, margin, _ = draw(logits, temperature=0.5, **keys)
    scores = logits.double() / 0.5 - (-token_uniforms(keys["seeds"], keys["positions"], 9).log()).log()
    best = scores.sort(dim=1, descending=True)
    assert (tokens == best.indices[:, 0]).all()
    torch.testing.assert_close(margin.double(), best.values[:, 0] - best.values[:, 1], rtol=1e-5, atol=1e-6)


def test_margin_is_infinite_without_a_rival() -> None:
    assert draw(torch.zeros(2, 5), top_k=1).margins.isinf().all()


def test_no_requests_give_empty_results() -> None:
    assert all(x.shape == (0,) for x in draw(torch.zeros(0, 5), top_p=0.9))


def kept_ids(scores: list[float], top_k: int, top_p: float) -> set[int]:
    """Ids kept by top-k, then top-p, token by token in python floats."""
    order = sorted(range(len(scores)), key=lambda v: (-scores[v], v))[: top_k or None]
    mass = [math.exp(scores[v]) for v in order]
    kept: set[int] = set()
    before = 0.0
    for token, weight in zip(order, mass, strict=True):
        if kept and before >= top_p * sum(mass) and top_p < 1:
            break
        kept.add(token)
        before += weight
    return kept


@pytest.mark.one_version
@settings(max_examples=40, deadline=None)
@given(
    scores=st.lists(st.integers(-6, 6).map(lambda n: n / 3), min_size=1, max_size=12),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([1e-6, 0.313, 0.611, 0.917, 1.0]),
)
def test_filters_keep_what_a_loop_keeps(scores: list[float], top_k: int, top_p: float) -> None:
    row = torch.tensor([scores], dtype=torch.float64)
    out = filtered(row, top_k=top_k, top_p=top_p)[0]
    kept = kept_ids(scores, top_k, top_p)
    for token, score in enumerate(scores):
        assert out[token].item() == (score if token in kept else -math.inf)


@pytest.mark.one_version
def test_filters_take_the_lower_ids_of_many_equals() -> None:
    row = torch.zeros(1, 1000)
    assert filtered(row, top_k=7, top_p=1.0)[0].isfinite().nonzero().flatten().tolist() == list(range(7))
    assert filtered(row, top_k=0, top_p=0.0045)[0].isfinite().nonzero().flatten().tolist() == list(range(5))


@pytest.mark.one_version
def test_wrong_arguments_are_named() -> None:
    logits = torch.zeros(2, 5)
    for changes in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"repetition_penalty": 0.0}):
        with pytest.raises(ValueError, match="sample: temperature"):
            draw(logits, **changes)
    with pytest.raises(ValueError, match=r"expected \[R, V/tp\], and \[R\] int64"):
        draw(logits, seeds=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="0 tokens to draw from"):
        draw(logits, vocab_size=0)
    with pytest.raises(ValueError, match="must cover"):
        draw(logits, seen=torch.zeros(2, 4, dtype=torch.bool), repetition_penalty=1.1)


def test_sample_without_positions_is_the_draw_at_position_0() -> None:
    logits = torch.randn(2, 33, generator=torch.Generator().manual_seed(0))
    keys = {"temperature": 0.7, "top_p": 0.9, "top_k": 8, "repetition_penalty": 1.2, "seen": None}
    seeds = torch.arange(2) * 977
    tokens, logprobs = sample(logits, seeds=seeds, **keys)
    draw = sample_with_margins(logits, seeds=seeds, positions=torch.zeros(2, dtype=torch.int64), **keys)
    assert torch.equal(tokens, draw.tokens)
    assert torch.equal(logprobs, draw.logprobs)


def sorted_draw(logits: Tensor, **settings: Any) -> Draw:
    """The draw from sorted rows of the whole vocabulary, in float64 from the scores on."""
    logits, top_k, top_p = logits.float(), settings.get("top_k", 0), settings.get("top_p", 1.0)
    scores, penalty = logits, settings.get("repetition_penalty", 1.0)
    penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
    scores = torch.where(settings["seen"], penalised, scores) if settings.get("seen") is not None else scores
    descending, order = (scores / settings["temperature"]).double().sort(dim=1, descending=True, stable=True)
    if top_k:
        descending[:, top_k:] = -torch.inf
    probabilities = descending.softmax(dim=1)
    if top_p < 1:
        descending = torch.where(probabilities.cumsum(dim=1) - probabilities < top_p, descending, -torch.inf)
    scores = torch.empty_like(descending).scatter_(1, order, descending)
    uniforms = token_uniforms(settings["seeds"], settings["positions"], logits.shape[1])
    noisy = (scores - (-uniforms.log()).log()).sort(dim=1, descending=True)
    tokens = noisy.indices[:, :1]
    return Draw(
        tokens[:, 0],
        logits.double().log_softmax(dim=1).gather(1, tokens)[:, 0].float(),
        (noisy.values[:, 0] - noisy.values[:, 1]).float(),
        scores.log_softmax(dim=1).gather(1, tokens)[:, 0].float(),
    )


def assert_same_draw(draw: Draw, wanted: Draw, atol: float = 2e-6) -> None:
    assert torch.equal(draw.tokens, wanted.tokens)
    for x, y in zip(draw[1:], wanted[1:], strict=True):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=atol)


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 75 tokens take three programs, and two blocks each."""
    module = pytest.importorskip("ppomax.kernels.sampling_triton")
    monkeypatch.setattr(module, "CHUNK", 32)
    monkeypatch.setattr(module, "BLOCK", 16)


@pytest.mark.parametrize("is_split", [False, True], ids=["one chunk", "several chunks"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"top_k": 20}, {"top_p": 0.9, "repetition_penalty": 1.3}, {"top_k": 30, "top_p": 0.7}],
    ids=["plain", "top-k", "penalty and top-p", "top-k and top-p"],
)
def test_draws_are_those_of_the_sorted_vocabulary(
    settings: dict[str, Any], is_split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_split:
        small_chunks(monkeypatch)
    R, V = 2, 75
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(R, V, generator=generator) * 8).round() / 4  # many equals
    seen = torch.rand(R, V, generator=generator) < 0.4 if "repetition_penalty" in settings else None
    seeds, positions = torch.randint(-(2**62), 2**62, (2, R), generator=generator)
    given = {"temperature": 0.8, "seen": seen, "seeds": seeds, "positions": positions, **settings}
    assert_same_draw(draw(logits, **given), sorted_draw(logits, **given))


def test_filters_keep_the_lower_ids_of_equals_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)
    logits = torch.zeros(1, 75)
    logits[0, 50] = 3.0
    for keep_40 in ({"top_k": 40}, {"top_p": (math.e**3 + 38.5) / (math.e**3 + 74)}):
        tokens, _, _, sampling_logprobs = draw(logits, **keep_40)
        assert tokens[0] < 39 or tokens[0] == 50
        score = 3.0 if tokens[0] == 50 else 0.0
        torch.testing.assert_close(sampling_logprobs, torch.tensor([score - math.log(math.e**3 + 39)]))


def test_sampling_logprobs_are_of_the_renormalised_distribution() -> None:
    logits = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    tokens, _, _, sampling_logprobs = draw(logits, temperature=0.6, top_k=4)
    kept = (logits / 0.6).topk(4)
    places = (kept.indices == tokens[:, None]).nonzero()[:, 1:]
    torch.testing.assert_close(sampling_logprobs, kept.values.log_softmax(dim=1).gather(1, places)[:, 0])
    tokens, _, _, sampling_logprobs = draw(logits, temperature=0.6)
    wanted = (logits / 0.6).log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(sampling_logprobs, wanted, rtol=2e-6, atol=2e-6)
    assert (draw(logits, temperature=0.0).sampling_logprobs == 0).all()


@pytest.mark.parametrize("settings", [{"top_k": 50}, {"top_p": 1 - 1e-13}], ids=["top-k", "top-p"])
def test_filters_that_reach_beyond_the_vocabulary_keep_all_of_it(settings: dict[str, Any]) -> None:
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    assert_same_draw(draw(logits, **settings), draw(logits))


@pytest.mark.parametrize("shift", [-1e4, 1e4], ids=["-1e4", "1e4"])
def test_draws_do_not_depend_on_a_constant_in_the_logits(shift: float) -> None:
    logits = (torch.randn(1, 20, generator=torch.Generator().manual_seed(0)) * 64).round() / 64  # exact beside 1e4
    assert_same_draw(draw(logits + shift, top_p=0.9), draw(logits, top_p=0.9))


def test_a_tiny_temperature_takes_the_largest() -> None:
    logits = torch.tensor([[30.0, 29.99, -30.0], [-30.0, 0.0, -1.0]])
    tokens, _, margins, sampling_logprobs = draw(logits, temperature=1e-4)
    assert tokens.tolist() == [0, 1]
    assert margins.isfinite().all()
    assert (sampling_logprobs == 0).all()


@pytest.mark.parametrize("settings", [{}, {"top_k": 4, "top_p": 0.99}, {"temperature": 0.0}], ids=str)
def test_infinitely_unlikely_tokens_are_never_drawn(settings: dict[str, Any]) -> None:
    logits = torch.full((2, 9), -math.inf)
    logits[0, 5], logits[1, 8] = -300.0, 200.0
    tokens, logprobs, margins, sampling_logprobs = draw(logits, **settings)
    assert tokens.tolist() == [5, 8]
    assert (logprobs == 0).all()
    assert (sampling_logprobs == 0).all()
    assert margins.isinf().all()


@pytest.mark.parametrize("settings", [{}, {"top_k": 4}, {"top_p": 0.5}, {"temperature": 0.0}], ids=str)
def test_rows_that_are_not_finite_give_a_valid_token_and_nan(settings: dict[str, Any]) -> None:
    logits = torch.zeros(4, 9)
    logits[0, 2] = math.nan
    logits[1, 3] = math.inf
    logits[2] = -math.inf
    logits[3] = math.nan
    tokens, logprobs, _, sampling_logprobs = draw(logits, vocab_size=7, **settings)
    assert ((tokens >= 0) & (tokens < 7)).all()
    assert tokens[0] != 2
    assert tokens[1:].tolist() == [3, 0, 0]
    assert logprobs.isnan().all()
    assert sampling_logprobs.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_of_any_type_are_taken_as_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 21, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert_same_draw(draw(logits), draw(logits.float()), atol=0)


def test_strided_logits_and_seen_give_what_contiguous_ones_give() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(22, 4, generator=generator).T[::2]
    seen = torch.rand(4, 44, generator=generator)[::2, ::2] < 0.5
    wide = torch.randn(2, 30, generator=generator)
    settings = {"repetition_penalty": 1.2, "seen": seen}
    assert_same_draw(draw(logits, **settings), draw(logits.contiguous(), **settings), atol=0)
    assert_same_draw(draw(wide[:, 3:20]), draw(wide[:, 3:20].contiguous()), atol=0)


def test_two_runs_agree_bit_for_bit_whatever_stood_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    wanted = draw(logits, top_k=9, top_p=0.9)
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        x = empty(*size, **options)
        return x.fill_(math.nan if x.is_floating_point() else 2**40 + 7)

    monkeypatch.setattr(torch, "empty", poisoned)
    torch.testing.assert_close(draw(logits, top_k=9, top_p=0.9), wanted, rtol=0, atol=0)


def test_compiled_draws_are_the_draws() -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(tuple(compiled(logits, top_p=0.8)), tuple(draw(logits, top_p=0.8)), rtol=0, atol=0)


def test_operator_keeps_the_rules_of_custom_operators() -> None:
    logits, seen = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 6, dtype=torch.bool)
    keys = (torch.arange(2), torch.arange(2))
    torch.library.opcheck(torch.ops.ppomax.sample.default, (logits, seen, *keys, 0.8, 1.0, 0, 1.1, 6, None))


@pytest.mark.parametrize("with_seen", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_are_never_drawn_but_count_in_the_logprobs(temperature: float, with_seen: bool) -> None:
    R, V = 40, 11
    logits = torch.randn(R, V, generator=torch.Generator().manual_seed(0))
    banned = torch.zeros(R, V, dtype=torch.bool)
    banned[:, 3], banned[::2, logits.argmax(dim=1)[0]] = True, True
    seen = torch.rand(R, V, generator=torch.Generator().manual_seed(1)) < 0.4 if with_seen else None
    settings: dict[str, Any] = {"temperature": temperature, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.3}
    keys = {"seeds": torch.arange(R), "positions": torch.arange(R) * 7}
    got = sample_with_margins(logits, seen=seen, banned=banned, **settings, **keys)
    assert not banned.gather(1, got.tokens[:, None]).any()
    wanted = sample_with_margins(logits.masked_fill(banned, -torch.inf), seen=seen, **settings, **keys)
    assert got.tokens.equal(wanted.tokens)
    torch.testing.assert_close(got.sampling_logprobs, wanted.sampling_logprobs)
    torch.testing.assert_close(got.logprobs, logits.log_softmax(1).gather(1, got.tokens[:, None])[:, 0])
