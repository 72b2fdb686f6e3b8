"""Runs under torchrun that are told to stop, lose torchrun, or lose a rank: no orphans, a checkpoint or none, and the
run goes on exactly.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ppomax.engine.config_help import toml_value

pytestmark = [pytest.mark.dist, pytest.mark.slow]
SECONDS = 240
"""For a run of a few seconds: the machine may be busy."""


class Run:
    """torchrun with two ranks of a stage; output is its run folder."""

    def __init__(self, stage: str, config: dict[str, Any], *torchrun: str, num_ranks: int = 2) -> None:
        self.output = Path(config["train"]["output"])
        arguments = [f"{name}.{key}={toml_value(x)}" for name, part in config.items() for key, x in part.items()]
        preset = ["ppo.preset=none"] if stage in ("critic", "ppo") else []
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        command += [*torchrun, "-m", "ppomax.engine.cli", stage, *preset, *arguments]
        self.log = self.output.with_suffix(f".{time.monotonic_ns()}.log")
        self.agent = subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def printed(self) -> str:
        return self.log.read_text(errors="replace")

    def ranks(self) -> list[int]:
        """Process ids of the ranks, wherever their parent is."""
        found = []
        for path in Path("/proc").iterdir():
            if path.name.isdigit() and int(path.name) != self.agent.pid:
                try:
                    words = (path / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if f"train.output={toml_value(str(self.output))}".encode() in words:
                    found.append(int(path.name))
        return sorted(found)

    def wait_for_step(self, step: int) -> None:
        self._wait(lambda: any(x["step"] >= step for x in records(self.output)), f"step {step}")

    def wait_for_ranks_to_end(self) -> None:
        self._wait(lambda: not self.ranks(), "the end of its ranks")

    def end(self) -> int:
        """The exit code of torchrun."""
        try:
            return self.agent.wait(SECONDS)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the run does not end; printed: {self.printed()[-3000:]}")

    def _wait(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not holds():
            if time.monotonic() > deadline:
                pytest.fail(f"no {what} in time; printed: {self.printed()[-3000:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        for pid in (self.agent.pid, *self.ranks()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.agent.wait()


@pytest.fixture
def start() -> Iterator[Callable[..., Run]]:
    """`Run`, ended when the test ends."""
    runs: list[Run] = []

    def begin(*args: Any, **kwargs: Any) -> Run:
        runs.append(Run(*args, **kwargs))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()


def records(output: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Without times."""
    path = output / name
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]


def checkpoints(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").glob("step_????????"))


def exported(output: Path) -> dict[str, bytes]:
    return {
        f"{file.parent.name} {name}": weight.numpy().tobytes()
        for file in sorted(output.glob("*hf/*.safetensors"))
        for name, weight in load_file(file).items()
    }


def short(tiny: Any, output: Path, parallel: dict[str, Any], **checkpoint: Any) -> dict[str, Any]:
    """Some steps of PPO."""
    ppo = {"rollout_size": 6, "minibatch_size": 3, "epochs": 1, "kl_controller": "adaptive", "kl_horizon": 100}
    train = {"steps": 8, "resume": "auto"}
    return tiny.config("ppo", output, num_layers=2, parallel=parallel, ppo=ppo, train=train, checkpoint=checkpoint)


def test_sigterm_loses_nothing_and_the_run_goes_on_exactly(tiny: Any, tmp_path: Path, start: Any) -> None:
    config = short(tiny, tmp_path / "run", {"tp": 2})
    run = start("ppo", config)
    run.wait_for_step(2)
    run.agent.send_signal(signal.SIGTERM)
    assert run.end() == 1  # torchrun's own
    said = re.findall(r"\[rank (\d)\] ppomax: stopped after step (\d+), as SIGTERM asked: wrote (\S+);", run.printed())
    assert sorted(rank for rank, *_ in said) == ["0", "1"], run.printed()
    assert len({step for _, step, _ in said}) == 1
    step = int(said[0][1])
    assert checkpoints(run.output) == [f"step_{step:08d}"]
    assert records(run.output)[-1]["step"] == step
    again = start("ppo", config)
    assert again.end() == 0, again.printed()
    straight = start("ppo", short(tiny, tmp_path / "straight", {"tp": 2}))
    assert straight.end() == 0
    assert records(run.output) == records(straight.output)
    assert exported(run.output) == exported(straight.output)


@pytest.mark.timeout(900)
def test_torchrun_brings_a_run_back_after_a_killed_rank(tiny: Any, tmp_path: Path, start: Any) -> None:
    """After a checkpoint, and before the first one, when the run begins again."""
    straight = start("ppo", short(tiny, tmp_path / "straight", {}))
    assert straight.end() == 0
    for rank, every in ((0, 1), (1, 0)):
        run = start("ppo", short(tiny, tmp_path / f"run_{every}", {}, every=every), "--max-restarts=1")
        run.wait_for_step(3)
        os.kill(run.ranks()[rank], signal.SIGKILL)
        assert run.end() == 0, run.printed()
        assert bool(checkpoints(run.output)) == bool(every)
        began_again = any(x["step"] == 1 for x in records(run.output, "metrics.superseded.jsonl"))
        assert began_again == (every == 0), run.printed()
        assert records(run.output) == records(straight.output)
        assert exported(run.output) == exported(straight.output)


def endless(tiny: Any, output: Path) -> dict[str, Any]:
    """SFT that ends when it is told to; without checkpoints of its own."""
    return tiny.config("sft", output, train={"steps": 100_000, "resume": "auto"}, data={"eval": ()})


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGKILL])
def test_ranks_whose_torchrun_is_gone_save_and_end(tiny: Any, tmp_path: Path, start: Any, signum: int) -> None:
    run = start("sft", endless(tiny, tmp_path / "run"))
    run.wait_for_step(2)
    ranks = run.ranks()
    assert len(ranks) == 2
    run.agent.send_signal(signum)
    assert run.end() == -signum
    run.wait_for_ranks_to_end()
    assert re.search(r"stopped after step \d+, as SIGTERM asked", run.printed()), run.printed()
    assert len(checkpoints(run.output)) == 1


def test_sigusr1_to_one_rank_stops_all_and_torchrun_ends_with_0(tiny: Any, tmp_path: Path, start: Any) -> None:
    run = start("sft", endless(tiny, tmp_path / "run"))
    run.wait_for_step(2)
    os.kill(run.ranks()[1], signal.SIGUSR1)
    assert run.end() == 0, run.printed()
    assert len(re.findall(r"stopped after step \d+, as SIGUSR1 asked", run.printed())) == 2
    assert not run.ranks()
    assert len(checkpoints(run.output)) == 1


def test_sigterm_after_a_failure_elsewhere_saves_nothing(tiny: Any, tmp_path: Path, start: Any) -> None:
    """torchrun stops the others with SIGTERM: they cannot agree with a rank that is gone."""
    run = start("sft", endless(tiny, tmp_path / "run"))
    run.wait_for_step(2)
    os.kill(run.ranks()[1], signal.SIGKILL)
    began = time.monotonic()
    assert run.end() == 1
    assert time.monotonic() - began < 45
    assert not run.ranks()
    assert checkpoints(run.output) == []
    assert "stopped after step" not in run.printed()
