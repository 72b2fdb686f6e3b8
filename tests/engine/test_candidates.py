"""Which of several sampled responses evaluations take."""

import pytest
import torch

from ppomax.engine.ppo.types import Rollout, response_mask
from ppomax.engine.rollout.candidates import best_of, response_scores


def rollout_of(*responses: list[float]) -> Rollout:
    """Prompts of one token, responses with these log-probs; the first token of response b is b."""
    B, width = len(responses), 1 + max(map(len, responses))
    tokens = torch.arange(B)[:, None].repeat(1, width)
    prompt_lengths, lengths = torch.ones(B, dtype=torch.int64), torch.tensor([1 + len(r) for r in responses])
    logprobs = torch.zeros(B, width - 1)
    for row, response in zip(logprobs, responses, strict=True):
        row[: len(response)] = torch.tensor(response)
    mask = response_mask(prompt_lengths, lengths, width - 1)
    return Rollout(tokens, prompt_lengths, lengths, mask, torch.ones(B, dtype=torch.bool), logprobs)


def test_scores_of_hand_worked_responses() -> None:
    rollout = rollout_of([-1.0, -3.0], [-2.0], [-1.0, -1.0, -1.0, -5.0])
    assert response_scores(rollout, length_penalty=0.0).tolist() == [-4, -2, -8]
    assert response_scores(rollout, length_penalty=1.0).tolist() == [-2, -2, -2]
    assert response_scores(rollout, length_penalty=2.0).tolist() == [-1, -2, -0.5]
    assert response_scores(rollout, length_penalty=1.2).tolist() == pytest.approx([-4 / 2**1.2, -2, -8 / 4**1.2])


@pytest.mark.parametrize(("length_penalty", "best"), [(0.0, [1, 3]), (1.0, [0, 3]), (2.0, [2, 5])])
def test_the_best_of_each_prompt_is_taken(length_penalty: float, best: list[int]) -> None:
    rollout = rollout_of([-1.0, -3.0], [-2.0], [-1.0, -1.0, -1.0, -5.0], [-0.1], [-7.0], [-0.1] * 3 + [-0.2])
    taken = best_of(rollout, 3, length_penalty=length_penalty)
    assert taken.tokens[:, 0].tolist() == best
    assert taken.lengths.tolist() == rollout.lengths[best].tolist()
    assert taken.tokens.shape[1] == taken.lengths.max() == taken.response_mask.shape[1] + 1
    assert taken.sampling_logprobs.sum(1).tolist() == rollout.sampling_logprobs[best].sum(1).tolist()


def test_a_response_whose_logprobs_are_not_numbers_is_not_taken() -> None:
    assert best_of(rollout_of([float("nan")], [-50.0]), 2, length_penalty=1.0).tokens[0, 0] == 1


def test_one_sample_is_taken_as_it_is() -> None:
    rollout = rollout_of([-1.0], [-2.0, -3.0])
    assert best_of(rollout, 1, length_penalty=1.2) is rollout
