"""From alarms to actions: which one wins, what an event shows, how the constraint tightens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ppomax.engine.config import RunConfig
from ppomax.engine.data.tokenizer import load_tokenizer
from ppomax.engine.metrics import RunLog
from ppomax.engine.monitor.actions import Constraint, decide, judge
from ppomax.engine.monitor.state import MonitorState, replay
from ppomax.engine.ppo.types import Rollout, response_mask

RECORDS = [{"step": i + 1, "kl": 0.0 if i < 4 else 0.3, "response_length": 10.0 if i < 4 else 2.0} for i in range(5)]
RESPONSES = {
    "reward": [1.0, 3.0, 2.0],
    "response_length": [3.0, 1.0, 2.0],
    "finished": [1.0, 1.0, 0.0],
    "kl": [0.1, 0.5, 0.4],
    "nll": [1.0, 2.0, 3.0],
    "distinct_4": [1.0, 1.0, 1.0],
    "longest_run": [1.0, 1.0, 1.0],
    "tokens": [5.0, 3.0, 4.0],
}


def config_of(output: Path, **monitor: Any) -> RunConfig:
    settings = {"window": 1, "confirm": 1, "event_samples": 2, **monitor}
    return RunConfig.model_validate({"train": {"output": str(output)}, "monitor": settings})


def judged(tiny: Any, config: RunConfig, *, constraint: Constraint | None = None, healthy: int | None = None) -> Any:
    """The verdict about the last of RECORDS, and the events."""
    tokenizer = load_tokenizer(tiny.model("policy"))
    rows = [tokenizer.encode("KL" + text) for text in ("cde", "<b>", "f")]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    prompts = torch.full_like(lengths, 2)
    mask = response_mask(prompts, lengths, tokens.shape[1] - 1)
    rollout = Rollout(tokens, prompts, lengths, mask, lengths > 0, torch.zeros(mask.shape))
    state, _ = replay(RECORDS[:-1], config.monitor, max_length=512)
    state = MonitorState.from_json({**state.to_json(), "healthy_step": healthy})
    log = RunLog(config, "ppo", is_writer=True, resumed=False)
    verdict = judge(
        state,
        constraint or Constraint(),
        RECORDS[-1],
        config,
        log,
        responses=RESPONSES,
        rollout=rollout,
        tokenizer=tokenizer,
    )
    return verdict, [json.loads(line) for line in (log.folder / "metrics.jsonl").read_text().splitlines()]


def test_an_event_has_the_numbers_and_the_worst_responses(tiny: Any, tmp_path: Path, capsys) -> None:
    verdict, events = judged(tiny, config_of(tmp_path / "run", actions={"length_collapse": "off"}))
    assert verdict.action == "warn"
    (event,) = events
    keys = ["kind", "step", "detector", "severity", "message", "evidence", "samples", "action"]
    assert [*event] == keys
    assert (event["kind"], event["step"], event["detector"], event["action"]) == ("event", 5, "kl_runaway", "warn")
    assert event["evidence"]["now"] == {"kl": 0.3}
    assert event["message"] == verdict.reason == "the policy runs away from the reference: kl 0.3 (was 0)"
    assert [sample["index"] for sample in event["samples"]] == [1, 2]
    assert event["samples"][0]["response"] == "<b>"
    assert event["samples"][0]["kl"] == 0.5
    assert event["samples"][1]["finished"] is False
    assert "monitor, step 5: the policy runs away" in capsys.readouterr().out


def test_the_strongest_action_decides(tiny: Any, tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", actions={"kl_runaway": "raise_kl"})
    verdict, events = judged(tiny, config)
    assert verdict.action == "raise_kl"
    assert {event["detector"]: event["action"] for event in events} == {
        "kl_runaway": "raise_kl",
        "length_collapse": "warn",
    }
    assert decide([], config.monitor) == "off"


@pytest.mark.parametrize(
    ("healthy", "num_rollbacks", "action"), [(2, 0, "rollback"), (None, 0, "stop"), (2, 2, "stop"), (2, 1, "rollback")]
)
def test_a_rollback_needs_a_healthy_checkpoint_and_has_an_end(
    tiny: Any, tmp_path: Path, healthy: int | None, num_rollbacks: int, action: str
) -> None:
    constraint = Constraint(num_rollbacks=num_rollbacks)
    verdict, events = judged(
        tiny, config_of(tmp_path / "run", action="rollback"), constraint=constraint, healthy=healthy
    )
    assert verdict.action == action
    assert {event["action"] for event in events} == {action}


def test_a_constraint_tightens_to_a_limit() -> None:
    config = RunConfig().monitor
    constraint = Constraint()
    assert constraint.kl_coef(0.1, config) == 0.1
    found = []
    for _ in range(5):
        constraint = constraint.raised(config)
        found.append(constraint.kl_coef(0.1, config))
    assert found == pytest.approx([0.2, 0.4, 0.8, 1.0, 1.0])
    assert constraint.kl_coef(3.0, config) == 3.0  # the user's own is never lowered
    assert constraint.lr_factor == 1.0
    assert Constraint().after_rollback(config) == Constraint(2.0, 0.05, 0.5, 1)


def test_a_run_without_a_penalty_gets_one() -> None:
    config = RunConfig().monitor
    once = Constraint().raised(config)
    assert [x.kl_coef(0.0, config) for x in (Constraint(), once, once.raised(config))] == [0.0, 0.05, 0.1]
