"""`make reproduce`: the paper's figures in small, on two CPU cores.

`python -m ppomax.tools.reproduce OUTPUT [--seeds 0 1] [--arms vanilla ppo_max] [--only-report]` makes for each seed
data, an SFT model, a reward model and a critic, runs every arm of `reproduce_arms.py` from them, each in a process of
its own on one thread, and writes a report. A run that is finished is kept: the same command goes on where it was
interrupted. A run that was begun and not finished is begun again.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ppomax.engine.config import MonitorConfig, RunConfig
from ppomax.engine.config_file import load_config
from ppomax.engine.errors import ConfigError, PpomaxError
from ppomax.engine.stage import stage_function
from ppomax.tools.reproduce_arms import ARMS, NUM_ITERATIONS, STAGES, arm_config, stage_config
from ppomax.tools.reproduce_report import FITTED_SEEDS, MAIN_ARMS, write_report
from ppomax.tools.reproduce_results import FINISHED
from ppomax.tools.reproduce_task import write_data

UNSEEN_SEEDS = (3, 4, 5)
PREPARE = "prepare"


@dataclass(frozen=True)
class Job:
    """What one process does: an arm of a seed, or PREPARE, the stages that the arms of a seed start from."""

    seed: int
    name: str
    num_iterations: int = NUM_ITERATIONS

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def runs(self) -> tuple[str, ...]:
        return STAGES if self.name == PREPARE else (self.name,)

    def config(self, run: str, output: Path) -> RunConfig:
        folder = seed_folder(output, self.seed)
        if run in STAGES:
            return stage_config(folder, run, self.seed)
        return arm_config(folder, run, self.seed, num_iterations=self.num_iterations)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of all runs and of the report")
    parser.add_argument("--seeds", type=int, nargs="+", default=[*FITTED_SEEDS, *UNSEEN_SEEDS])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="default: all on seeds 0 to 2, two on the others")
    parser.add_argument("--iterations", type=int, default=NUM_ITERATIONS, help="of PPO in each run")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    parser.add_argument("--only-report", action="store_true", help="of the runs that are finished")
    parser.add_argument("--job", nargs=2, metavar=("SEED", "NAME"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    output = arguments.output
    if arguments.job is not None:
        run_job(Job(int(arguments.job[0]), arguments.job[1], arguments.iterations), output)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs under way are ended, too
    if not arguments.only_report:
        arms = plan(arguments.seeds, arguments.arms)
        run_all([Job(seed, name, arguments.iterations) for seed, name in arms], output, arguments.processes)
    print(f"wrote {write_report(output)}")


def plan(seeds: Sequence[int], arms: Sequence[str] | None) -> list[tuple[int, str]]:
    """(seed, arm) of every run, the main arms first: what matters most is there soonest."""
    main = [(seed, name) for seed in seeds for name in MAIN_ARMS if arms is None or name in arms]
    others = [name for name in ARMS if name not in MAIN_ARMS]
    others = others if arms is None else [name for name in others if name in arms]
    rest = [(seed, name) for seed in seeds for name in others if arms is not None or seed not in UNSEEN_SEEDS]
    return main + rest


def seed_folder(output: Path, seed: int) -> Path:
    return output / f"seed_{seed}"


def is_finished(job: Job, output: Path) -> bool:
    """Whether its folders hold whole runs with the settings of today."""
    return all(_is_whole(job, run, output) for run in job.runs)


def run_job(job: Job, output: Path) -> None:
    """In this process, on one thread; runs that are finished are kept."""
    wall, cpu = time.perf_counter(), 0.0  # imports count for the first run
    import torch

    torch.set_num_threads(1)
    for run in job.runs:
        if _is_whole(job, run, output):
            continue
        folder = seed_folder(output, job.seed) / run
        if run in STAGES:
            _drop_what_follows(run, folder.parent)
        if run == STAGES[0]:
            write_data(folder.parent / "data", job.seed)
        if folder.exists():
            shutil.rmtree(folder)  # of a run that was interrupted, or had other settings
        stage_function(command_of(run))(job.config(run, output))
        seconds = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        wall, cpu = time.perf_counter(), time.process_time()
        unfinished = folder / f"{FINISHED}.new"
        unfinished.write_text(json.dumps(seconds))
        unfinished.replace(folder / FINISHED)


def _drop_what_follows(stage: str, folder: Path) -> None:
    """Runs that started from an earlier run of this stage count no longer. folder: of the seed."""
    before = STAGES[: STAGES.index(stage)]
    for marker in folder.glob(f"*/{FINISHED}"):
        if marker.parent.name not in before:
            marker.unlink()


def command_of(run: str) -> str:
    """The stage of ppomax that a run is."""
    return {"base": "sft"}.get(run, run) if run in STAGES else "ppo"


def _is_whole(job: Job, run: str, output: Path) -> bool:
    folder = seed_folder(output, job.seed) / run
    if not (folder / FINISHED).is_file():
        return False
    try:
        before = load_config(str(folder / "config.toml"), [], command=command_of(run))
    except ConfigError:
        return False
    return _without_monitor(before) == _without_monitor(job.config(run, output))


def _without_monitor(config: RunConfig) -> RunConfig:
    """The monitor changes no run: it only warns, and is replayed for the report. What it evaluates does."""
    monitor = MonitorConfig(eval_every=config.monitor.eval_every, eval_size=config.monitor.eval_size)
    return config.model_copy(update={"monitor": monitor})


def run_all(wanted: Sequence[Job], output: Path, num_processes: int) -> None:
    """All jobs, after the preparation of their seeds, some at a time. Raises PpomaxError where one fails, after those
    that were under way with it.
    """
    output.mkdir(parents=True, exist_ok=True)
    jobs = list(dict.fromkeys(each for job in wanted for each in (Job(job.seed, PREPARE), job)))
    prepared = {job.seed for job in jobs if job.name == PREPARE and is_finished(job, output)}
    finished = {job for job in jobs if job.seed in prepared and is_finished(job, output)}
    waiting = [job for job in jobs if job not in finished]
    print(f"{len(jobs)} jobs, {len(finished)} of them finished before", flush=True)
    running: dict[Job, subprocess.Popen[bytes]] = {}
    failed: list[Job] = []
    try:
        while running or (waiting and not failed):
            ready = [job for job in waiting if job.name == PREPARE or Job(job.seed, PREPARE) in finished]
            for job in ready[: num_processes - len(running)] if not failed else ():
                waiting.remove(job)
                running[job] = _start(job, output)
            time.sleep(0.2)
            for job in [job for job, process in running.items() if process.poll() is not None]:
                if running.pop(job).returncode == 0:
                    finished.add(job)
                    print(f"{len(finished)}/{len(jobs)} {job}: {_seconds(job, output):.0f} CPU s", flush=True)
                else:
                    failed.append(job)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    if failed:
        raise PpomaxError(
            f"{failed[0]} failed: {_log(failed[0], output)} says why; the same command goes on with what is left"
        )


def _seconds(job: Job, output: Path) -> float:
    folders = [seed_folder(output, job.seed) / run for run in job.runs]
    return sum(float(json.loads((folder / FINISHED).read_text())["cpu_seconds"]) for folder in folders)


def _start(job: Job, output: Path) -> "subprocess.Popen[bytes]":
    log = _log(job, output)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "ppomax.tools.reproduce", str(output), "--job", str(job.seed), job.name]
    command += ["--iterations", str(job.num_iterations)]
    with log.open("wb") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )


def _log(job: Job, output: Path) -> Path:
    return seed_folder(output, job.seed) / "logs" / f"{job.name}.txt"


if __name__ == "__main__":
    main()
