"""Metrics of a rollout against hand-worked numbers and independent computations in plain Python."""

import math
import random
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from ppomax.engine.ppo import statistics
from ppomax.engine.ppo.statistics import (
    HISTOGRAM_BINS,
    distinct_ngrams,
    longest_runs,
    masked_quantiles,
    rollout_statistics,
)
from ppomax.engine.ppo.types import Experience, Rollout, response_mask


def experience_of(prompts: list[list[int]], responses: list[list[int]], *, seed: int = 0) -> Experience:
    """Random numbers on given texts; a response has ended where its last token is 2."""
    lengths = torch.tensor([len(a) + len(b) for a, b in zip(prompts, responses, strict=True)])
    tokens = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
    for row, prompt, response in zip(tokens, prompts, responses, strict=True):
        row[: len(prompt) + len(response)] = torch.tensor(prompt + response)
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
    mask = response_mask(prompt_lengths, lengths, tokens.shape[1] - 1)
    finished = torch.tensor([response[-1] == 2 for response in responses])
    generator = torch.Generator().manual_seed(seed)
    names = ("logprobs", "ref_logprobs", "values", "kl", "token_rewards", "advantages", "returns")
    drawn = {name: torch.randn(mask.shape, generator=generator) * mask for name in names}
    for name in ("logprobs", "ref_logprobs"):
        drawn[name] = -drawn[name].abs()
    rollout = Rollout(tokens, prompt_lengths, lengths, mask, finished, drawn["logprobs"])
    scores = torch.randn(len(prompts), generator=generator)
    return Experience(rollout=rollout, scores=scores, old_logprobs=drawn["logprobs"], **drawn)


SYNCS = ("item", "__bool__", "__float__", "__int__", "cpu", "numpy", "nonzero")
PROMPTS = [[1, 5], [1], [1, 6, 7]]
RESPONSES = [[9, 9, 9, 4, 9, 9, 9, 4, 2], [7], [3, 4, 5, 3, 4, 5, 3, 4]]


def test_lengths_and_ends_of_hand_worked_responses() -> None:
    metrics = rollout_statistics(experience_of(PROMPTS, RESPONSES)).metrics
    assert metrics["response_length"] == 6
    assert (metrics["response_length_min"], metrics["response_length_max"], metrics["response_tokens"]) == (1, 9, 18)
    assert metrics["response_length_p50"] == 8
    assert metrics["response_length_p10"] == pytest.approx(1 + 0.2 * 7)
    assert metrics["finished"] == pytest.approx(1 / 3)
    assert metrics["truncated"] == pytest.approx(2 / 3)


def test_repetition_of_hand_worked_responses() -> None:
    found = rollout_statistics(experience_of(PROMPTS, RESPONSES))
    assert found.responses["longest_run"] == [3, 1, 1]
    # 4-grams of the first: 9994 9949 9499 4999 9994 9942: 5 of 6; the second has none; of the third: 3453 4534 5345
    # 3453 4534: 3 of 5.
    assert found.responses["distinct_4"] == pytest.approx([5 / 6, 1, 3 / 5])
    assert found.metrics["distinct_4"] == pytest.approx((5 / 6 + 1 + 3 / 5) / 3)
    assert found.metrics["batch_distinct_4"] == pytest.approx(8 / 11)
    assert found.metrics["batch_distinct_1"] == pytest.approx(6 / 18)  # 2 3 4 5 7 9


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 40])
def test_distinct_ngrams_are_those_of_a_count_in_python(width: int) -> None:
    draw = random.Random(width)
    rows = [[draw.randrange(3) for _ in range(width)] for _ in range(7)]
    spans = [sorted(draw.sample(range(width + 1), 2)) if width > 1 else [0, draw.randrange(2)] for _ in rows]
    tokens = torch.tensor(rows)
    column = torch.arange(width)
    mask = torch.stack([(column >= first) & (column < last) for first, last in spans])
    within, overall = distinct_ngrams(tokens, mask)
    for number, n in enumerate((1, 2, 3, 4)):
        grams = [
            [tuple(row[t : t + n]) for t in range(first, last - n + 1)]
            for row, (first, last) in zip(rows, spans, strict=True)
        ]
        expected = [len(set(found)) / len(found) if found else 1.0 for found in grams]
        assert within[number].tolist() == pytest.approx(expected)
        pooled = [gram for found in grams for gram in found]
        assert float(overall[number]) == pytest.approx(len(set(pooled)) / len(pooled) if pooled else 1.0)


