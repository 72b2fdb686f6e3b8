"""A run whose policy runs away goes back to its last healthy checkpoint, bit for bit, and on as one that was resumed
from there with the tighter constraint. One process, the tests' tiny models.
"""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ppomax.engine import train_ppo
from ppomax.engine.config import RunConfig
from ppomax.engine.config_checks import impossible_combinations
from ppomax.engine.errors import DivergedError

LR = 1e-3
# The KL of this run is 0, 0.17, 0.36 at steps 1 to 3: step 2 is calm, step 3 is an alarm. Other detectors are off.
MONITOR = {
    "action": "off",
    "actions": {"kl_runaway": "rollback"},
    "limits": {"kl": 0.3},
    **{"baseline": 1, "window": 1, "confirm": 1, "kl_factor": 2.0, "lr_factor": 0.25},
}


def tensors(trained: dict[str, Any]) -> dict[str, Tensor]:
    """Copies of all weights, moments and step counts."""
    found = {}
    for name, role in trained.items():
        for number, chunk in enumerate(role.chunks):
            found |= {f"{name} {number} {key}": x.detach().clone() for key, x in chunk.named_parameters()}
        for number, shard in enumerate(role.optimizer.shards):
            for kind in ("params", "exp_avg", "exp_avg_sq"):
                found[f"{name} {kind} {number}"] = getattr(shard, kind).detach().clone()
        steps = [group["step"] for group in role.optimizer.param_groups]
        found[f"{name} steps"] = torch.tensor(steps)
    return found


def records(output: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: x for key, x in row.items() if key != "seconds"} for row in rows if row["kind"] == kind]


def weights(output: Path) -> dict[str, Tensor]:
    files = sorted(output.glob("*hf/*.safetensors"))
    return {f"{file.parent.name} {name}": x for file in files for name, x in load_file(file).items()}


