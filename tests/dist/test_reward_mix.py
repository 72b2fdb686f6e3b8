"""Rewards of ppo.rewards in whole runs: models on ranks of their own, functions on the first rank, errors on all."""

import json
import math
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.dist

ON_FIRST, ON_SECOND = {"num_ranks": 1}, {"first_rank": 1}
SPLIT = {"policy": ON_FIRST, "reference": ON_FIRST, "critic": ON_SECOND, "reward": ON_SECOND}
FUNCTIONS = """
def share_of_a(responses):
    return [r.text.count("a") / max(1, len(r.text)) for r in responses]

def step_lengths(responses):
    return [[len(step) for step in r.steps] for r in responses]

def failing(responses):
    return [float("nan")] * len(responses)
"""
MIX = [
    {"kind": "model", "weight": 0.5},
    {"kind": "process", "weight": 0.25},
    {"kind": "function", "path": "mix_functions:share_of_a", "name": "a", "weight": 2.0},
    {"kind": "function", "path": "mix_functions:step_lengths", "name": "lengths", "per_step": True, "weight": -0.1},
    {"kind": "length", "max_tokens": 8},
]


def run(stage: str, config: dict[str, Any], folder: str) -> str:
    """On a worker: the stage; returns the name of the error it ended with, if any."""
    from ppomax.engine.config import RunConfig
    from ppomax.engine.errors import PpomaxError

    sys.path.insert(0, folder)
    try:
        module = "evaluate" if stage == "evaluate" else f"train_{stage}"
        import_module(f"ppomax.engine.{module}").run(RunConfig.model_validate(config))
    except PpomaxError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        sys.path.remove(folder)
    return ""


@pytest.fixture
def configured(tiny: Any, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    (tmp_path / "mix_functions.py").write_text(FUNCTIONS)

    def config(name: str, rewards: list[dict[str, Any]], **overrides: dict[str, Any]) -> dict[str, Any]:
        ppo = {"rollout_size": 8, "minibatch_size": 4, "rewards": rewards, **overrides.pop("ppo", {})}
        sections = tiny.config("ppo", tmp_path / name, ppo=ppo, train={"steps": 2}, **overrides)
        sections["model"]["process"] = tiny.model("critic")
        sections["data"]["step_delimiter"] = "b"
        return sections

    return config


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_mixture_gives_the_same_numbers_with_roles_on_ranks_of_their_own(
    on_ranks: Callable[..., list[Any]], configured: Callable[..., dict[str, Any]], tmp_path: Path, tiny: Any
) -> None:
    held_out = {"eval": tiny.path("prompts.jsonl")}
    options: dict[str, Any] = {"data": held_out | {"train": tiny.path("prompts.jsonl"), "max_length": 160}}
    options["monitor"] = {"eval_size": 4}
    one = configured("one", MIX, **options)
    split = configured("split", MIX, parallel=SPLIT, **options)
    assert on_ranks(1, run, "ppo", one, str(tmp_path)) == [""]
    assert on_ranks(2, run, "ppo", split, str(tmp_path)) == ["", ""]
    expected, found = metrics(tmp_path / "one"), metrics(tmp_path / "split")
    assert len(expected) == len(found) == 4
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert {f"reward/{name}" for name in ("model", "process", "a", "lengths", "length")} < ours.keys()
        for name in ours.keys() - {"seconds", "kind", "reward_histogram"}:
            assert math.isclose(ours[name], theirs[name], rel_tol=1e-4, abs_tol=1e-4), name
    first = expected[1]
    assert first["response_steps"] > 0.2
    assert -1 < first["reward/process"] < 1
    # The total is the weighted sum: outcomes as means over responses, steps as sums over them.
    parts = 0.5 * first["reward/model"] + 2 * first["reward/a"] + first["reward/length"]
    per_step = 0.25 * first["reward/process"] - 0.1 * first["reward/lengths"]
    assert first["reward"] == pytest.approx(parts + per_step * first["response_steps"], abs=1e-4)
    sample = json.loads((tmp_path / "one" / "samples_000000.jsonl").read_text().splitlines()[0])
    assert len(sample["rewards"]["process"]) == len(sample["rewards"]["lengths"])


def test_a_reward_that_fails_ends_every_rank(
    on_ranks: Callable[..., list[Any]], configured: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    rows = [{"kind": "function", "path": "mix_functions:failing"}]
    config = configured("failing", rows, parallel={"reward": ON_SECOND})
    first, second = on_ranks(2, run, "ppo", config, str(tmp_path))
    assert first.startswith("RewardError: the reward 'function' of ppo.rewards, response 0: 'nan'")
    assert second.startswith("PeerFailedError")
    rows[0]["path"] = "mix_functions:missing"
    first, second = on_ranks(2, run, "ppo", configured("missing", rows), str(tmp_path))
    assert first.startswith("ConfigError")
    assert second.startswith("PeerFailedError")


def test_a_run_without_a_reward_model(
    on_ranks: Callable[..., list[Any]], configured: Callable[..., dict[str, Any]], tmp_path: Path, tiny: Any
) -> None:
    """With responses that are carried over: the answer of a response is found by its prompt."""
    rows = [{**json.loads(line), "answer": 1} for line in Path(tiny.path("prompts.jsonl")).read_text().splitlines()]
    unique = {row["prompt"]: row for row in rows}
    (tmp_path / "answered.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unique.values()))
    rewards = [{"kind": "math"}, {"kind": "regex", "pattern": "[ab]", "name": "vowel", "per_step": True}]
    overrides: dict[str, Any] = {"data": {"train": str(tmp_path / "answered.jsonl"), "max_length": 160}}
    config = configured(
        "functions", rewards, ppo={"over_sampling_size": 12, "partial_rollout": True, "critic_init": "sft"}, **overrides
    )
    config["model"] |= {"reward": "", "critic": "", "process": ""}
    assert on_ranks(1, run, "ppo", config, str(tmp_path)) == [""]
    for record in metrics(tmp_path / "functions"):
        assert 0 <= record["reward/math"] <= 1
        assert 0 <= record["reward/vowel"] <= 1
        assert record["response_steps"] > 0
    config["data"]["eval"], config["train"]["output"] = config["data"]["train"], str(tmp_path / "evaluated")
    assert on_ranks(1, run, "evaluate", config, str(tmp_path)) == [""]
    evaluation = json.loads((tmp_path / "evaluated" / "evaluation.json").read_text())
    assert 0 <= evaluation["reward/math"] <= 1
    assert (tmp_path / "functions/critic_hf/config.json").is_file()


def test_one_reward_model_alone_is_the_default(
    on_ranks: Callable[..., list[Any]], configured: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Bit for bit, and without further metrics."""
    names = ("default", "listed")
    for name, rewards in zip(names, ([], [{"kind": "model"}]), strict=True):
        assert on_ranks(1, run, "ppo", configured(name, rewards), str(tmp_path)) == [""]
    default, listed = ([{**r, "seconds": 0} for r in metrics(tmp_path / name)] for name in names)
    assert default == listed
    assert not any("/" in name for record in default for name in record)
    from safetensors.torch import load_file

    ours, theirs = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in names)
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
