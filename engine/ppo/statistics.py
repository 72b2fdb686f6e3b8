"""Metrics of a rollout, over the global batch that every rank holds, computed on the device and read in one transfer.

docs/metrics.md defines each; names are those of metrics.jsonl. What the optimizer steps measure is in update.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppomax.engine.ppo.types import Experience
from ppomax.kernels.numerics import clamped_log_ratio, exp_remainder

NEAR_RATIOS = (0.5, 2.0)
"""Ratios of trainer and sampler outside of these are counted; token importance sampling usually cuts them."""
HISTOGRAM_BINS = 20
NGRAMS = (1, 2, 3, 4)


@dataclass(frozen=True)
class RolloutStatistics:
    """metrics: of the whole rollout. reward_histogram: edges [HISTOGRAM_BINS + 1] from the least to the largest finite
    score, and counts of the bins between. responses: a list of B numbers for each of RESPONSE_METRICS.
    """

    metrics: dict[str, float]
    reward_histogram: dict[str, list[float]]
    responses: dict[str, list[float]]

    def record(self) -> dict[str, Any]:
        """What a line of metrics.jsonl gets."""
        return {**self.metrics, "reward_histogram": self.reward_histogram}


RESPONSE_METRICS = ("reward", "response_length", "finished", "kl", "nll", "distinct_4", "longest_run", "tokens")
"""Of single responses: raw score, tokens, ended by EOS, mean k1 and mean negative log-likelihood per token (nats),
share of its 4-grams that are distinct, longest run of one token, tokens with the prompt."""


def rollout_statistics(experience: Experience) -> RolloutStatistics:
    """Everything that a rollout and its scores tell, the same on every rank: one host sync."""
    responses = _of_responses(experience)
    values = {
        **_of_scores(experience.scores),
        **_of_policy(experience, responses),
        **_of_lengths(experience, responses["response_length"]),
        **_of_critic(experience),
        **_of_repetition(experience, responses),
        **(experience.rewards.metrics() if experience.rewards is not None else {}),
    }
    rollout = experience.rollout
    if experience.logprobs is not rollout.sampling_logprobs:
        # With ppo.old_logprobs = "rollout" there is nothing to compare here: first_step_kl (update.py) shows it.
        log_ratio = clamped_log_ratio(experience.logprobs, rollout.sampling_logprobs)
        values |= _sampler_mismatch(log_ratio, rollout.response_mask)
    edges, counts = _histogram(experience.scores)
    read = to_host({**values, "edges": edges, "counts": counts, **{f"each {k}": x for k, x in responses.items()}})
    return RolloutStatistics(
        metrics={name: read[name][0] for name in values},
        reward_histogram={"edges": read["edges"], "counts": read["counts"]},
        responses={name: read[f"each {name}"] for name in responses},
    )


def to_host(tensors: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """The entries of each tensor, in order; one transfer for all."""
    flat = torch.cat([x.double().flatten() for x in tensors.values()]).tolist()
    starts = iter(range(len(flat)))
    return {name: [flat[next(starts)] for _ in range(x.numel())] for name, x in tensors.items()}


def masked_quantiles(x: Tensor, mask: Tensor, points: Sequence[float]) -> Tensor:
    """[len(points)] of the type of x: quantiles of the kept entries, with linear interpolation; no host sync.

    x and mask of equal shape; at least one entry is kept.
    """
    ordered = torch.where(mask, x, float("inf")).flatten().sort().values
    shares = torch.tensor(points, dtype=torch.float64).to(x.device, non_blocking=True)
    position = shares * (mask.sum() - 1)
    low = position.floor()
    below, above = ordered[low.long()], ordered[position.ceil().long()]
    return torch.lerp(below, above, (position - low).to(x.dtype))


def distinct_ngrams(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """How many n-grams of responses differ: within each response, and over all of them.

    tokens, mask [B, T]: the kept tokens of a row are neighbours. Returns (within [N, B], over all [N]) float64:
    distinct n-grams over all n-grams for N = len(NGRAMS) lengths n; 1 where there is none. No host sync.
    """
    num_rows, width = tokens.shape
    rows = torch.arange(num_rows, device=tokens.device)[:, None].expand_as(tokens)
    ids, kept = tokens, mask
    within, overall = [], []
    for n in NGRAMS:
        if n > 1:
            # An n-gram is an (n-1)-gram and the token behind it; ids stay small because they are counted anew.
            num_starts = max(0, width - n + 1)
            following, kept = torch.zeros_like(tokens), torch.zeros_like(mask)
            following[:, :num_starts] = tokens[:, n - 1 :]
            kept[:, :num_starts] = mask[:, :num_starts] & mask[:, n - 1 :]
            ids = _number(torch.where(kept, _number(ids) * (tokens.max() + 1) + following, -1))
        count = kept.sum(1)
        pairs = torch.where(kept, ids * num_rows + rows, -1)
        within.append(_count_distinct_by_row(pairs, rows, num_rows) / count.clamp_min(1))
        within[-1] = torch.where(count > 0, within[-1], 1.0)
        total = count.sum()
        distinct = _is_first(torch.where(kept, ids, -1).flatten().sort().values).sum()
        overall.append(torch.where(total > 0, distinct / total.clamp_min(1), 1.0))
    return torch.stack(within).double(), torch.stack(overall).double()


def _number(ids: Tensor) -> Tensor:
    """Equal entries get equal numbers from 0, in the order of their size."""
    ordered, places = ids.flatten().sort()
    is_new = torch.ones_like(ordered)
    is_new[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(ordered).scatter_(0, places, is_new.cumsum(0) - 1).view_as(ids)


def _is_first(ordered: Tensor) -> Tensor:
    """Where a value of a sorted vector appears first; negative ones count for nothing."""
    is_first = ordered >= 0
    is_first[1:] &= ordered[1:] != ordered[:-1]
    return is_first


def _count_distinct_by_row(pairs: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """[B]: distinct values of each row; a value that is not negative is of one row only."""
    ordered, places = pairs.flatten().sort()
    counted = torch.zeros(num_rows, dtype=torch.int64, device=pairs.device)
    return counted.index_add_(0, rows.flatten()[places], _is_first(ordered).long())


def longest_runs(tokens: Tensor, mask: Tensor) -> Tensor:
    """[B] float64: the most times that a token follows itself in each response, itself included; 0 without tokens.

    tokens, mask [B, T]: the kept tokens of a row are neighbours. No host sync.
    """
    columns = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    goes_on = torch.zeros_like(mask)
    goes_on[:, 1:] = mask[:, 1:] & mask[:, :-1] & (tokens[:, 1:] == tokens[:, :-1])
    begin = torch.where(goes_on, 0, columns).cummax(1).values
    return torch.where(mask, columns - begin + 1, 0).amax(1).double()


def _of_responses(experience: Experience) -> dict[str, Tensor]:
    """RESPONSE_METRICS, [B] each; the two about repetition are filled in later."""
    rollout, mask = experience.rollout, experience.rollout.response_mask
    lengths = mask.sum(1).double()
    num_tokens = lengths.clamp_min(1)
    return {
        "reward": experience.scores.double(),
        "response_length": lengths,
        "finished": rollout.finished.double(),
        "kl": (experience.logprobs - experience.ref_logprobs).sum(1, dtype=torch.float64) / num_tokens,
        "nll": -experience.logprobs.sum(1, dtype=torch.float64) / num_tokens,
        "tokens": rollout.lengths.double(),
    }


def _of_scores(scores: Tensor) -> dict[str, Tensor]:
    return {
        "reward": scores.mean(),
        "reward_std": scores.std() if len(scores) > 1 else scores.new_zeros(()),
        "reward_min": scores.min(),
        "reward_max": scores.max(),
    }


def _of_policy(experience: Experience, responses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    mask = experience.rollout.response_mask
    num_tokens = mask.sum()
    log_ratio = clamped_log_ratio(experience.ref_logprobs, experience.logprobs)
    return {
        "kl": _mean(experience.logprobs - experience.ref_logprobs, mask),
        "kl_k3": _mean(exp_remainder(log_ratio), mask),
        "kl_estimate": _mean(experience.kl, mask),
        "perplexity": (-_mean(experience.logprobs, mask)).exp(),
        "ref_perplexity": (-_mean(experience.ref_logprobs, mask)).exp(),
        # What the released code plots: a mean over responses of what is a mean over tokens, over the tokens once more.
        "perplexity_paper": (responses["nll"].sum() / num_tokens).exp(),
    }


def _of_lengths(experience: Experience, lengths: Tensor) -> dict[str, Tensor]:
    finished = experience.rollout.finished.float().mean()
    low, median, high = masked_quantiles(lengths, torch.ones_like(lengths, dtype=torch.bool), (0.1, 0.5, 0.9))
    return {
        "response_length": lengths.mean(),
        "response_length_std": lengths.std(correction=0),
        "response_length_min": lengths.min(),
        "response_length_p10": low,
        "response_length_p50": median,
        "response_length_p90": high,
        "response_length_max": lengths.max(),
        "response_tokens": lengths.sum(),
        "finished": finished,
        "truncated": 1 - finished,
    }


def _of_critic(experience: Experience) -> dict[str, Tensor]:
    mask = experience.rollout.response_mask
    returns, advantages = experience.returns, experience.advantages
    residual = _variance(returns - experience.values, mask)
    low, high = masked_quantiles(advantages, mask, (0.01, 0.99))
    return {
        "value_mean": _mean(experience.values, mask),
        "value_std": _variance(experience.values, mask).sqrt(),
        "return_mean": _mean(returns, mask),
        "return_std": _variance(returns, mask).sqrt(),
        "advantage_mean": _mean(advantages, mask),
        "advantage_std": _variance(advantages, mask).sqrt(),
        "advantage_p01": low,
        "advantage_p99": high,
        "explained_variance": 1 - residual / _variance(returns, mask).clamp_min(1e-12),
    }


def _of_repetition(experience: Experience, responses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Also fills in what is about single responses."""
    rollout, mask = experience.rollout, experience.rollout.response_mask
    tokens = rollout.tokens[:, 1:]
    within, overall = distinct_ngrams(tokens, mask)
    runs = longest_runs(tokens, mask)
    responses |= {"distinct_4": within[NGRAMS.index(4)], "longest_run": runs}
    return {
        **{f"distinct_{n}": within[i].mean() for i, n in enumerate(NGRAMS)},
        **{f"batch_distinct_{n}": overall[i] for i, n in enumerate(NGRAMS)},
        "longest_run_mean": runs.mean(),
        "longest_run_max": runs.max(),
    }


