"""SIGTERM and SIGUSR1: the step ends, a checkpoint is written, exit code 0; or the process ends in time without one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ppomax.engine import train_sft
from ppomax.engine.config import RunConfig
from ppomax.engine.errors import ENDED_BY_SIGTERM, RunStopped
from ppomax.engine.models.hf_reader import SafetensorsReader
from ppomax.engine.steps import language_model_gradients

WAITING = """
import sys, torch.distributed as dist
from ppomax.engine.parallel.stop_signal import StopSignal
with StopSignal(float(sys.argv[1])):
    print("waiting", flush=True)
    dist.HashStore().get("what never comes")  # in C++: no handler of Python runs
"""

ASKED_AGAIN = """
import time
from ppomax.engine.cli import leave
from ppomax.engine.parallel.stop_signal import StopSignal
with StopSignal(60.0) as stop:
    print("waiting", flush=True)
    while not stop.asked:
        time.sleep(0.01)
time.sleep(0.3)
leave(0)
"""


@pytest.fixture
def signal_in_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, signal.Signals], None]:
    """signal_in_step(2, SIGTERM): this process gets SIGTERM in the second step of SFT."""

    def arrange(step: int, signum: signal.Signals) -> None:
        calls = iter(range(1, 1000))

        def compute(*args: Any) -> float:
            if next(calls) == step:
                os.kill(os.getpid(), signum)
            return language_model_gradients(*args)

        monkeypatch.setattr(train_sft, "language_model_gradients", compute)

    return arrange


def records(output: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_as_if_it_had_not_stopped(
    tiny: Any, tmp_path: Path, signal_in_step: Callable[..., None], signum: signal.Signals
) -> None:
    def config(name: str, resume: str) -> RunConfig:
        train = {"steps": 4, "resume": resume}
        return RunConfig.model_validate(tiny.config("sft", tmp_path / name, train=train, checkpoint={"every": 0}))

    before = signal.getsignal(signum)
    train_sft.run(config("straight", "never"))
    signal_in_step(2, signum)
    with pytest.raises(RunStopped, match=rf"stopped after step 2, as {signum.name} asked: wrote .*step_00000002; "):
        train_sft.run(config("stopped", "auto"))
    assert callable(signal.getsignal(signum))  # the request may come again, until the process has ended
    signal.signal(signum, before)
    assert not (tmp_path / "stopped/hf").exists()
    train_sft.run(config("stopped", "auto"))
    assert records(tmp_path / "stopped") == records(tmp_path / "straight")
    ours, theirs = (SafetensorsReader(str(tmp_path / name / "hf")) for name in ("stopped", "straight"))
    assert all(torch.equal(ours.read(name), theirs.read(name)) for name in theirs.sizes)


@pytest.fixture
def waiting() -> Any:
    """waiting(grace) starts a process that waits in C++ for ever, and listens."""
    started = []

    def start(grace: float) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", WAITING, str(grace)], stdout=-1, stderr=-1, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_process_that_ends_no_step_in_time_after_sigterm_ends_without_saving(waiting: Any) -> None:
    process = waiting(1)
    process.send_signal(signal.SIGUSR1)  # which asks for no haste
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=20)
    assert process.returncode == ENDED_BY_SIGTERM
    assert "no step ended within train.stop_seconds = 1 of SIGTERM: ends without saving" in printed


def test_a_second_sigterm_ends_at_once_but_not_one_that_is_passed_on_twice(waiting: Any) -> None:
    process = waiting(60)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    time.sleep(5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=20)
    assert process.returncode == ENDED_BY_SIGTERM
    assert "a second SIGTERM: ends without saving" in printed


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_that_comes_again_while_the_process_ends_is_no_failure(signum: signal.Signals) -> None:
    """A scheduler signals ranks, and so does node.sh."""
    process = subprocess.Popen([sys.executable, "-c", ASKED_AGAIN], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signum)
        time.sleep(0.002)
    assert process.wait(1) == 0