@pytest.fixture(scope="module")
def rolled_back(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of three iterations that goes back to step 1, and what it held at its checkpoints and after going back."""
    output = tmp_path_factory.mktemp("rollback") / "run"
    seen: dict[str, Any] = {"output": output, "saved": {}}

    def end_step(original: Callable) -> Callable:
        def wrapper(session: Any, step: int, trained: Any, state: Any, counter: Any) -> None:
            original(session, step, trained, state, counter)
            seen["saved"].setdefault(step, (tensors(trained), json.loads(json.dumps(state))))

        return wrapper

    def roll_back(original: Callable) -> Callable:
        def wrapper(session: Any, trained: Any, state: Any, counter: Any) -> Any:
            copy = output.parent / "step_00000001"
            shutil.copytree(output / "checkpoints" / copy.name, copy)
            found = original(session, trained, state, counter)
            seen["after"] = tensors(trained), found, counter.step
            seen["folders"] = sorted(path.name for path in (output / "checkpoints").glob("step_*"))
            return found

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_ppo, "end_step", end_step(train_ppo.end_step))
        patch.setattr(train_ppo, "_roll_back", roll_back(train_ppo._roll_back))
        overrides = {"train": {"steps": 3}, "checkpoint": {"every": 1, "keep": 1}, "monitor": MONITOR}
        train_ppo.run(RunConfig.model_validate(tiny.config("ppo", output, **overrides)))
    return seen


def test_a_rollback_brings_back_every_bit_of_the_healthy_checkpoint(rolled_back: dict[str, Any]) -> None:
    expected, state = rolled_back["saved"][1]
    found, after, optimizer_step = rolled_back["after"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    assert optimizer_step == state["optimizer_step"]
    # All of the state too, but for the tighter constraint and the mark that this checkpoint is healthy.
    restored = json.loads(json.dumps(after.to_json()))
    changed = {name for name in state if restored[name] != state[name]}
    assert changed == {"constraint", "monitor"}
    assert restored["constraint"] == {"kl_factor": 2.0, "min_kl_coef": 0.05, "lr_factor": 0.25, "num_rollbacks": 1}
    assert {name for name in state["monitor"] if restored["monitor"][name] != state["monitor"][name]} == {
        "healthy_step",
        "candidate_step",
    }
    # Between the two the weights had moved.
    assert not all(torch.equal(rolled_back["saved"][2][0][name], x) for name, x in expected.items())


def test_what_follows_is_a_run_resumed_with_the_tighter_constraint(
    rolled_back: dict[str, Any], tiny: Any, tmp_path: Path
) -> None:
    output = rolled_back["output"]
    optim = {"lr": LR * 0.25, "critic_lr": LR * 0.25}
    checkpoint = rolled_back["output"].parent / "step_00000001"
    config = tiny.config(
        "ppo",
        tmp_path / "run",
        train={"steps": 3, "resume": str(checkpoint)},
        monitor={"action": "off"},
        ppo={"kl_coef": 0.2},
        optim=optim,
    )
    train_ppo.run(RunConfig.model_validate(config))
    assert records(output, "ppo")[-2:] == records(tmp_path / "run", "ppo")
    ours, theirs = weights(output), weights(tmp_path / "run")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


def test_the_records_tell_what_happened(rolled_back: dict[str, Any]) -> None:
    output = rolled_back["output"]
    assert [(row["step"], row["kl_coef"], row["learning_rate"]) for row in records(output, "ppo")] == [
        *[(1, 0.1, LR), (2, 0.1, LR), (3, 0.1, LR)],
        *[(2, 0.2, LR * 0.25), (3, 0.2, LR * 0.25)],
    ]
    (event,) = records(output, "event")
    assert (event["step"], event["detector"], event["action"]) == (3, "kl_runaway", "rollback")
    assert len(event["samples"]) == 3
    (back,) = records(output, "rollback")
    assert (back["step"], back["from_step"], back["constraint"]["kl_factor"]) == (1, 3, 2.0)
    kl = [row["kl"] for row in records(output, "ppo")]
    assert kl[3] == kl[1]  # the same weights, the same noise
    assert kl[4] < 0.3 < kl[2]


class Killed(Exception):
    """Stands for the end of a process."""


def run_until(config: dict[str, Any], num_updates: int) -> None:
    """The run, which ends in its update number num_updates + 1."""
    with pytest.MonkeyPatch.context() as patch:
        calls, update = itertools.count(), train_ppo.update

        def killing(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == num_updates:
                raise Killed
            return update(*args, **kwargs)

        patch.setattr(train_ppo, "update", killing)
        with pytest.raises(Killed):
            train_ppo.run(RunConfig.model_validate(config))


@pytest.mark.parametrize(
    "num_updates",
    [pytest.param(3, id="before the next checkpoint"), pytest.param(4, id="after it", marks=pytest.mark.slow)],
)
def test_a_run_killed_after_a_rollback_goes_on_with_the_tighter_constraint(
    num_updates: int, rolled_back: dict[str, Any], tiny: Any, tmp_path: Path
) -> None:
    """What came before the rollback is not done again, and its records stay."""
    output, whole = tmp_path / "run", rolled_back["output"]
    train = {"steps": 3, "resume": "auto"}
    checkpoint = {"every": 1, "keep": 1, "asynchronous": False}
    config = tiny.config("ppo", output, train=train, checkpoint=checkpoint, monitor=MONITOR)
    run_until(config, num_updates)
    train_ppo.run(RunConfig.model_validate(config))
    for kind in ("ppo", "event", "rollback"):
        assert records(output, kind) == records(whole, kind)
    ours, theirs = weights(output), weights(whole)
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
    again = [json.loads(line)["step"] for line in (output / "timing.jsonl").read_text().splitlines()]
    assert again == ([1, 2, 3] if num_updates == 3 else [1, 2, 2, 3])


def test_the_healthy_checkpoint_is_kept_and_later_ones_are_set_aside(rolled_back: dict[str, Any]) -> None:
    """checkpoint.keep is 1: without protection step 1 had gone when step 2 was written."""
    assert rolled_back["folders"] == ["step_00000001", "step_00000002.superseded-1"]


def test_a_run_that_the_monitor_stops_names_the_healthy_checkpoint(tiny: Any, tmp_path: Path) -> None:
    overrides = {
        "train": {"steps": 3},
        "checkpoint": {"every": 1},
        "monitor": {**MONITOR, "actions": {"kl_runaway": "stop"}},
    }
    with pytest.raises(DivergedError) as caught:
        train_ppo.run(RunConfig.model_validate(tiny.config("ppo", tmp_path / "run", **overrides)))
    healthy = tmp_path / "run/checkpoints/step_00000001"
    assert f"Last healthy checkpoint: {healthy}; resume from it" in str(caught.value)
    assert "at step 3: the policy runs away from the reference: kl 0.3" in str(caught.value)
    assert (healthy / "state.json").is_file()
    assert caught.value.exit_code == 6


def test_a_rollback_without_checkpoints_is_refused_at_once(tiny: Any, tmp_path: Path) -> None:
    config = RunConfig.model_validate(tiny.config("ppo", tmp_path / "run", monitor=MONITOR))
    assert [fault for fault in impossible_combinations(config, "ppo") if "rollback" in fault]
    saving = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"every": 5})})
    assert impossible_combinations(saving, "ppo") == []


def test_more_penalty_is_applied_from_the_next_iteration_on(tiny: Any, tmp_path: Path) -> None:
    monitor = {**MONITOR, "actions": {"kl_runaway": "raise_kl"}, "limits": {"kl": 0.1}}
    train_ppo.run(RunConfig.model_validate(tiny.config("ppo", tmp_path / "run", train={"steps": 3}, monitor=monitor)))
    assert [row["kl_coef"] for row in records(tmp_path / "run", "ppo")] == [0.1, 0.1, 0.2]


@pytest.mark.slow
def test_a_penalty_that_was_raised_after_the_last_checkpoint_is_raised_again(tiny: Any, tmp_path: Path) -> None:
    """A resumed run does the same steps again, so the same alarm sounds."""
    monitor = {**MONITOR, "actions": {"kl_runaway": "raise_kl"}, "limits": {"kl": 0.3}}
    for name in ("whole", "killed"):
        train = {"steps": 4, "resume": "auto"}
        config = tiny.config("ppo", tmp_path / name, train=train, checkpoint={"every": 2}, monitor=monitor)
        if name == "killed":
            run_until(config, 3)
            assert records(tmp_path / name, "event")[-1]["step"] == 3
        train_ppo.run(RunConfig.model_validate(config))
    whole, killed = (records(tmp_path / name, "ppo") for name in ("whole", "killed"))
    assert [row["kl_coef"] for row in whole] == [0.1, 0.1, 0.1, 0.2]
    assert killed == whole
    assert records(tmp_path / "killed", "event") == records(tmp_path / "whole", "event")
