"""The reward of a rollout: a weighted sum of the reward model, the process model, functions and services
(ppo.rewards).

Each row gives one number for a response (an outcome, given at the last token) or one for each step (given at the last
token of the step). Models have scored before, on their own ranks (scoring.py); functions and services run here, on the
first rank of the run, and their numbers go to all. What the numbers become in PPO (moments, scaling, clipping) is left
to ppo/rewards.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ppomax.engine.config import RunConfig
from ppomax.engine.config_ppo import RewardSource
from ppomax.engine.data.chat import Template
from ppomax.engine.data.datasets import PromptRow
from ppomax.engine.data.response_steps import step_ends, step_texts
from ppomax.engine.errors import DataError, RewardError
from ppomax.engine.parallel.collectives import give_from_first_rank, raise_on_all
from ppomax.engine.ppo.types import Rewards, Rollout
from ppomax.engine.rewards.functions import Response, RewardFunction, call, make_function
from ppomax.engine.rewards.remote import remote_function

BY_MODELS = ("model", "process")


@dataclass(frozen=True)
class RewardMix:
    """The rows of ppo.rewards at work. functions: by label, on the first rank alone. rows: data rows by prompt."""

    sources: tuple[RewardSource, ...]
    functions: Mapping[str, RewardFunction]
    template: Template
    delimiter: str
    rows: Mapping[tuple[int, ...], PromptRow]

    @property
    def is_per_step(self) -> bool:
        return any(source.is_per_step for source in self.sources)

    def step_ends(self, rollout: Rollout) -> Tensor:
        """[B, T] bool: True where tokens[:, t + 1] is the last token of a step. The same on every rank."""
        is_end = torch.zeros(rollout.response_mask.shape, dtype=torch.bool)
        for b, (start, response) in enumerate(_responses(rollout)):
            ends = step_ends(response, self.template, self.delimiter)
            is_end[b, [start + end - 1 for end in ends]] = True
        return is_end.to(rollout.response_mask.device)

    def apply(self, rollout: Rollout, model_scores: Tensor, process_values: Tensor | None) -> Rewards:
        """model_scores [B]: of the reward model. process_values [B, T]: of the process model, 0 where no step ends.

        Every rank of the run must call it: the first one calls functions and services. Raises RewardError or
        ServiceError there where one fails, PeerFailedError elsewhere.
        """
        is_end = self.step_ends(rollout) if self.is_per_step else None
        values: dict[str, Tensor] = {}
        for source in self.sources:
            if source.kind == "model":
                values[source.label] = model_scores
            elif source.kind == "process":
                assert process_values is not None
                values[source.label] = process_values
        values |= self._of_functions(rollout, is_end)
        scores, steps = torch.zeros_like(model_scores), torch.zeros_like(rollout.sampling_logprobs)
        for source in self.sources:
            total = steps if source.is_per_step else scores
            total += source.weight * values[source.label]
        ordered = {source.label: values[source.label] for source in self.sources}
        return Rewards(scores, None if is_end is None else steps, ordered, is_end)

    def _of_functions(self, rollout: Rollout, is_end: Tensor | None) -> dict[str, Tensor]:
        called = [source for source in self.sources if source.kind not in BY_MODELS]
        if not called:
            return {}
        device, shape = rollout.tokens.device, rollout.response_mask.shape
        values = {s.label: torch.zeros(shape if s.is_per_step else shape[:1], device=device) for s in called}
        with raise_on_all(RewardError, "rewards of ppo.rewards"):
            if dist.get_rank() == 0:
                responses = self.responses(rollout)
                for source in called:
                    found = call(self.functions[source.label], source, responses)
                    flat = torch.tensor([x for row in found for x in row], device=device)
                    if source.is_per_step:
                        values[source.label][is_end] = flat
                    else:
                        values[source.label] = flat
        for tensor in values.values():
            give_from_first_rank(tensor)
        return values

    def responses(self, rollout: Rollout) -> list[Response]:
        """What functions see of a rollout."""
        prompts = [tuple(prompt) for prompt in _prompts(rollout)]
        found = []
        finished = rollout.finished.tolist()
        for b, (_, response) in enumerate(_responses(rollout)):
            row = self.rows.get(prompts[b])
            if row is None:
                raise DataError(
                    f"response {b} goes on from a prompt that the data do not have: it was carried over from a "
                    "checkpoint of other data; resume with the data of that run"
                )
            text = self.template.decode_response(response)
            steps = tuple(step_texts(response, self.template, self.delimiter)) if self.is_per_step else ()
            found.append(Response(row.turns, text, row.answer, len(response), finished[b], steps))
        return found


def make_mix(config: RunConfig, template: Template, rows: Iterable[PromptRow]) -> RewardMix | None:
    """The rewards of a stage, or None where they are the reward model's scores alone. rows: all that it may sample for.

    Raises ConfigError for a function or service that cannot be used, DataError where a reward needs answers that rows
    lack. Collective over the world: functions are imported on the first rank.
    """
    sources = config.rewards
    if [(source.kind, source.weight) for source in sources] == [("model", 1.0)]:
        return None
    by_prompt: dict[tuple[int, ...], PromptRow] = {}
    for row in rows:
        other = by_prompt.setdefault(row.tokens, row)
        if other.answer != row.answer:
            raise DataError(
                f"the prompt of line {row.line} is that of line {other.line}, but their answers differ; a response "
                "could not be told which one it is for: remove one of the rows"
            )
    for source in sources:
        lacking = next((row for row in by_prompt.values() if not row.answer), None)
        if source.kind == "math" and lacking is not None:
            raise DataError(
                f'the reward {source.label!r} of ppo.rewards compares with "answer", which the row in line '
                f"{lacking.line} of the prompts lacks; give every row one"
            )
    functions: dict[str, RewardFunction] = {}
    with raise_on_all(RewardError, "functions of ppo.rewards"):
        if dist.get_rank() == 0:
            for source in sources:
                if source.kind == "http":
                    functions[source.label] = remote_function(source)
                elif source.kind not in BY_MODELS:
                    functions[source.label] = make_function(source)
    return RewardMix(sources, functions, template, config.data.step_delimiter, by_prompt)


def _responses(rollout: Rollout) -> Iterable[tuple[int, list[int]]]:
    """(prompt length, tokens of the response with EOS) of each row."""
    starts, lengths, tokens = (x.tolist() for x in (rollout.prompt_lengths, rollout.lengths, rollout.tokens))
    return [(start, row[start:length]) for start, length, row in zip(starts, lengths, tokens, strict=True)]


def _prompts(rollout: Rollout) -> Sequence[list[int]]:
    tokens = rollout.tokens.tolist()
    return [row[:start] for row, start in zip(tokens, rollout.prompt_lengths.tolist(), strict=True)]
