"""The comparison of predicted and measured times: its arithmetic, and real runs on two ranks."""

import json
from pathlib import Path

import pytest

from ppomax.engine.plan.gpus import find_gpu
from ppomax.tools.plan_check import RANKS, Row, clear_pairs, kendall, predicted, report, row
from ppomax.tools.plan_check import main as plan_check

RATES = find_gpu("h100")


def rows(*times: tuple[float, float, float]) -> list[Row]:
    return [Row(f"layout {i}", *each) for i, each in enumerate(times)]


def test_kendall_counts_pairs() -> None:
    assert kendall([1, 2, 3], [10, 20, 30]) == 1
    assert kendall([1, 2, 3], [3, 2, 1]) == -1
    assert kendall([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)


def test_clear_pairs_are_those_that_the_prediction_tells_apart() -> None:
    found = clear_pairs(rows((1.0, 1.0, 5.0), (1.1, 3.0, 3.0), (2.0, 2.0, 2.0)), lambda one: one.wall)
    assert found == [("layout 0", "layout 2", True), ("layout 1", "layout 2", False)]


def test_the_report_names_what_came_out_the_other_way_round() -> None:
    text = report(rows((1.0, 1.0, 1.0), (2.0, 0.9, 3.0)), RATES)
    assert "By the clock: Kendall's rank correlation -1.00; of 1 pairs" in text
    assert "* predicted faster, but slower: layout 0, than layout 1" in text
    assert "Busy, without pipelines: Kendall's rank correlation 1.00" in text


def test_a_rank_that_waits_does_not_count_and_other_programs_are_left_out(tmp_path: Path) -> None:
    from ppomax.tools.bench_workload import bench_config
    from ppomax.tools.plan_check import WORK

    bench_config(WORK, tmp_path, ["train.steps=1"])
    plan = predicted(tmp_path, "dp 2", RATES)
    ranks = [
        [{"wall": 5.0, "cpu": {"rollout": 1.0, "update": 2.0}}, {"wall": 4.0, "cpu": {"rollout": 1.5, "update": 2.0}}],
        [{"wall": 5.1, "cpu": {"rollout": 0.1, "update": 3.0}}, {"wall": 4.2, "cpu": {"rollout": 0.1, "update": 2.5}}],
    ]
    found = row("dp 2", plan, ranks)
    assert (found.wall, found.busy) == (4.2, 1.0 + 2.5)
    assert found.predicted == plan.seconds
    slower = predicted(tmp_path, "dp 2, recompute full", RATES)
    assert slower.seconds > plan.seconds


@pytest.mark.slow
@pytest.mark.dist
def test_clear_predictions_order_real_runs(tmp_path: Path) -> None:
    """Rates of this machine, and layouts without waiting, so that CPU time tells how long they take."""
    chosen = [
        "dp 2",
        "dp 2, recompute full",
        "policy, reference / critic, reward",
        "policy, critic / reference, reward",
    ]
    plan_check(["--layout", *chosen, "--iterations", "3", "--output", str(tmp_path)])
    content = json.loads((tmp_path / "plan_check.json").read_text())
    assert content["rates"]["per_node"] == RANKS
    pairs = clear_pairs([Row(**one) for one in content["rows"]], lambda one: one.busy)
    assert len(pairs) >= 2
    assert all(agrees for *_, agrees in pairs), (tmp_path / "plan_check.md").read_text()
