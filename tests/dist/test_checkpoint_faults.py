"""Whole stages whose saves go wrong: a full disk, a killed rank or writer, a damaged newest checkpoint."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from ppomax.engine.checkpoint_folders import list_checkpoints
from ppomax.engine.checkpoint_manifest import find_fault, read_manifest

pytestmark = [pytest.mark.dist, pytest.mark.slow]
OnRanks = Callable[..., list[Any]]


def run_stage(config: dict[str, Any]) -> tuple[str, str]:
    """What SFT printed, and its error."""
    from ppomax.engine.config import RunConfig

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            import_module("ppomax.engine.train_sft").run(RunConfig.model_validate(config))
        except Exception as error:
            return printed.getvalue(), f"{type(error).__name__}: {error}"
    return printed.getvalue(), ""


def die_in_second_copy(config: dict[str, Any]) -> None:
    """Rank 1 is killed when half of the second checkpoint's tensors are in its writer's memory."""
    from ppomax.engine.checkpoint_writers import SharedMemory

    os.environ["PPOMAX_TEST_MARK"] = config["train"]["output"]  # for `writers`
    copy, calls = SharedMemory.copy, []

    def copy_or_die(self: Any, tensors: Any) -> Any:
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) == 2:
            copy(self, tensors[: len(tensors) // 2])
            assert writers(config["train"]["output"])
            os.kill(os.getpid(), signal.SIGKILL)
        return copy(self, tensors)

    SharedMemory.copy = copy_or_die  # type: ignore[method-assign]
    run_stage(config)


def kill_writer_in_second_save(config: dict[str, Any]) -> tuple[str, str]:
    from ppomax.engine.checkpoint_writers import ProcessWriter

    start, calls = ProcessWriter.start, []

    def start_and_kill(self: Any) -> None:
        start(self)
        calls.append(1)
        if len(calls) == 2:
            os.kill(self._process.pid, signal.SIGKILL)

    ProcessWriter.start = start_and_kill  # type: ignore[method-assign]
    try:
        return run_stage(config)
    finally:
        ProcessWriter.start = start  # type: ignore[method-assign]


def sft(tiny: Any, output: Path, steps: int, **checkpoint: Any) -> dict[str, Any]:
    train = {"steps": steps, "resume": "auto"}
    return tiny.config("sft", output, train=train, data={"eval": ()}, checkpoint={"every": 1, "keep": 9, **checkpoint})


def whole(output: Path) -> list[str]:
    """The published checkpoints, all of whose files are as their manifests say."""
    found = list_checkpoints(output / "checkpoints")
    for path in found:
        assert [find_fault(path, name, record) for name, record in read_manifest(path).items()] == [
            None for _ in read_manifest(path)
        ]
    return [path.name for path in found]


def steps_recorded(output: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def writers(mark: str) -> list[str]:
    """Processes whose environment has a mark and that are writers, ended ones left out: those have no command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_writer = b"ppomax.engine.checkpoint_process" in (path / "cmdline").read_bytes()
            if is_writer and mark.encode() in (path / "environ").read_bytes():
                found.append(path.name)
    return found


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "ppomax-test", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize(
    ("num_ranks", "checkpoint"),
    [(2, {"asynchronous": True}), (1, {"asynchronous": False}), (1, {"hf": True})],
    ids=["asynchronous", "synchronous", "export"],
)
def test_a_full_disk_ends_the_run_and_once_there_is_space_it_goes_on(
    on_ranks: OnRanks, tiny: Any, small_disk: Path, num_ranks: int, checkpoint: dict[str, bool]
) -> None:
    output = small_disk / "run"
    done = on_ranks(num_ranks, run_stage, sft(tiny, output, 1, **checkpoint))
    assert [error for _, error in done] == [""] * num_ranks
    shutil.rmtree(output / "hf")  # so that the run is one that was stopped
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 150_000))
    errors = [error for _, error in on_ranks(num_ranks, run_stage, sft(tiny, output, 4, **checkpoint))]
    first = errors[0]
    assert first.startswith("CheckpointError: ")
    assert "No space left on device" in first
    assert "step_00000002" in first
    assert "check the free space" in first
    if "hf" not in checkpoint:
        assert f"resume from {output / 'checkpoints' / 'step_00000001'}" in first
    assert len(set(errors)) == 1
    assert whole(output) == ["step_00000001"]
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["latest", "step_00000001"]
    ballast.unlink()
    done = on_ranks(num_ranks, run_stage, sft(tiny, output, 4, **checkpoint))
    assert [error for _, error in done] == [""] * num_ranks
    assert whole(output) == [f"step_0000000{step}" for step in (1, 2, 3, 4)]
    assert steps_recorded(output) == [1, 2, 3, 4]


