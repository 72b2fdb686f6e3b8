"""Reward functions: what they see of a response, those that come with ppomax, and the user's own.

One interface: a function takes the responses of a rollout and returns a number for each, or, for rewards per step, a
list of numbers, one per step. What it returns is checked here: right count, finite.
"""

import importlib
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ppomax.engine.config_ppo import RewardSource
from ppomax.engine.data.readers import Turns
from ppomax.engine.errors import ConfigError, PpomaxError, RewardError
from ppomax.engine.rewards.answers import final_answer, same_answer

LARGEST = 3e38
"""Nearly the largest number of float32."""


@dataclass(frozen=True)
class Response:
    """One sampled response. prompt: the turns before it. text: without EOS. answer: the reference of its data row, ""
    where there is none. num_tokens: with EOS. finished: it ended by EOS. steps: texts of its complete steps, split at
    data.step_delimiter.
    """

    prompt: Turns
    text: str
    answer: str
    num_tokens: int
    finished: bool
    steps: tuple[str, ...]


RewardFunction = Callable[[Sequence[Response]], Any]
"""Responses -> a number for each, or a list of numbers for each, as long as its steps."""


def make_function(source: RewardSource) -> RewardFunction:
    """The function of a row of ppo.rewards of the kinds math, regex, length and function.

    Raises ConfigError where a user's function cannot be imported. Importing runs the module.
    """
    if source.kind == "math":
        return math_rewards
    if source.kind == "regex":
        return partial(regex_rewards, pattern=re.compile(source.pattern, re.DOTALL), per_step=source.per_step)
    if source.kind == "length":
        return partial(length_rewards, shortest=source.min_tokens, longest=source.max_tokens or math.inf)
    return _imported(source)


def math_rewards(responses: Sequence[Response]) -> list[float]:
    """1 where the response comes to the row's answer (answers.py), else 0."""
    return [float(same_answer(final_answer(r.text), r.answer)) for r in responses]


def regex_rewards(
    responses: Sequence[Response], *, pattern: re.Pattern[str], per_step: bool
) -> list[float] | list[list[float]]:
    """1 where the pattern is found in the response, or in the step, else 0."""
    if per_step:
        return [[float(pattern.search(step) is not None) for step in r.steps] for r in responses]
    return [float(pattern.search(r.text) is not None) for r in responses]


def length_rewards(responses: Sequence[Response], *, shortest: int, longest: float) -> list[float]:
    """Minus the number of tokens by which the response is shorter or longer than it may be."""
    return [-float(max(shortest - r.num_tokens, r.num_tokens - longest, 0)) for r in responses]


def call(function: RewardFunction, source: RewardSource, responses: Sequence[Response]) -> list[list[float]]:
    """What the function says about each response: one number, or one per step. Raises RewardError, which names the row
    of ppo.rewards and the response, for an exception of the function, a wrong count and a number that is not finite.
    """
    name = f"the reward {source.label!r} of ppo.rewards"
    try:
        values = function(responses)
    except PpomaxError:
        raise
    except Exception as error:
        raise RewardError(f"{name} failed: {type(error).__name__}: {error}") from error
    rows = _listed(values, name, f"{len(responses)} values, one per response", len(responses))
    if not source.is_per_step:
        return [[_finite(value, f"{name}, response {b}")] for b, value in enumerate(rows)]
    checked = []
    for b, (row, response) in enumerate(zip(rows, responses, strict=True)):
        count = len(response.steps)
        steps = _listed(row, f"{name}, response {b}", f"{count} values, one per step", count)
        checked.append([_finite(value, f"{name}, response {b}, step {s}") for s, value in enumerate(steps)])
    return checked


def _listed(values: Any, where: str, expected: str, count: int) -> list[Any]:
    if isinstance(values, str | bytes | dict):
        raise RewardError(f"{where}: it returned {type(values).__name__}, expected {expected}")
    try:
        found = list(values)
    except TypeError:
        raise RewardError(f"{where}: it returned {type(values).__name__}, expected {expected}") from None
    if len(found) != count:
        raise RewardError(f"{where}: it returned {len(found)} values, expected {expected}")
    return found


def _finite(value: Any, where: str) -> float:
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not abs(number) <= LARGEST:
        raise RewardError(f"{where}: {str(value)[:60]!r} is no finite number of float32")
    return number


def _imported(source: RewardSource) -> RewardFunction:
    module_name, _, name = source.path.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # torchrun -m and the command ppomax do not look there
    try:
        function = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # whatever the user's module raises
        raise ConfigError(
            f"the reward {source.label!r} of ppo.rewards: {source.path} cannot be imported: "
            f"{type(error).__name__}: {error}; modules are looked for in {Path.cwd()} and in the environment"
        ) from error
    if not callable(function):
        raise ConfigError(f"the reward {source.label!r} of ppo.rewards: {source.path} is no function")
    return function
