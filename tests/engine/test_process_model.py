"""A process model keeps the step delimiter that it has learned, and is used with no other one."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from ppomax.engine import train_ppo, train_reward
from ppomax.engine.config import RunConfig
from ppomax.engine.conversion import hf_to_megatron, megatron_to_hf
from ppomax.engine.errors import CheckpointError, ConfigError
from ppomax.engine.models.megatron_names import Split
from ppomax.engine.models.process_model import with_learned_delimiter

DELIMITER = "b"
"""A letter that the tests' policy likes."""


def learned(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text()).get("step_delimiter")


@pytest.fixture(scope="module")
def run(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a step of process-model training."""
    output = tmp_path_factory.mktemp("process") / "run"
    data = output.parent / "steps.jsonl"
    data.write_text(json.dumps({"prompt": "q", "steps": ["a", "c"], "labels": [1, -1]}) + "\n")
    config = tiny.config(
        "reward",
        output,
        reward={"labels": "steps"},
        data={"train": str(data), "eval": (), "step_delimiter": DELIMITER},
        train={"steps": 1},
        checkpoint={"every": 1, "hf": True},
    )
    train_reward.run(RunConfig.model_validate(config))
    return output


def using(folder: Path, **data: str) -> RunConfig:
    rewards = [{"kind": "process"}]
    return RunConfig.model_validate({"model": {"process": str(folder)}, "ppo": {"rewards": rewards}, "data": data})


def test_every_folder_of_the_model_says_its_delimiter(run: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoints/step_00000001"
    assert learned(run / "hf") == learned(checkpoint / "hf/reward") == DELIMITER
    hf_to_megatron(str(run / "hf"), str(tmp_path / "megatron"), split=Split())
    megatron_to_hf(str(tmp_path / "megatron"), str(tmp_path / "back"))
    megatron_to_hf(str(checkpoint), str(tmp_path / "of_checkpoint"))
    assert [learned(tmp_path / name) for name in ("megatron", "back", "of_checkpoint")] == [DELIMITER] * 3


def test_other_models_have_none(run: Path, tiny: Any, tmp_path: Path) -> None:
    hf_to_megatron(tiny.model("reward"), str(tmp_path / "megatron"), split=Split())
    assert learned(tmp_path / "megatron") is None


def test_it_is_the_default_and_no_other_one_is_taken(run: Path) -> None:
    folder = run / "hf"
    assert with_learned_delimiter(using(folder), str(folder)).data.step_delimiter == DELIMITER
    assert with_learned_delimiter(using(folder, step_delimiter=DELIMITER), str(folder)).data.step_delimiter == DELIMITER
    # The default counts as another one where it is asked for.
    with pytest.raises(
        ConfigError, match=r"data\.step_delimiter is '\\n\\n', but the process model .*hf learned .* 'b'"
    ):
        with_learned_delimiter(using(folder, step_delimiter="\n\n"), str(folder))


def test_a_model_of_somebody_else_is_used_as_configured(tiny: Any) -> None:
    folder = tiny.model("reward")
    assert with_learned_delimiter(using(folder, step_delimiter="|"), folder).data.step_delimiter == "|"
    assert with_learned_delimiter(using(folder), "").data.step_delimiter == "\n\n"


@pytest.mark.parametrize("value", ["", 3])
def test_a_damaged_delimiter_is_named(tmp_path: Path, value: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"step_delimiter": value}))
    with pytest.raises(CheckpointError, match=r"config\.json: step_delimiter is .*, expected text"):
        with_learned_delimiter(using(tmp_path), str(tmp_path))


def test_ppo_rewards_steps_that_end_where_the_model_has_learned_it(run: Path, tiny: Any, tmp_path: Path) -> None:
    sections = tiny.config("ppo", tmp_path / "run", train={"steps": 1})
    sections["model"]["process"] = str(run / "hf")
    sections["ppo"] |= {"rewards": [{"kind": "process"}]}
    train_ppo.run(RunConfig.model_validate(sections))
    (record,) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert record["response_steps"] > record["finished"]  # more than the end of each response that has one
    resolved = tomllib.loads((tmp_path / "run/config.toml").read_text())
    assert resolved["data"]["step_delimiter"] == DELIMITER
    # As a resume reads it.
    assert with_learned_delimiter(using(run / "hf", **resolved["data"] | {"train": ()}), str(run / "hf"))
    sections["data"]["step_delimiter"] = " "
    with pytest.raises(ConfigError, match="learned to judge steps that end with 'b'"):
        train_ppo.run(RunConfig.model_validate(sections))
