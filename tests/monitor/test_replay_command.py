"""`ppomax monitor RUN` on a folder as a run leaves it."""

import json
from pathlib import Path

import pytest

from ppomax.engine import cli
from ppomax.engine.config_file import load_config, write_config


@pytest.fixture
def run(tmp_path: Path, tiny) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    overrides = [f"model.{name}={tiny.model(name)}" for name in ("policy", "reward")]
    overrides += [f"data.train={tiny.path('prompts.jsonl')}", f"train.output={folder}", "train.steps=9"]
    write_config(load_config(None, overrides, command="ppo"), folder / "config.toml")
    rows = [{"kind": "ppo", "step": i + 1, "kl": 0.0 if i < 5 else 0.11, "entropy": None} for i in range(9)]
    rows.insert(3, {"kind": "evaluation", "step": 3, "kl": 9.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "pp')
    return folder


def test_a_run_is_replayed_with_its_own_limits(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["monitor", str(run)]) == 0
    out = capsys.readouterr().out
    assert "step 9  kl_runaway  critical" in out
    assert "1 alarms in 9 records" in out


def test_or_with_others(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["monitor", str(run), "monitor.limits.kl=0.2"]) == 0
    assert "0 alarms in 9 records" in capsys.readouterr().out


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["monitor", str(tmp_path)]) == 2
    assert "config.toml" in capsys.readouterr().err


def test_a_damaged_line_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], "{broken", *lines[1:]]))
    assert cli.main(["monitor", str(run)]) == 4
    assert "line 2: not JSON" in capsys.readouterr().err
