"""A run folder belongs to one run at a time, and each step is in its records once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ppomax.engine.config import RunConfig
from ppomax.engine.config_file import write_config
from ppomax.engine.errors import ConfigError
from ppomax.engine.metrics import RunLog
from ppomax.engine.run_records import drop_later, is_same_run, last_rollback, lock_folder

HOLD = """
import os, sys
from pathlib import Path
from ppomax.engine.run_records import lock_folder
file = lock_folder(Path(sys.argv[1]))
if os.fork() == 0:  # such as a writer or a sampling engine, which may outlive it
    os.close(1)
    import time
    time.sleep(3)
    os._exit(0)
print("held", flush=True)
sys.stdin.read()
"""


def lines(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_folder_in_use_is_refused_until_the_other_process_is_gone(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=rf"in use by a run that has not ended \(process {other.pid} on "):
        lock_folder(tmp_path)
    other.kill()
    other.wait()
    lock_folder(tmp_path).close()


def test_records_after_the_resumed_step_are_moved_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 2, 3, 4)) + '{"step": 5, "lo')
    drop_later(path, 2)
    assert lines(path) == [1, 2, 2]
    assert (tmp_path / "metrics.superseded.jsonl").read_text() == '{"step": 3}\n{"step": 4}\n{"step": 5, "lo\n'
    drop_later(path, 2)
    assert lines(path) == [1, 2, 2]


def test_what_came_before_a_rollback_stays(tmp_path: Path) -> None:
    """Steps 1 to 4, back to 2, 3 to 5, and a resume from 2, 3 or 5, or a kill at the rollback's own line."""
    rows = [{"kind": "ppo", "step": step} for step in (1, 2, 3, 4)]
    rows += [{"kind": "event", "step": 4, "samples": "text of a model\u2028\x85"}]
    rows += [{"kind": "rollback", "step": 2, "constraint": {"kl_factor": 2.0}}]
    rows += [{"kind": "ppo", "step": step} for step in (3, 4, 5)]
    path = tmp_path / "metrics.jsonl"
    for step, num_kept in ((5, 9), (4, 8), (3, 7), (2, 6), (1, 1)):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + '{"step": 6, "lo')
        assert last_rollback(path, step) == (rows[5] if step == 2 else None)
        drop_later(path, step)
        kept = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        assert kept == rows[:num_kept]
        assert last_rollback(path, step) == (rows[5] if step == 2 else None)
    assert last_rollback(tmp_path / "nothing", 2) is None


def config(folder: Path, **train: object) -> RunConfig:
    return RunConfig.model_validate({"train": {"output": str(folder), "resume": "auto", **train}})


def log_of(folder: Path, *, step: int | None = None, **train: object) -> RunLog:
    return RunLog(config(folder, **train), "sft", is_writer=True, resumed=step is not None, resumed_step=step)


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    first = log_of(tmp_path)
    for step in (1, 2, 3):
        first.step(step, 4, {"loss": 1.0})
    second = log_of(tmp_path, step=2)
    assert lines(tmp_path / "metrics.jsonl") == [1, 2, 3]  # until there is something new
    for step in (3, 4):
        second.step(step, 4, {"loss": 2.0})
    assert lines(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]


def test_a_run_killed_before_its_first_checkpoint_starts_again_in_its_folder(tmp_path: Path) -> None:
    log_of(tmp_path).step(1, 4, {"loss": 1.0})
    log_of(tmp_path, log_every=2).step(1, 4, {"loss": 2.0})
    assert [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [2.0]
    assert lines(tmp_path / "metrics.superseded.jsonl") == [1]
    with pytest.raises(ConfigError, match="without a checkpoint, which had another configuration"):
        log_of(tmp_path, seed=7)


def test_a_checkpoint_of_another_run_does_not_go_on_in_a_folder_with_records(tmp_path: Path) -> None:
    theirs, output = tmp_path / "theirs" / "checkpoints" / "step_00000002", tmp_path / "run"
    log_of(output, step=2, resume=str(theirs)).step(3, 4, {"loss": 1.0})
    # The same command again, as torchrun repeats it, and checkpoints of its own.
    again = log_of(output, step=2, resume=str(theirs))
    again.step(3, 4, {"loss": 2.0})
    again.step(4, 4, {"loss": 2.0})
    log_of(output, step=3, resume=str(output / "checkpoints" / "step_00000003")).step(4, 4, {"loss": 3.0})
    assert lines(output / "metrics.jsonl") == [3, 4]
    for other in (theirs, theirs.with_name("step_00000004")):
        with pytest.raises(ConfigError, match=r"already holds a run, and train\.resume = .* is no checkpoint of it"):
            log_of(output, step=2, resume=str(other))
    assert lines(output / "metrics.jsonl") == [3, 4]


def test_what_may_change_within_a_run(tmp_path: Path) -> None:
    write_config(config(tmp_path), tmp_path / "config.toml")
    assert is_same_run(config(tmp_path / "moved", log_every=5), tmp_path)
    assert not is_same_run(config(tmp_path, seed=7), tmp_path)
    assert not is_same_run(config(tmp_path), tmp_path / "nothing")
