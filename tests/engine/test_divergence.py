"""Numbers that are not finite reach neither weights nor optimizer, reward moments, KL coefficient or a checkpoint."""

import json
import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ppomax.engine import steps
from ppomax.engine.config import RunConfig
from ppomax.engine.errors import DivergedError
from ppomax.engine.models.distributed_checkpoint import DistributedCheckpoint, has_layers
from ppomax.engine.models.roles import Role
from ppomax.engine.ppo import scoring

ADAPTIVE = {"kl_controller": "adaptive", "kl_horizon": 100, "reward_scaling": "norm"}
CHECKPOINTS = {"every": 1, "keep": 10}


def run(stage: str, config: dict[str, Any]) -> None:
    import_module(f"ppomax.engine.train_{stage}").run(RunConfig.model_validate(config))


def checkpoint(output: Path, step: int) -> Path:
    return output / "checkpoints" / f"step_{step:08d}"


def tensors(path: Path) -> dict[str, bytes]:
    """Every byte of weights, main weights and moments that a checkpoint holds, under the names that it gives them."""
    found = {}
    for role in sorted(child.name for child in path.iterdir() if child.is_dir()):
        stored = DistributedCheckpoint(path / role)
        for name, tensor in stored.tensors.items():
            layers = [stored.read(name, layer) for layer in range(tensor.size[0] if has_layers(name) else 1)]
            found[f"{role} {name}"] = b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in layers)
    assert found
    return found


def state(path: Path) -> dict[str, Any]:
    return json.loads((path / "state.json").read_text())["state"]


def records(output: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


@pytest.fixture
def poison_gradient(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str, float], None]:
    """poison_gradient(2, "critic", nan): an entry of the critic's gradient is nan in step 2; no loss is."""

    def arrange(step: int, name: str, value: float) -> None:
        clip_and_step = steps.clip_and_step
        calls = iter(range(1, 1000))

        def poisoned(optimizers: Any, *args: Any, **kwargs: Any) -> Any:
            if next(calls) == step:
                optimizer = optimizers[-1] if name == "critic" else optimizers[0]
                optimizer.shards[0].grads[7] = value
            return clip_and_step(optimizers, *args, **kwargs)

        monkeypatch.setattr(steps, "clip_and_step", poisoned)

    return arrange


@pytest.mark.parametrize(
    ("stage", "role", "value", "dtype", "joint"),
    [
        pytest.param("sft", "policy", math.nan, "bf16", True, marks=pytest.mark.slow),
        pytest.param("reward", "reward", math.inf, "fp32", True, marks=pytest.mark.slow),
        ("ppo", "critic", math.nan, "fp32", True),
        pytest.param("ppo", "critic", math.inf, "bf16", False, marks=pytest.mark.slow),
        pytest.param("ppo", "policy", -math.inf, "fp32", False, marks=pytest.mark.slow),
        pytest.param("critic", "critic", math.nan, "bf16", True, marks=pytest.mark.slow),
    ],
)
def test_a_step_with_a_bad_gradient_changes_no_weight_and_no_moment(
    tiny: Any,
    tmp_path: Path,
    poison_gradient: Callable[..., None],
    stage: str,
    role: str,
    value: float,
    dtype: str,
    joint: bool,
) -> None:
    """Of one role: where several train, none of them makes the step."""
    poison_gradient(2, role, value)
    ppo = {"epochs": 1, "rollout_size": 6} if stage in ("critic", "ppo") else {}
    config = tiny.config(
        stage,
        tmp_path / "run",
        train={"steps": 3},
        data={"eval": ()},
        checkpoint=CHECKPOINTS,
        ppo=ppo,
        optim={"joint_grad_clip": joint},
    )
    config["model"]["dtype"] = dtype
    run(stage, config)
    one, two, three = (tensors(checkpoint(tmp_path / "run", step)) for step in (1, 2, 3))
    assert one == two
    assert two != three
    assert [record["skipped_steps"] for record in records(tmp_path / "run", stage)] == [0, 1, 0]