def test_a_rank_killed_while_it_copies_leaves_the_checkpoint_before_and_no_writer(
    on_ranks: OnRanks, tiny: Any, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    with pytest.raises(RuntimeError, match="rank 1 died"):
        on_ranks(2, die_in_second_copy, sft(tiny, output, 3))
    deadline = time.monotonic() + 30
    while writers(str(output)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert whole(output) == ["step_00000001"]
    assert [error for _, error in on_ranks(2, run_stage, sft(tiny, output, 3))] == ["", ""]
    assert whole(output) == [f"step_0000000{step}" for step in (1, 2, 3)]
    assert steps_recorded(output) == [1, 2, 3]


def test_a_run_whose_writer_is_killed_ends_with_its_exit_code_and_goes_on_when_started_again(
    on_ranks: OnRanks, tiny: Any, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    ((_, error),) = on_ranks(1, kill_writer_in_second_save, sft(tiny, output, 4))
    assert error.startswith(f"CheckpointError: cannot write the checkpoint {output / 'checkpoints' / 'step_00000002'}")
    assert "the writer process ended by itself (exit code -9)" in error
    assert error.endswith(f"then resume from {output / 'checkpoints' / 'step_00000001'}")
    assert whole(output) == ["step_00000001"]
    assert on_ranks(1, run_stage, sft(tiny, output, 4))[0][1] == ""
    assert whole(output) == [f"step_0000000{step}" for step in (1, 2, 3, 4)]


def test_auto_tells_that_the_newest_checkpoint_is_damaged_and_repeats_its_step(
    on_ranks: OnRanks, tiny: Any, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    on_ranks(1, run_stage, sft(tiny, output, 2))
    before = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    newest = output / "checkpoints" / "step_00000002"
    (file,) = newest.glob("policy/*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    ((printed, error),) = on_ranks(1, run_stage, sft(tiny, output, 2))
    assert error == ""
    assert f"WARNING: checkpoint {newest} is damaged: {file}: expected SHA-256 " in printed
    assert f"WARNING: going on from {newest.with_name('step_00000001')}, the newest that is whole" in printed
    after = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line | {"seconds": 0} for line in after] == [line | {"seconds": 0} for line in before]
    assert whole(output) == ["step_00000001", "step_00000002"]
    assert newest.with_name("step_00000002.superseded-1").is_dir()


def test_the_checkpoint_with_the_best_held_out_loss_stays(on_ranks: OnRanks, tiny: Any, tmp_path: Path) -> None:
    output = tmp_path / "run"
    config = sft(tiny, output, 4, keep=1, keep_best=1)
    config |= {"data": {**config["data"], "eval": tiny.path("dialogues.jsonl")}, "monitor": {"eval_every": 1}}
    config["optim"] = {**config["optim"], "lr": 0.3}  # it gets worse
    assert on_ranks(1, run_stage, config)[0][1] == ""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if line["kind"] == "evaluation"}
    best = min(losses, key=losses.__getitem__)
    assert sorted(losses) == [1, 2, 3, 4]
    assert best < 4
    assert whole(output) == [f"step_{step:08d}" for step in (best, 4)]
