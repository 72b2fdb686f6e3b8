"""Confirmation, hysteresis, baselines and the checkpointed state of the monitor, on made-up records."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from ppomax.engine.config_monitor import DetectorActions, MonitorConfig
from ppomax.engine.errors import CheckpointError
from ppomax.engine.monitor.detectors import DETECTORS
from ppomax.engine.monitor.state import MonitorState, observe, replay

CONFIG = MonitorConfig(window=1)
HEALTHY = {
    **{"response_length": 40.0, "truncated": 0.0, "finished": 1.0, "kl": 0.01, "perplexity": 4.0, "entropy": 1.5},
    **{"perplexity_paper": 1.03, "distinct_4": 0.95, "value_loss": 0.5, "explained_variance": 0.6},
    **{"reward": 1.0, "reward_std": 1.0},
}


def run(changes: Sequence[dict[str, Any]], config: MonitorConfig = CONFIG) -> list[tuple[str, int]]:
    """(detector, step) of the alarms where HEALTHY is changed like this from record 10 on."""
    records = [{"step": i + 1, **HEALTHY, **(changes[i - 10] if i >= 10 else {})} for i in range(10 + len(changes))]
    return [(alarm.detector.name, alarm.step) for alarm in replay(records, config, max_length=64)[1]]


@pytest.mark.parametrize(
    ("detector", "change"),
    [
        ("length_drift", {"response_length": 81.0}),
        ("length_saturation", {"truncated": 0.55}),
        ("dead_eos", {"finished": 0.01}),
        ("length_collapse", {"response_length": 2.0}),
        ("kl_runaway", {"kl": 0.09}),
        ("kl_spike", {"kl": 0.6}),
        ("perplexity_collapse", {"perplexity": 1.5}),
        ("paper_perplexity", {"perplexity_paper": 1.004}),
        ("entropy_collapse", {"entropy": 0.4}),
        ("repetition", {"distinct_4": 0.6}),
        ("value_divergence", {"value_loss": 2.5, "explained_variance": -1.0}),
        ("reward_flattening", {"reward": 3.5, "reward_std": 2.5}),
    ],
)
def test_each_detector_speaks_at_its_own_sign(detector: str, change: dict[str, float]) -> None:
    names = {name for name, _ in run([change] * 4)}
    assert detector in names
    assert names <= {detector, "kl_runaway"}


def test_every_detector_has_a_case_and_a_setting() -> None:
    marks = test_each_detector_speaks_at_its_own_sign.pytestmark  # type: ignore[attr-defined]
    names = {detector.name for detector in DETECTORS}
    assert {case[0] for case in marks[0].args[1]} == names
    assert set(DetectorActions.model_fields) == names


def test_a_healthy_run_is_silent() -> None:
    assert run([{}] * 20) == []


def test_one_record_beyond_the_limit_is_not_enough_but_for_a_spike() -> None:
    assert run([{"kl": 0.2}, {}, {"kl": 0.2}, {}]) == []
    assert run([{"kl": 0.2}, {"kl": 0.2}]) == [("kl_runaway", 12)]
    assert run([{"kl": 0.6}, {}, {}]) == [("kl_spike", 11)]


def test_smoothing_hides_a_single_outlier() -> None:
    config = MonitorConfig(window=3, confirm=2)
    assert run([{"kl": 0.15}, {}, {}, {}], config) == []


def test_an_alarm_sounds_once_until_its_signal_is_gone() -> None:
    high, near, low = {"kl": 0.1}, {"kl": 0.07}, {"kl": 0.02}
    assert run([high] * 5) == [("kl_runaway", 12)]
    # 0.07 is 0.875 of the limit: not gone.
    assert run([high, high, near, near, near, high, high]) == [("kl_runaway", 12)]
    assert run([high, high, low, low, high, high]) == [("kl_runaway", 12), ("kl_runaway", 16)]


def test_an_alarm_that_nothing_ends_sounds_again() -> None:
    config = MonitorConfig(window=1, patience=3)
    assert run([{"kl": 0.1}] * 8, config) == [("kl_runaway", 12), ("kl_runaway", 15), ("kl_runaway", 18)]


def test_the_first_records_are_the_baseline_and_set_off_nothing() -> None:
    records = [{"step": i + 1, **HEALTHY, "kl": 0.2} for i in range(6)]
    alarms = replay(records, MonitorConfig(window=1, baseline=4), max_length=64)[1]
    assert [alarm.step for alarm in alarms] == [6]


@pytest.mark.parametrize("missing", [None, math.nan, "absent"])
def test_metrics_that_are_missing_or_no_numbers_are_passed_over(missing: Any) -> None:
    changes: list[dict[str, Any]] = [{"kl": 0.2, "entropy": missing}] * 3
    assert run(changes) == [("kl_runaway", 12)]
    assert replay([{"step": 1}, {"step": 2, "kl": missing}], CONFIG, max_length=64)[1] == []


def test_a_critic_that_explains_the_returns_has_not_diverged() -> None:
    assert run([{"value_loss": 9.0, "explained_variance": 0.6}] * 4) == []


def test_a_model_that_never_ends_is_told_from_the_start() -> None:
    records = [{"step": i + 1, **HEALTHY, "finished": 0.0} for i in range(8)]
    alarms = replay(records, CONFIG, max_length=64)[1]
    assert [alarm.detector.name for alarm in alarms] == ["dead_eos"]


def test_the_state_goes_through_json_and_on_as_if_nothing_had_happened() -> None:
    records = [{"step": i + 1, **HEALTHY, "kl": 0.004 * i, "response_length": 40 + 3 * i} for i in range(40)]
    state, expected = MonitorState(), []
    for record in records:
        state, alarms = observe(state, record, CONFIG, max_length=64)
        expected += alarms
        state = MonitorState.from_json(json.loads(json.dumps(state.to_json())))
    straight, found = replay(records, CONFIG, max_length=64)
    assert (state, expected) == (straight, found)
    assert found


def test_a_replay_goes_back_where_the_run_did() -> None:
    rise = [{"step": i + 1, **HEALTHY, "kl": 0.0 if i < 6 else 0.2} for i in range(8)]
    again = [{"step": i + 1, **HEALTHY, "kl": 0.0 if i < 6 else 0.2} for i in range(6, 8)]
    alarms = replay([*rise, *again], CONFIG, max_length=64)[1]
    assert [alarm.step for alarm in alarms] == [8, 8]


def test_a_checkpoint_is_healthy_when_the_first_record_of_its_weights_is_calm() -> None:
    state = MonitorState()
    healthy = []
    for step, kl in enumerate([0.0, 0.01, 0.02, 0.03, 0.07, 0.02, 0.02]):
        state, _ = observe(state, {"step": step, **HEALTHY, "kl": kl}, CONFIG, max_length=64)
        healthy.append(state.healthy_step)
        state = replace(state, candidate_step=step)  # a checkpoint after every step
    assert healthy == [None, 0, 1, 2, 2, 4, 5]


def test_a_detector_that_is_off_neither_speaks_nor_unsettles() -> None:
    config = MonitorConfig(window=1, actions=DetectorActions(kl_runaway="off"))
    records = [{"step": i + 1, **HEALTHY, "kl": 0.0 if i < 6 else 0.2} for i in range(9)]
    state, alarms = replay(records, config, max_length=64)
    assert alarms == []
    assert state.is_calm


def test_a_damaged_state_is_refused() -> None:
    with pytest.raises(CheckpointError, match="monitor is damaged"):
        MonitorState.from_json({"num_records": 3})


def test_a_run_is_calm_until_a_signal_has_gone_two_thirds_of_its_way() -> None:
    state = MonitorState()
    calm = []
    for step, kl in enumerate([0.0] * 6 + [0.05, 0.054, 0.07, 0.05]):
        state, _ = observe(state, {"step": step, **HEALTHY, "kl": kl}, CONFIG, max_length=64)
        calm.append(state.is_calm)
    assert calm[6:] == [True, False, False, True]


def test_an_alarm_says_what_it_saw() -> None:
    records = [{"step": i + 1, **HEALTHY, "response_length": 40.0 if i < 6 else 90.0} for i in range(9)]
    (alarm,) = replay(records, CONFIG, max_length=64)[1]
    assert alarm.message == "responses grow longer and longer: response_length 90 (was 40), truncated 0 (was 0)"
    assert alarm.evidence["score"] == pytest.approx(1.25)
    assert "Fig. 4" in alarm.evidence["paper"]
