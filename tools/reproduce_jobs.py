"""The runs of `make reproduce` one by one: what a job is, whether it is done, and doing it, in the process it is in.

A run that is finished has a file that says so, with the seconds it took. One that was begun and not finished is begun
again.
"""

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ppomax.engine.config import RunConfig
from ppomax.engine.config_file import load_config
from ppomax.engine.config_monitor import MonitorConfig
from ppomax.engine.errors import ConfigError
from ppomax.engine.stage import stage_function
from ppomax.tools.reproduce_arms import NUM_ITERATIONS, STAGES, arm_config, stage_config
from ppomax.tools.reproduce_results import FINISHED
from ppomax.tools.reproduce_task import write_data

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


def seed_folder(output: Path, seed: int) -> Path:
    return output / f"seed_{seed}"


def log_file(job: Job, output: Path) -> Path:
    return seed_folder(output, job.seed) / "logs" / f"{job.name}.txt"


def is_finished(job: Job, output: Path) -> bool:
    """Whether its folders hold whole runs with the settings of today."""
    return all(_is_whole(job, run, output) for run in job.runs)


def run_job(job: Job, output: Path) -> None:
    """In this process, on one thread; runs that are finished are kept."""
    import torch

    wall, cpu = time.perf_counter(), time.process_time()
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


def run_job_with_log(job: Job, output: Path) -> None:
    """The whole of a process: `run_job` with what it prints in its log file."""
    log = log_file(job, output)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    run_job(job, output)


def seconds_of(job: Job, output: Path) -> float:
    """CPU seconds that a finished job took."""
    folders = [seed_folder(output, job.seed) / run for run in job.runs]
    return sum(float(json.loads((folder / FINISHED).read_text())["cpu_seconds"]) for folder in folders)
