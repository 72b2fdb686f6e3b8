"""`make reproduce`: the paper's figures in small, on two CPU cores.

`python -m ppomax.tools.reproduce OUTPUT [--seeds 0 1] [--arms vanilla ppo_max] [--only-report]` makes for each seed
data, an SFT model, a reward model and a critic, runs every arm of `reproduce_arms.py` from them, each in a process of
its own on one thread, and writes a report. A run that is finished is kept: the same command goes on where it was
interrupted. A run that was begun and not finished is begun again.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from ppomax.engine.errors import PpomaxError
from ppomax.tools.reproduce_arms import ARMS, NUM_ITERATIONS
from ppomax.tools.reproduce_jobs import PREPARE, Job, is_finished, log_file, run_job_with_log, seconds_of
from ppomax.tools.reproduce_report import FITTED_SEEDS, MAIN_ARMS, write_report

UNSEEN_SEEDS = (3, 4, 5, 9, 10, 11)
"""The limits do not come from them. How limits come about was chosen in sight of the runs on 0 to 8: the last three are
new in every respect.
"""
PRELOADED = (
    *(f"ppomax.engine.train_{stage}" for stage in ("sft", "reward", "critic", "ppo")),
    "ppomax.tools.reproduce_jobs",
)
"""Imported once, by the process that those of the runs are forked from: it takes as long as a third of a run."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of all runs and of the report")
    parser.add_argument("--seeds", type=int, nargs="+", default=[*FITTED_SEEDS, *UNSEEN_SEEDS])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="default: all on seeds 0 to 2, two on the others")
    parser.add_argument("--iterations", type=int, default=NUM_ITERATIONS, help="of PPO in each run")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    parser.add_argument("--only-report", action="store_true", help="of the runs that are finished")
    arguments = parser.parse_args(argv)
    output = arguments.output
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
    running: dict[Job, BaseProcess] = {}
    failed: list[Job] = []
    try:
        while running or (waiting and not failed):
            ready = [job for job in waiting if job.name == PREPARE or Job(job.seed, PREPARE) in finished]
            for job in ready[: num_processes - len(running)] if not failed else ():
                waiting.remove(job)
                running[job] = _start(job, output)
            time.sleep(0.2)
            for job in [job for job, process in running.items() if not process.is_alive()]:
                if running.pop(job).exitcode == 0:
                    finished.add(job)
                    print(f"{len(finished)}/{len(jobs)} {job}: {seconds_of(job, output):.0f} CPU s", flush=True)
                else:
                    failed.append(job)
    finally:
        for process in running.values():
            process.kill()  # what is begun is begun again: a checkpoint would be of no use
        for process in running.values():
            process.join()
    if failed:
        raise PpomaxError(
            f"{failed[0]} failed: {log_file(failed[0], output)} says why; the same command goes on with what is left"
        )


def _start(job: Job, output: Path) -> BaseProcess:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning")  # of megatron, about packages that are not there
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED])
    process = context.Process(target=run_job_with_log, args=(job, output), name=str(job))
    process.start()
    return process


if __name__ == "__main__":
    main()
