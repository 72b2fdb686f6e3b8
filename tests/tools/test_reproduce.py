"""`make reproduce`: which runs there are, that finished ones are kept, and a run from end to end (slow)."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from ppomax.engine.config_file import write_config
from ppomax.engine.errors import PpomaxError
from ppomax.tools import reproduce
from ppomax.tools.reproduce import main, plan, run_all
from ppomax.tools.reproduce_arms import ARMS, STAGES, arm_config
from ppomax.tools.reproduce_jobs import PREPARE, Job, command_of, is_finished, run_job, seed_folder
from ppomax.tools.reproduce_results import FINISHED

CHANGED = {
    "kl": {"ppo.kl_coef"},
    "kl_half": {"ppo.kl_coef"},
    "kl_double": {"ppo.kl_coef"},
    "reward_scale": {"ppo.reward_scaling"},
    "reward_clip_0.3": {"ppo.reward_scaling", "ppo.reward_clip"},
    "reward_clip_0.8": {"ppo.reward_scaling", "ppo.reward_clip"},
    "advantage_clip_0.12": {"ppo.advantage_norm", "ppo.advantage_clip"},
    "advantage_clip_0.5": {"ppo.advantage_norm", "ppo.advantage_clip"},
    "importance_sampling": {"ppo.importance_sampling"},
    "entropy": {"ppo.entropy_coef", "ppo.entropy_target"},
    "lambda_0": {"ppo.kl_coef", "ppo.lam"},
    "lambda_1": {"ppo.kl_coef", "ppo.lam"},
    "vanilla_critic_pretrained": {"model.critic"},
    "ppo_max_critic_sft": {"model.critic", "ppo.critic_init"},
    "ppo_max_policy_base": {"model.policy"},
}
"""What an arm changes: of PPO-max where its name says so, else of vanilla PPO."""


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm not in ("vanilla", "ppo_max")])
def test_an_arm_changes_what_its_figure_is_about_and_nothing_else(arm: str) -> None:
    base = "ppo_max" if arm.startswith("ppo_max") else "vanilla"
    configs = [arm_config(Path("out"), name, 0).model_dump() for name in (base, arm)]
    changed = {
        f"{section}.{key}"
        for section, values in configs[0].items()
        for key, value in values.items()
        if configs[1][section][key] != value
    }
    assert changed - {"monitor.eval_every"} == {*CHANGED[arm], "train.output"}


def test_vanilla_has_none_of_the_tricks_and_ppo_max_those_of_the_paper() -> None:
    vanilla, ppo_max = (arm_config(Path("out"), name, 0) for name in ("vanilla", "ppo_max"))
    assert (vanilla.ppo.kl_coef, vanilla.ppo.reward_scaling, vanilla.ppo.reward_clip) == (0, "none", None)
    assert (vanilla.ppo.value_clip, vanilla.ppo.ptx_coef, vanilla.model.critic) == (None, 0, "")
    assert (ppo_max.ppo.reward_scaling, ppo_max.ppo.reward_clip, ppo_max.ppo.value_clip) == ("norm", 10.0, 0.2)
    assert ppo_max.ppo.kl_coef > 0
    assert ppo_max.ppo.ptx_coef > 0
    assert ppo_max.model.critic == "out/critic/hf"
    assert vanilla.optim == ppo_max.optim


def test_the_monitor_warns_only_and_the_gold_judge_is_no_reward() -> None:
    for arm in ARMS:
        config = arm_config(Path("out"), arm, 0)
        assert config.monitor.action == "warn"
        assert config.ppo.rewards == ()


def test_unseen_seeds_have_the_two_main_arms_alone() -> None:
    arms = plan([0, 3], None)
    assert arms[:4] == [(0, "vanilla"), (0, "ppo_max"), (3, "vanilla"), (3, "ppo_max")]
    assert {arm for seed, arm in arms if seed == 0} == {*ARMS}
    assert {arm for seed, arm in arms if seed == 3} == {"vanilla", "ppo_max"}
    assert plan([3], ["kl"]) == [(3, "kl")]


@dataclass
class Ended:
    """A process that has ended."""

    exitcode: int = 0

    def is_alive(self) -> bool:
        return False


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that `run_all` starts, in order; each leaves its folders at once, and does nothing else."""
    jobs: list[Job] = []

    def start(job: Job, output: Path) -> Ended:
        jobs.append(job)
        for run in job.runs:
            folder = seed_folder(output, job.seed) / run
            folder.mkdir(parents=True, exist_ok=True)
            write_config(job.config(run, output), folder / "config.toml")
            (folder / FINISHED).write_text(json.dumps({"wall_seconds": 2.0, "cpu_seconds": 1.0}))
        return Ended()

    monkeypatch.setattr("ppomax.tools.reproduce._start", start)
    return jobs


