"""Outcomes, alarms and tables of `make reproduce`, from made-up runs."""

import json
from pathlib import Path

import pytest

from ppomax.engine.config_file import write_config
from ppomax.engine.errors import ConfigError
from ppomax.tools.reproduce_arms import ARMS, arm_config
from ppomax.tools.reproduce_findings import FINDINGS, verdicts
from ppomax.tools.reproduce_plots import FIGURES
from ppomax.tools.reproduce_report import main_table, write_report
from ppomax.tools.reproduce_results import FINISHED, Run, read_run, read_runs

QUESTION = "what about the soup ?"
GOOD = "of course . warm the soup . ask me more ."
BAD = "of course . feed the soup . tell me <b>| later"


def write_run(output: Path, arm: str, seed: int, golds: list[float], *, collapses: bool) -> Path:
    """A run with an evaluation every 4 iterations whose mean gold is golds[i], from 10 samples that are right or wrong.
    collapses: length and KL run away over the second half.
    """
    folder = output / f"seed_{seed}" / arm
    folder.mkdir(parents=True)
    write_config(arm_config(folder.parent, arm, seed), folder / "config.toml")
    lines = []
    num_steps = 4 * (len(golds) - 1)
    for step in range(1, num_steps + 1):
        away = max(0.0, 2 * step / num_steps - 1) if collapses else 0.0
        values = {"response_length": 10 + 30 * away, "kl": 0.01 + away, "reward": step / 4, "reward_std": 2.0}
        values |= {"value_loss": 1 / step, "explained_variance": 0.5, "perplexity": 1.8, "perplexity_paper": 1.05}
        values |= {"finished": 1 - away, "truncated": away, "distinct_4": 1.0, "entropy": 0.5}
        lines.append({"kind": "ppo", "step": step, **values})
    for number, mean in enumerate(golds):
        good = round(10 * mean)
        rows = [sample(GOOD)] * good + [sample(BAD, finished=False)] * (10 - good)
        (folder / f"samples_{4 * number:06d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
        numbers = {"reward": float(number), "response_length": 10.0, "kl": 0.1, "perplexity": 1.5, "finished": 1.0}
        lines.append({"kind": "evaluation", "step": 4 * number, **numbers})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / FINISHED).write_text(json.dumps({"wall_seconds": 60.0, "cpu_seconds": 30.0}))
    return folder


def sample(response: str, *, finished: bool = True) -> dict:
    return {"prompt": [{"role": "human", "text": QUESTION}], "response": response, "reward": 1.0, "finished": finished}


COLLAPSE = [0.4, 0.6, 0.8, 0.8, 0.5, 0.2, 0.0]
STABLE = [0.4, 0.6, 0.8, 0.8, 0.7, 0.8, 0.8]


def test_a_run_that_loses_more_than_half_of_its_gain_collapses(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, "vanilla", 0, COLLAPSE, collapses=True), "vanilla", 0)
    assert (run.start, run.best["gold"], run.best["step"], run.final) == pytest.approx((0.4, 0.8, 8, 0.0))
    assert run.half == pytest.approx(0.6)
    assert run.lost_after == 12  # 0.8 there, 0.5 at 16
    assert run.outcome == "collapses"
    assert run.cpu_seconds == 30


def test_the_monitor_is_replayed_and_has_to_come_before_half_is_lost(tmp_path: Path) -> None:
    early = read_run(write_run(tmp_path, "vanilla", 0, [*STABLE[:-2], 0.8, 0.0], collapses=True), "vanilla", 0)
    assert early.alarm is not None
    assert early.lost_after == 20
    assert early.alarm[0] <= 20
    assert early.is_caught
    late = read_run(
        write_run(tmp_path, "vanilla", 1, [0.4, 0.8, 0.0, 0.0, 0.0, 0.0, 0.0], collapses=True), "vanilla", 1
    )
    assert late.lost_after == 4
    assert late.alarm is not None
    assert late.alarm[0] > 4
    assert not late.is_caught


@pytest.mark.parametrize(
    ("golds", "outcome"),
    [(STABLE, "holds"), (COLLAPSE, "collapses"), ([0.4, 0.4, 0.3, 0.4, 0.3, 0.2, 0.1], "fails")],
)
def test_outcomes(tmp_path: Path, golds: list[float], outcome: str) -> None:
    run = read_run(write_run(tmp_path, "ppo_max", 0, golds, collapses=False), "ppo_max", 0)
    assert run.outcome == outcome


def test_a_calm_run_has_no_alarm(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, "ppo_max", 0, STABLE, collapses=False), "ppo_max", 0)
    assert run.alarm is None
    assert run.lost_after is None
    assert not run.is_caught


def test_runs_that_are_not_finished_are_left_out(tmp_path: Path) -> None:
    write_run(tmp_path, "vanilla", 1, COLLAPSE, collapses=True)
    write_run(tmp_path, "vanilla", 0, COLLAPSE, collapses=True)
    (write_run(tmp_path, "kl", 0, STABLE, collapses=False) / FINISHED).unlink()
    assert [(run.arm, run.seed) for run in read_runs(tmp_path)] == [("vanilla", 0), ("vanilla", 1)]


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    for seed in (0, 1, 3):
        write_run(tmp_path, "vanilla", seed, COLLAPSE, collapses=True)
        write_run(tmp_path, "ppo_max", seed, STABLE if seed else COLLAPSE, collapses=seed == 0)
    return read_runs(tmp_path)


def test_a_finding_counts_the_seeds_that_have_its_arms(runs: list[Run]) -> None:
    told = {verdict.finding.paper: verdict.text for verdict in verdicts(runs)}
    assert (
        told["vanilla PPO: the reward goes from 3 to 15 while the win rate falls from 63 % to 23 %"]
        == "yes, 3 of 3 seeds"
    )
    assert told["PPO-max is stable, its KL reaches a plateau"] == "partly, 2 of 3 seeds"
    assert told["the plotted perplexity falls from 1.017 to 1.001"] == "no, 0 of 3 seeds"
    assert told["lambda 0 collapses"] == "not run"


def test_the_main_table_tells_unseen_seeds_and_false_alarms(runs: list[Run]) -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in main_table(runs).splitlines()[2:]]
    assert [(row[0], row[1]) for row in rows] == [
        *(("vanilla", seed) for seed in ("0", "1", "3, unseen")),
        *(("ppo_max", seed) for seed in ("0", "1", "3, unseen")),
    ]
    assert rows[0][2] == "0.40, 0.80 (8), 0.00"
    assert rows[4][-1] == rows[4][-2] == rows[4][-3] == "-"


def test_a_report_has_tables_pictures_and_harmless_samples(runs: list[Run], tmp_path: Path) -> None:
    report = write_report(tmp_path).read_text()
    for name in ("figure_04", "figure_09"):
        assert f"({name}.png)" in report
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    assert "figure_15" not in report
    shown = [line for line in report.splitlines() if "<b>|" in line]
    assert shown
    assert all(line.startswith("    ") for line in shown)
    assert len(json.loads((tmp_path / "results.json").read_text())) == len(runs)


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no finished run"):
        write_report(tmp_path)


def test_findings_and_figures_name_arms_that_exist() -> None:
    assert {arm for finding in FINDINGS for arm in finding.arms} <= {*ARMS}
    assert {arm for _, arms in FIGURES.values() for arm in arms} == {*ARMS}
