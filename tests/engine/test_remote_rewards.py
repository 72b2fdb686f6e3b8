"""A reward model behind HTTP, here a local server that misbehaves: what goes out, and what is taken for rewards."""

import time
from typing import Any

import pytest

from ppomax.engine.config_ppo import RewardSource
from ppomax.engine.data.chat import Turn
from ppomax.engine.errors import RewardError, ServiceError
from ppomax.engine.rewards.functions import Response, call
from ppomax.engine.rewards.remote import remote_function

RESPONSES = [Response((Turn("human", f"q{i}"),), f"r{i}", str(i), 3, i % 2 == 0, ("s",) * i) for i in range(5)]


def ask(json_service: Any, **settings: Any) -> list[list[float]]:
    source = RewardSource(kind="http", url=json_service.url, **{"batch_size": 2, "timeout_seconds": 2, **settings})
    return call(remote_function(source), source, RESPONSES)


def test_batches_go_out_in_order_and_numbers_come_back(json_service: Any) -> None:
    json_service.answer = lambda number, body: {"rewards": [float(r["answer"]) for r in body["responses"]]}
    assert ask(json_service) == [[0.0], [1.0], [2.0], [3.0], [4.0]]
    assert [len(body["responses"]) for body in json_service.bodies] == [2, 2, 1]
    assert json_service.bodies[1]["responses"][1] == {
        "prompt": [{"role": "human", "text": "q3"}],
        "response": "r3",
        "answer": "3",
        "finished": False,
        "steps": ["s", "s", "s"],
    }


def test_a_service_can_judge_steps(json_service: Any) -> None:
    json_service.answer = lambda number, body: {"rewards": [[1] * len(r["steps"]) for r in body["responses"]]}
    assert ask(json_service, per_step=True) == [[1.0] * i for i in range(5)]


def test_a_passing_fault_is_repeated_and_a_lasting_one_ends_the_run(json_service: Any) -> None:
    answers = [(503, {"Retry-After": "0"}, b""), {"rewards": [1, 2]}]
    json_service.answer = lambda number, body: answers[min(number, 1)]
    with pytest.raises(RewardError, match="2 values"):  # the third batch has one response
        ask(json_service)
    assert len(json_service.bodies) == 4
    json_service.answer = lambda number, body: (500, {}, b"")
    with pytest.raises(ServiceError, match=r"2 attempts.*status 500"):
        ask(json_service, retries=1)


def test_a_service_that_does_not_answer_ends_the_run_in_time(json_service: Any) -> None:
    json_service.answer = lambda number, body: time.sleep(2) or {}
    started = time.monotonic()
    with pytest.raises(ServiceError, match=r"no answer within 0\.2 s"):
        ask(json_service, timeout_seconds=0.2, retries=0)
    assert time.monotonic() - started < 1.5


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ({"rewards": [1]}, 'has 1 values under "rewards"; expected 2'),
        ({"rewards": "12"}, "has no list"),
        ({"scores": [1, 2]}, "has no list"),
        ([1, 2], "has no list"),
        ((200, {}, b'{"rewards": [NaN, 1]}'), "response 0: 'nan' is no finite number"),
        ((200, {}, b'{"rewards": [1e999, 1]}'), "response 0: 'inf'"),
        ({"rewards": ["1", 2]}, "response 0: '1' is no"),
        ({"rewards": [None, 2]}, "response 0: 'None'"),
        ((422, {}, b'{"error": "too long"}'), "refuses a request: status 422, 'too long'"),
    ],
)
def test_what_is_no_reward_ends_the_run(json_service: Any, answer: Any, fault: str) -> None:
    padded = {"rewards": [0.0]}
    json_service.answer = lambda number, body: answer if len(body["responses"]) == 2 else padded
    with pytest.raises(RewardError, match=fault):
        ask(json_service)


def test_the_key_comes_from_the_environment_alone(json_service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_REWARD_KEY", "secret")
    json_service.answer = lambda number, body: {"rewards": [0.0] * len(body["responses"])}
    ask(json_service, key_variable="MY_REWARD_KEY")
    assert {headers["Authorization"] for headers in json_service.headers} == {"Bearer secret"}
