"""The best of several responses to each prompt, by a score that needs no other model."""

import torch
from torch import Tensor

from ppomax.engine.ppo.types import Rollout, take_rows


def response_scores(rollout: Rollout, *, length_penalty: float) -> Tensor:
    """[B] float64: sum of a response's log-probs / tokens ^ length_penalty; nats, unmodified T = 1 distribution.

    Log-probs are negative: the larger the exponent, the better long responses do; 1 gives their mean.
    Source: P p.18; the released code has the exponent 1, and the distribution drawn from, which is 1 at every token of
    a greedy response.
    """
    lengths = rollout.response_mask.sum(1).double()
    return rollout.sampling_logprobs.double().sum(1) / lengths.clamp_min(1) ** length_penalty


def best_of(rollout: Rollout, samples: int, *, length_penalty: float) -> Rollout:
    """Of each `samples` rows side by side the one with the highest response score, of equals the first.

    One sample leaves the rollout as it is.
    """
    if samples == 1:
        return rollout
    scores = response_scores(rollout, length_penalty=length_penalty)
    best = scores.nan_to_num(nan=-torch.inf).view(-1, samples).argmax(1)
    return take_rows(rollout, torch.arange(len(best), device=best.device) * samples + best)
