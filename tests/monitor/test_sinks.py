"""TensorBoard, Weights & Biases and the live view: what reaches them, and what is said where a package is missing."""

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ppomax.engine.config import RunConfig
from ppomax.engine.errors import ConfigError
from ppomax.engine.metrics import RunLog
from ppomax.engine.monitor.live import LiveView, course

EVENT = {
    **{"step": 2, "detector": "kl_runaway", "severity": "critical", "message": "away [red]from[/red] `it`"},
    **{"evidence": {}, "samples": [], "action": "warn"},
}
VALUES = {"reward": 1.5, "kl": float("nan"), "reward_histogram": {"edges": [0.0, 1.0, 2.0], "counts": [3.0, 1.0]}}


class Recorder:
    """Stands for an object of a package: keeps the calls of its methods."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: self.calls.append((name, args, options))

    def of(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, options) for called, args, options in self.calls if called == name]


def config_of(tmp_path: Path, **monitor: Any) -> RunConfig:
    return RunConfig.model_validate({"train": {"output": str(tmp_path / "run")}, "monitor": monitor})


def logged(config: RunConfig) -> None:
    log = RunLog(config, "ppo", is_writer=True, resumed=False)
    log.step(1, 3, VALUES)
    log.timing(1, {"rollout_seconds": 0.5})
    log.event(EVENT)
    log.evaluation(2, {"reward": 2.5})
    log.close()


def test_weights_and_biases_gets_every_number_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, begun = Recorder(), []
    stub = types.ModuleType("wandb")
    stub.init = lambda **options: begun.append(options) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-key")
    logged(config_of(tmp_path, wandb="my-project"))
    (options,) = begun
    assert (options["project"], options["name"], options["dir"]) == ("my-project", "run", str(tmp_path / "run"))
    assert options["config"]["monitor"]["wandb"] == "my-project"
    json.dumps(options["config"])
    rows = [args[0] for args, _ in run.of("log")]
    assert rows[0]["step"] == 1
    assert rows[0]["ppo/reward"] == 1.5
    assert "ppo/reward_histogram" not in rows[0]
    assert rows[1] == {"step": 1, "timing/rollout_seconds": 0.5}
    assert rows[2] == {"step": 2, "event/kl_runaway": 1}
    assert rows[3] == {"step": 2, "evaluation/reward": 2.5}
    assert run.of("define_metric") == [(("*",), {"step_metric": "step"})]
    assert len(run.of("finish")) == 1
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not any(b"a-secret-key" in path.read_bytes() for path in files)


def test_tensorboard_gets_scalars_histograms_and_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, folders = Recorder(), []
    stub = types.ModuleType("torch.utils.tensorboard")
    stub.SummaryWriter = lambda folder: folders.append(folder) or writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    logged(config_of(tmp_path, tensorboard=True))
    assert folders == [str(tmp_path / "run/tensorboard")]
    scalars = [args for args, _ in writer.of("add_scalar")]
    assert ("ppo/reward", 1.5, 1) in scalars
    assert ("evaluation/reward", 2.5, 2) in scalars
    assert ("timing/rollout_seconds", 0.5, 1) in scalars
    ((name,), histogram) = writer.of("add_histogram_raw")[0]
    assert name == "ppo/reward_histogram"
    assert (histogram["num"], histogram["bucket_limits"], histogram["sum"]) == (4, [1.0, 2.0], 3 * 0.5 + 1.5)
    assert writer.of("add_text")[0][0][0] == "event/kl_runaway"
    assert len(writer.of("close")) == 1


@pytest.mark.parametrize(
    ("module", "setting", "fix"),
    [
        ("wandb", {"wandb": "x"}, "pip install wandb"),
        ("torch.utils.tensorboard", {"tensorboard": True}, "pip install tensorboard"),
    ],
)
def test_a_missing_package_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, setting: dict[str, Any], fix: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # makes its import fail
    with pytest.raises(ConfigError, match=fix):
        RunLog(config_of(tmp_path, **setting), "ppo", is_writer=True, resumed=False)


def test_only_the_first_rank_has_sinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    RunLog(config_of(tmp_path, wandb="x"), "ppo", is_writer=False, resumed=False).close()


def test_the_live_view_shows_numbers_and_events_as_plain_text() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    view = LiveView("ppo", ("reward", "kl"), console)
    view.event(EVENT["message"])
    view.say("[bold]a line[/bold]")
    for step, reward in enumerate((1.0, 2.0, 3.0), start=1):
        view.step(step, 3, {"reward": reward, "kl": float("nan")}, 0.25)
    view.close()
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for text in ("ppo 3/3, 0.25 s a step", "reward", "▁▅█", "away [red]from[/red] `it`", "[bold]a line[/bold]"):
        assert text in shown
    assert shown.endswith("\x1b[?25h")  # the cursor is back


def test_without_a_terminal_there_are_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged(config_of(tmp_path, live=True))
    assert "ppo 1/3 [####........]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "bars"),
    [([], ""), ([1.0], "▁"), ([2.0, 2.0], "▁▁"), ([0.0, 7.0], "▁█"), ([0.0, float("nan"), 7.0], "▁·█")],
)
def test_a_course_runs_from_the_least_to_the_largest(values: list[float], bars: str) -> None:
    assert course(values) == bars
