"""More responses than an iteration needs: it takes those that end first, and the long ones do not hold it up.

The others are dropped, which favours short responses, or carried to the next iteration, whose weights go on with them.
Which are taken, and how many tokens the others have by then, follows from the responses alone: see `watch.Quota`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from ppomax.engine.config import SamplingConfig
from ppomax.engine.models.roles import Role
from ppomax.engine.ppo.types import Rollout, take_rows
from ppomax.engine.rollout.batch import Begun
from ppomax.engine.rollout.generate import generate
from ppomax.engine.rollout.watch import Quota

NOTHING = Begun()


@dataclass(frozen=True)
class Started:
    """A response that some iteration has started. prompt: token ids. seed: of its noise, over all iterations.

    first_step: the iteration whose weights drew its first token.
    """

    prompt: tuple[int, ...]
    seed: int
    first_step: int
    begun: Begun = NOTHING

    @staticmethod
    def from_json(content: dict) -> "Started":
        """From dataclasses.asdict, also by way of JSON, which keeps float32 numbers exactly."""
        begun = content["begun"]
        begun = Begun(tuple(begun["tokens"]), tuple(begun["logprobs"]), begun["finished"])
        return Started(tuple(content["prompt"]), content["seed"], content["first_step"], begun)


@dataclass(frozen=True)
class FirstToEnd:
    """rollout: the responses that ended first, in the order of their rows. rest: the others, as far as they are.

    metrics: response_age_mean, response_age_max: iterations since a response of the rollout started. carried_tokens:
    share of its tokens that earlier weights drew. tokens_drawn_max: tokens that this iteration drew for the last of it.
    """

    rollout: Rollout
    rest: tuple[Started, ...]
    metrics: dict[str, float]


def first_to_end(
    role: Role,
    started: Sequence[Started],
    num_wanted: int,
    step: int,
    sampling: SamplingConfig,
    *,
    eos_id: int,
    pad_id: int,
    max_length: int,
) -> FirstToEnd:
    """Goes on with all responses until num_wanted of them have ended; sampling.max_new_tokens counts a response over
    all iterations.

    step: this iteration. Every rank of the run must call it, with the same arguments, and gets the same.
    """
    started = [one if one.begun.tokens else replace(one, first_step=step) for one in started]
    everything = generate(
        role,
        [one.prompt for one in started],
        sampling,
        seeds=torch.tensor([one.seed for one in started]),
        eos_id=eos_id,
        pad_id=pad_id,
        max_length=max_length,
        begun=[one.begun for one in started],
        watch=partial(Quota, num_wanted),
    )
    context = min(max_length, role.shape.max_position_embeddings)
    lengths, finished = everything.lengths.tolist(), everything.finished.tolist()
    drawn = [end - len(one.prompt) - len(one.begun.tokens) for end, one in zip(lengths, started, strict=True)]

    def has_ended(b: int) -> bool:
        prompt_length = len(started[b].prompt)
        return finished[b] or lengths[b] >= min(context, prompt_length + sampling.max_new_tokens)

    order = sorted(range(len(started)), key=lambda b: (drawn[b], not has_ended(b), b))
    first, rest = sorted(order[:num_wanted]), sorted(order[num_wanted:])
    rollout = take_rows(everything, torch.tensor(first, device=role.device))
    num_carried = sum(len(started[b].begun.tokens) for b in first)
    ages = [step - started[b].first_step for b in first]
    metrics = {
        "response_age_mean": sum(ages) / num_wanted,
        "response_age_max": float(max(ages)),
        "carried_tokens": num_carried / max(1, int(rollout.response_mask.sum())),
        "tokens_drawn_max": float(max(drawn[b] for b in first)),
    }
    return FirstToEnd(rollout, tuple(_as_far_as(everything, b, started[b]) for b in rest), metrics)


def _as_far_as(everything: Rollout, b: int, one: Started) -> Started:
    """A response as far as the rollout has it."""
    start, end = len(one.prompt), int(everything.lengths[b])
    tokens, logprobs = everything.tokens[b, start:end], everything.sampling_logprobs[b, start - 1 : end - 1]
    return replace(one, begun=Begun(tuple(tokens.tolist()), tuple(logprobs.tolist()), bool(everything.finished[b])))
