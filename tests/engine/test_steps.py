"""Steps that are not finite: skipped while train.max_skipped_steps allows, then the end of the run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ppomax.engine import train_sft
from ppomax.engine.cli import main
from ppomax.engine.config import RunConfig
from ppomax.engine.errors import DivergedError
from ppomax.engine.models.hf_reader import SafetensorsReader
from ppomax.engine.steps import StepCounter


def test_a_counter_skips_as_many_steps_in_a_row_as_allowed() -> None:
    counter = StepCounter(0, 10, max_skipped=2)
    for applied in (True, False, False, True, False, False):
        counter.record(applied=applied, what="loss is nan")
    assert (counter.step, counter.skipped) == (6, 2)
    with pytest.raises(DivergedError, match=r"optimizer step 7: loss is nan \(3 in a row"):
        counter.record(applied=False, what="loss is nan")


def sft_config(tiny: Any, output: Path, **train: Any) -> RunConfig:
    """Four steps of SFT whose learning rate breaks the model in the first."""
    train = {"steps": 4, "max_skipped_steps": 0, **train}
    sections = {"data": {"eval": ()}, "checkpoint": {"every": 1}, "train": train}
    return RunConfig.model_validate(tiny.config("sft", output, optim={"lr": 1e30, "grad_clip": 0.0}, **sections))


def metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_nan_loss_ends_the_run_with_step_and_last_good_checkpoint(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"optimizer step 2: loss is nan .*step_00000001\. Lower"):
        train_sft.run(sft_config(tiny, tmp_path / "run"))
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1]
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["latest", "step_00000001"]


def test_skipped_steps_change_no_weight(tiny: Any, tmp_path: Path) -> None:
    train_sft.run(sft_config(tiny, tmp_path / "one", steps=1))
    train_sft.run(sft_config(tiny, tmp_path / "four", max_skipped_steps=3))
    assert [record["skipped_steps"] for record in metrics(tmp_path / "four")] == [0, 1, 2, 3]
    one, four = (SafetensorsReader(str(tmp_path / name / "hf")) for name in ("one", "four"))
    assert all(torch.equal(one.read(name), four.read(name)) for name in one.sizes)


def test_one_skipped_step_more_than_allowed_ends_the_run(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"optimizer step 4: .* \(3 in a row, train.max_skipped_steps = 2\)"):
        train_sft.run(sft_config(tiny, tmp_path / "run", max_skipped_steps=2))


def test_the_command_ends_with_exit_code_6(tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny.config("sft", tmp_path / "run")
    settings = {
        "model.policy": config["model"]["policy"],
        "data.train": config["data"]["train"],
        "train.output": str(tmp_path / "run"),
        "data.max_length": "160",
        "train.steps": "3",
        "train.max_skipped_steps": "0",
        "train.batch_size": "2",
        "optim.lr": "1e30",
        "optim.schedule": "constant",
        "optim.warmup_steps": "0",
        "optim.grad_clip": "0",
    }
    assert main(["sft", *(f"{name}={value}" for name, value in settings.items())]) == 6
    assert "loss is nan" in capsys.readouterr().err
