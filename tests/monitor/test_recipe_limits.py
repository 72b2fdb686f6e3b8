"""The shipped recipes' limits of the KL, against what their recorded runs reach."""

from pathlib import Path

import pytest

from ppomax.engine.config_file import load_config
from ppomax.engine.config_monitor import MonitorConfig
from ppomax.engine.monitor.state import replay

CONFIGS = Path(__file__).resolve().parents[2] / "examples/configs"
# Read off docs/benchmarks/2026-11-23-*/kl.png, in rollouts, at iterations in equal steps.
RECORDED = {
    "quickstart": [0.0, 0.002, 0.027, 0.045, 0.062, 0.069, 0.065, 0.082, 0.075, 0.070, 0.077, 0.078, 0.074],
    "hh": [0.0, 0.028, 0.137, 0.218, 0.19, 0.15, 0.055, 0.025, 0.121, 0.176, 0.153, 0.116, 0.157, 0.218, 0.20, 0.195],
}


def alarms_of(name: str, monitor: MonitorConfig) -> tuple[list[str], bool]:
    """The detectors that sound on the recorded KL, and whether all are calm in the end."""
    records = [{"step": step, "kl": kl} for step, kl in enumerate(RECORDED[name], 1)]
    state, alarms = replay(records, monitor, max_length=64)
    return [alarm.detector.name for alarm in alarms], state.is_calm


@pytest.mark.parametrize("name", RECORDED)
def test_a_recipe_as_healthy_as_the_recorded_one_is_calm_with_its_own_limits(name: str) -> None:
    models = [f"model.{role}=runs/{role}" for role in ("policy", "reward", "critic")]
    config = load_config(str(CONFIGS / name / "ppo.toml"), models, command="ppo")
    assert config.monitor.limits.kl > max(RECORDED[name])
    assert alarms_of(name, config.monitor) == ([], True)
    # The limits of a 7B model would alarm, or leave no checkpoint of the end healthy.
    assert alarms_of(name, MonitorConfig()) != ([], True)