def test_finished_runs_are_kept_and_the_others_begun_again(tmp_path: Path, started: list[Job]) -> None:
    jobs = [Job(0, "vanilla"), Job(0, "ppo_max"), Job(1, "vanilla")]
    run_all(jobs, tmp_path, 2)
    assert sorted(map(str, started)) == sorted(map(str, [*jobs, Job(0, PREPARE), Job(1, PREPARE)]))
    assert started.index(Job(0, PREPARE)) < started.index(Job(0, "vanilla"))
    started.clear()
    run_all(jobs, tmp_path, 2)
    assert started == []
    (tmp_path / "seed_0/vanilla" / FINISHED).unlink()
    run_all(jobs, tmp_path, 2)
    assert started == [Job(0, "vanilla")]


def test_a_run_with_other_settings_is_made_anew(tmp_path: Path, started: list[Job]) -> None:
    run_all([Job(0, "vanilla")], tmp_path, 1)
    started.clear()
    run_all([Job(0, "vanilla", num_iterations=7)], tmp_path, 1)
    assert started == [Job(0, "vanilla", num_iterations=7)]


def test_other_limits_of_the_monitor_keep_a_run(
    tmp_path: Path, started: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all([Job(0, "vanilla")], tmp_path, 1)
    monkeypatch.setattr("ppomax.tools.reproduce_arms.MONITOR", ("monitor.limits.kl=0.77",))
    assert Job(0, "vanilla").config("vanilla", tmp_path).monitor.limits.kl == 0.77
    assert is_finished(Job(0, "vanilla"), tmp_path)


def test_a_stage_that_is_made_anew_takes_what_started_from_it_along(
    tmp_path: Path, started: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all([Job(0, "vanilla"), Job(1, "vanilla")], tmp_path, 1)
    (tmp_path / "seed_0/reward" / FINISHED).unlink()
    made: list[str] = []

    def stage_function(command: str):
        return lambda config: (made.append(command), Path(config.train.output).mkdir())

    monkeypatch.setattr("ppomax.tools.reproduce_jobs.stage_function", stage_function)
    run_job(Job(0, PREPARE), tmp_path)
    assert made == ["reward", "critic"]
    assert not is_finished(Job(0, "vanilla"), tmp_path)
    assert is_finished(Job(1, "vanilla"), tmp_path)


def test_a_run_that_fails_is_named_and_nothing_more_is_started(
    tmp_path: Path, started: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = reproduce._start
    monkeypatch.setattr(
        reproduce, "_start", lambda job, output: Ended(1) if job.name == "ppo_max" else start(job, output)
    )
    with pytest.raises(PpomaxError, match=r"ppo_max, seed 0 failed: .*logs/ppo_max.txt says why"):
        run_all([Job(0, "ppo_max"), Job(0, "vanilla"), Job(0, "kl")], tmp_path, 1)
    assert started == [Job(0, PREPARE)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_data_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One arm, four iterations; then the same command again, which runs nothing."""
    command = [str(tmp_path), "--seeds", "0", "--arms", "vanilla", "--iterations", "4"]
    main(command)
    assert "2/2 vanilla, seed 0" in capsys.readouterr().out
    report = (tmp_path / "report.md").read_text()
    assert "| vanilla | 0 |" in report
    assert (tmp_path / "figure_04.png").stat().st_size > 1000
    (result,) = json.loads((tmp_path / "results.json").read_text())
    assert 0.3 < result["gold"]["start"] < 0.6
    written = (tmp_path / "seed_0/vanilla" / FINISHED).stat().st_mtime_ns
    main(command)
    assert (tmp_path / "seed_0/vanilla" / FINISHED).stat().st_mtime_ns == written


def test_stages_and_arms_are_runs_of_ppomax() -> None:
    assert [command_of(run) for run in STAGES] == ["sft", "sft", "reward", "critic"]
    assert {command_of(arm) for arm in ARMS} == {"ppo"}