def poison_output(monkeypatch: pytest.MonkeyPatch, name: str, role: str, value: float, iteration: int) -> None:
    """One number that a role computes over the rollout of an iteration."""
    compute = getattr(scoring, name)
    calls = iter(range(1, 1000))

    def poisoned(of: Role, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
        result = compute(of, *args, **kwargs)
        if of.name == role and next(calls) == iteration:
            first = result[0] if isinstance(result, tuple) else result
            first.view(-1)[first.view(-1).nonzero()[0]] = value
        return result

    monkeypatch.setattr(scoring, name, poisoned)
    if name == "token_logprobs":
        from ppomax.engine.ppo import experience

        monkeypatch.setattr(experience, name, poisoned)


@pytest.mark.parametrize(
    ("function", "role", "value", "what"),
    [
        ("sequence_scores", "reward", math.nan, "a score of the reward model"),
        pytest.param("sequence_scores", "reward", math.inf, "a score of the reward model", marks=pytest.mark.slow),
        pytest.param("token_values", "critic", math.inf, "a value of the critic", marks=pytest.mark.slow),
        pytest.param("token_logprobs", "policy", -math.inf, "a log-prob of the policy", marks=pytest.mark.slow),
        pytest.param("token_logprobs", "reference", math.nan, "a log-prob of the reference", marks=pytest.mark.slow),
    ],
)
def test_a_rollout_with_one_bad_number_is_skipped_and_leaves_no_trace(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, role: str, value: float, what: str
) -> None:
    poison_output(monkeypatch, function, role, value, iteration=2)
    output = tmp_path / "run"
    ppo = {"rollout_size": 6, "epochs": 2, "minibatch_size": 3, **ADAPTIVE}
    settings = {"ppo": ppo, "checkpoint": CHECKPOINTS}
    run("ppo", tiny.config("ppo", output, train={"steps": 3}, **settings))
    before, after = state(checkpoint(output, 1)), state(checkpoint(output, 2))
    assert tensors(checkpoint(output, 1)) == tensors(checkpoint(output, 2))
    assert tensors(checkpoint(output, 2)) != tensors(checkpoint(output, 3))
    assert (after["scaler"], after["kl"]) == (before["scaler"], before["kl"])
    assert after["optimizer_step"] == before["optimizer_step"] + 4
    assert (before["skipped"], after["skipped"], state(checkpoint(output, 3))["skipped"]) == (0, 1, 0)
    assert state(checkpoint(output, 3))["kl"] != before["kl"]
    found = records(output, "ppo")
    assert [record["skipped_rollouts"] for record in found] == [0, 1, 0]
    assert [record["optimizer_steps"] for record in found] == [4, 0, 4]
    assert all(math.isfinite(record["reward_running_std"]) for record in found)
    poison_output(monkeypatch, function, role, value, iteration=1)
    resumed = {"steps": 4, "resume": str(checkpoint(output, 3)), "max_skipped_steps": 0}
    config = tiny.config("ppo", tmp_path / "resumed", train=resumed, **settings)
    with pytest.raises(DivergedError, match=rf"optimizer step 13: the rollout before it has {what} that is not finite"):
        run("ppo", config)


@pytest.mark.slow
def test_a_critic_does_not_learn_from_a_bad_rollout(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison_output(monkeypatch, "sequence_scores", "reward", math.nan, iteration=2)
    settings = {"ppo": {"rollout_size": 6, "epochs": 1, "minibatch_size": 3}, "checkpoint": CHECKPOINTS}
    run("critic", tiny.config("critic", tmp_path / "run", train={"steps": 3}, **settings))
    one, two, three = (checkpoint(tmp_path / "run", step) for step in (1, 2, 3))
    assert tensors(one) == tensors(two)
    assert tensors(two) != tensors(three)
    assert state(one)["scaler"] == state(two)["scaler"]
    assert state(three)["scaler"]["count"] == 12
    assert [state(path)["skipped"] for path in (one, two, three)] == [0, 1, 0]


def test_weights_that_are_not_finite_are_never_written(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip_and_step = steps.clip_and_step

    def overflow(optimizers: Any, *args: Any, **kwargs: Any) -> Any:
        norms = clip_and_step(optimizers, *args, **kwargs)
        optimizers[0].shards[0].params[3] = math.inf
        return norms

    monkeypatch.setattr(steps, "clip_and_step", overflow)
    config = tiny.config("sft", tmp_path / "run", checkpoint={"every": 1}, data={"eval": ()})
    with pytest.raises(DivergedError, match=r"optimizer step 1: .* that are not finite; no checkpoint is written"):
        run("sft", config)
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))
