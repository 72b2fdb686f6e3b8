"""The detectors on the paper's runs: no alarm on a healthy one, an alarm on every collapsed one; docs/monitor.md."""

import importlib.util
import random
import re
from pathlib import Path
from typing import Any

import pytest

from ppomax.engine.config_monitor import MonitorConfig
from ppomax.engine.monitor.state import MonitorState, observe, replay

ROOT = Path(__file__).parents[2]


def paper_runs() -> Any:
    spec = importlib.util.spec_from_file_location("paper_runs", Path(__file__).with_name("paper_runs.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


PAPER = paper_runs()
BY_LABEL = {label: [run for run in PAPER.RUNS if run.label == label] for label in ("healthy", "collapsed", "drifting")}


def of_label(label: str) -> Any:
    return pytest.mark.parametrize("run", BY_LABEL[label], ids=lambda run: run.name)


def alarms_of(records: list[dict[str, float]], config: MonitorConfig | None = None) -> list[Any]:
    return replay(records, config or MonitorConfig(), max_length=PAPER.MAX_LENGTH)[1]


def healthy_before_alarm(records: list[dict[str, float]]) -> int:
    """The last step at which a checkpoint would have been healthy before the first alarm."""
    state, healthy = MonitorState(), -1
    for record in records:
        state, found = observe(state, record, MonitorConfig(), max_length=PAPER.MAX_LENGTH)
        if found:
            break
        healthy = int(record["step"]) if state.is_calm else healthy
    return healthy


@of_label("healthy")
def test_a_healthy_run_sets_off_no_alarm(run: Any) -> None:
    assert [(alarm.detector.name, alarm.step) for alarm in alarms_of(run.records())] == []


@of_label("healthy")
def test_nor_does_it_with_noise(run: Any) -> None:
    """5 % on every number: a rollout of 128 responses has about that."""
    draw = random.Random(run.name)
    for _ in range(3):
        records = [
            {
                name: x
                if name == "step"
                else 1 + (x - 1) * draw.gauss(1, 0.05)
                if "perplexity" in name
                else x * draw.gauss(1, 0.05)
                for name, x in record.items()
            }
            for record in run.records()
        ]
        assert [(alarm.detector.name, alarm.step) for alarm in alarms_of(records)] == []


@of_label("collapsed")
def test_a_collapsed_run_sets_off_an_alarm(run: Any) -> None:
    first = alarms_of(run.records())[0]
    # Where only the step of the paper's criterion is quoted, two records more confirm it.
    assert first.step <= run.collapse + (2 * PAPER.STEPS_PER_RECORD + 8 if len(run.curves) == 1 else 0)


def test_vanilla_ppo_is_caught_before_its_reward_jumps_and_its_win_rate_falls() -> None:
    """Fig. 4: the reward jumps between 400 and 500, the win rate is 62 % at step 400 and 46 % at 500."""
    vanilla = next(run for run in BY_LABEL["collapsed"] if run.name == "Fig. 4 vanilla PPO")
    assert alarms_of(vanilla.records())[0].step < 400
    # The best win rate is that of steps 300 to 400.
    assert 250 <= healthy_before_alarm(vanilla.records()) <= 350
    seen = {alarm.detector.name for alarm in alarms_of(vanilla.records())}
    assert seen >= {"length_drift", "length_saturation", "kl_runaway", "paper_perplexity", "perplexity_collapse"}


def test_the_touch_of_a_high_kl_in_a_healthy_run_is_below_the_limit_and_the_plateau_is_calm() -> None:
    """Fig. 9 touches 0.058; checkpoints of its plateau of 0.043 count as healthy."""
    run = next(run for run in BY_LABEL["healthy"] if "10,000" in run.name)
    assert healthy_before_alarm(run.records()) == 10000


def table() -> dict[str, list[str]]:
    text = (ROOT / "docs/monitor.md").read_text()
    behind = text.split("## The paper's runs", 1)[1]
    rows = [line.strip("|").split("|") for line in re.findall(r"^\|.*\|$", behind, flags=re.MULTILINE)[2:]]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows if len(row) == 6}


@pytest.mark.parametrize("run", PAPER.RUNS, ids=lambda run: run.name)
def test_the_table_of_the_documentation_is_what_the_replay_gives(run: Any) -> None:
    alarms = alarms_of(run.records())
    label, collapse, first, detector, healthy = table()[run.name]
    assert (label, collapse) == (run.label, str(run.collapse or "-"))
    assert first == (str(alarms[0].step) if alarms else "-")
    assert detector == (f"`{alarms[0].detector.name}`" if alarms else "-")
    assert healthy == (str(healthy_before_alarm(run.records())) if alarms else "-")
