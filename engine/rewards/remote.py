"""A reward model behind HTTP: responses go out in batches, numbers come back.

A request is a POST of {"responses": [{"prompt", "response", "answer", "finished", "steps"}, ...]}, its answer
{"rewards": [...]}: a number for each response, or a list of numbers for each, one per step. Deadlines, retries and keys
are the matter of service.py, the check of the numbers that of functions.py.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from ppomax.engine.config_ppo import RewardSource
from ppomax.engine.errors import RewardError
from ppomax.engine.rewards.functions import Response, RewardFunction
from ppomax.engine.service import RequestRefusedError, Service, ServiceConfig


def remote_function(source: RewardSource) -> RewardFunction:
    """The function of a row of the kind http. Raises ConfigError for an address or a key that cannot be used."""
    config = ServiceConfig(
        source.url, source.key_variable, timeout_seconds=source.timeout_seconds, retries=source.retries
    )
    return partial(_ask_in_batches, Service(config), source)


def _ask_in_batches(service: Service, source: RewardSource, responses: Sequence[Response]) -> list[Any]:
    rewards: list[Any] = []
    for start in range(0, len(responses), source.batch_size):
        rewards += _ask(service, source, responses[start : start + source.batch_size])
    return rewards


def _ask(service: Service, source: RewardSource, responses: Sequence[Response]) -> list[Any]:
    where = f"the reward {source.label!r} of ppo.rewards at {source.url}"
    try:
        answer = service.post("", {"responses": [_as_json(response) for response in responses]})
    except RequestRefusedError as error:
        raise RewardError(f"{where} refuses a request: {error}") from None
    rewards = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(rewards, list) or len(rewards) != len(responses):
        count = f"{len(rewards)} values" if isinstance(rewards, list) else "no list"
        raise RewardError(
            f'{where}: its answer has {count} under "rewards"; expected {len(responses)}, one per response sent'
        )
    return rewards


def _as_json(response: Response) -> dict[str, Any]:
    return {
        "prompt": [{"role": turn.role, "text": turn.text} for turn in response.prompt],
        "response": response.text,
        "answer": response.answer,
        "finished": response.finished,
        "steps": list(response.steps),
    }