def _sampler_mismatch(log_ratio: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What tells two copies of a policy apart, from log pi_trainer - log pi_sampler [B, T] of the sampled tokens.

    sampler_mismatch_k3: estimate of KL(sampler || trainer), nats. sampler_ratio_outside: share of the ratios outside
    NEAR_RATIOS. token_mult_prob_error: exp of the mean difference.
    """
    difference, ratio = log_ratio.abs(), log_ratio.exp()
    low, high = NEAR_RATIOS
    return {
        "sampler_mismatch_mean": _mean(difference, mask),
        "sampler_mismatch_max": torch.where(mask, difference, 0.0).max(),
        "sampler_mismatch_k3": _mean(exp_remainder(log_ratio), mask),
        "sampler_ratio_outside": _mean(((ratio < low) | (ratio > high)).float(), mask),
        "token_mult_prob_error": _mean(difference, mask).exp(),
    }


def _histogram(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(edges, counts) of the finite scores, float64."""
    x = scores.double()
    finite = x.isfinite()
    low = torch.where(finite, x, float("inf")).min().nan_to_num(posinf=0.0)
    high = torch.where(finite, x, float("-inf")).max().nan_to_num(neginf=0.0)
    share = torch.linspace(0, 1, HISTOGRAM_BINS + 1, dtype=torch.float64, device=x.device)
    edges = torch.lerp(low, high, share)
    position = ((x - low) / (high - low).clamp_min(1e-300) * HISTOGRAM_BINS).nan_to_num(0.0, 0.0, 0.0)
    bins = position.long().clamp(0, HISTOGRAM_BINS - 1)
    return edges, torch.zeros(HISTOGRAM_BINS, dtype=torch.float64, device=x.device).index_add_(0, bins, finite.double())


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    """Of the kept entries, float64."""
    return torch.where(mask, x, 0.0).sum(dtype=torch.float64) / mask.sum()


def _variance(x: Tensor, mask: Tensor) -> Tensor:
    """Of the kept entries, biased, float64."""
    return _mean((x.double() - _mean(x, mask)).square(), mask)