def test_large_token_ids_do_not_collide() -> None:
    tokens = torch.tensor([[200_000, 0, 0, 200_000, 1, 199_999, 0, 0]])
    within, _ = distinct_ngrams(tokens, torch.ones_like(tokens, dtype=torch.bool))
    assert within[:2, 0].tolist() == pytest.approx([4 / 8, 6 / 7])


def test_longest_runs_stop_at_the_edge_of_the_response() -> None:
    tokens = torch.tensor([[4, 4, 4, 4, 5], [4, 4, 5, 5, 5]])
    mask = torch.tensor([[False, False, True, True, True], [True, True, True, False, False]])
    assert longest_runs(tokens, mask).tolist() == [2, 2]


def test_quantiles_are_torchs() -> None:
    x = torch.randn(13, 17, generator=torch.Generator().manual_seed(1))
    mask = x.abs() > 0.3
    points = (0.0, 0.01, 0.5, 0.99, 1.0)
    torch.testing.assert_close(masked_quantiles(x, mask, points), torch.quantile(x[mask], torch.tensor(points)))


def test_perplexities_of_the_paper_and_the_true_one() -> None:
    """Section 3.2 of the paper's facts: two samples of 100 tokens with a mean NLL of 2 give 1.0202 there, e^2 truly."""
    experience = experience_of([[1], [1]], [[5] * 100, [6] * 100])
    logprobs = -2.0 * experience.rollout.response_mask
    metrics = rollout_statistics(replace(experience, logprobs=logprobs)).metrics
    assert metrics["perplexity"] == pytest.approx(math.exp(2), rel=1e-6)
    assert metrics["perplexity_paper"] == pytest.approx(1.0202, abs=5e-5)


def test_kl_estimators_of_a_hand_worked_token() -> None:
    experience = experience_of([[1]], [[5]])
    column = experience.rollout.response_mask
    changed = replace(experience, logprobs=-0.5 * column, ref_logprobs=-1.25 * column)
    metrics = rollout_statistics(changed).metrics
    assert metrics["kl"] == pytest.approx(0.75)
    assert metrics["kl_k3"] == pytest.approx(math.exp(-0.75) - 1 + 0.75, rel=1e-5)


def test_moments_of_the_critic_are_those_of_the_kept_tokens() -> None:
    experience = experience_of(PROMPTS, RESPONSES)
    mask = experience.rollout.response_mask
    metrics = rollout_statistics(experience).metrics
    for name, x in (("value", experience.values), ("return", experience.returns), ("advantage", experience.advantages)):
        assert metrics[f"{name}_mean"] == pytest.approx(float(x[mask].mean()), abs=1e-6)
        assert metrics[f"{name}_std"] == pytest.approx(float(x[mask].std(correction=0)), rel=1e-5)
    residual = (experience.returns - experience.values)[mask].var(correction=0)
    expected = 1 - float(residual / experience.returns[mask].var(correction=0))
    assert metrics["explained_variance"] == pytest.approx(expected, rel=1e-5)


def test_the_histogram_counts_every_finite_score() -> None:
    experience = experience_of([[1]] * 6, [[5]] * 6)
    scores = torch.tensor([0.0, 1.0, 1.01, 10.0, float("nan"), float("inf")])
    histogram = rollout_statistics(replace(experience, scores=scores)).reward_histogram
    assert histogram["edges"] == pytest.approx([0.5 * i for i in range(HISTOGRAM_BINS + 1)])
    assert [(i, count) for i, count in enumerate(histogram["counts"]) if count] == [(0, 1), (2, 2), (19, 1)]


def test_equal_scores_are_one_bin() -> None:
    experience = experience_of([[1]] * 3, [[5]] * 3)
    histogram = rollout_statistics(replace(experience, scores=torch.full((3,), 4.0))).reward_histogram
    assert sum(histogram["counts"]) == 3
    assert set(histogram["edges"]) == {4.0}


def test_numbers_of_single_responses_add_up_to_those_of_the_rollout() -> None:
    found = rollout_statistics(experience_of(PROMPTS, RESPONSES))
    lengths, kl = found.responses["response_length"], found.responses["kl"]
    assert {len(x) for x in found.responses.values()} == {3}
    assert found.responses["tokens"] == [11, 2, 11]
    pooled = sum(n * k for n, k in zip(lengths, kl, strict=True)) / sum(lengths)
    assert found.metrics["kl"] == pytest.approx(pooled, rel=1e-6)


def test_a_rollout_is_read_in_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    experience = experience_of(PROMPTS, RESPONSES)
    read = Mock(wraps=statistics.to_host)
    monkeypatch.setattr(statistics, "to_host", read)
    for name in SYNCS:
        monkeypatch.setattr(torch.Tensor, name, Mock(side_effect=AssertionError(name)))
    rollout_statistics(experience)
    assert read.call_count == 1
