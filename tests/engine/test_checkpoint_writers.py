"""The writer process of a rank: what it writes, what its faults look like, and that it ends with the rank."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ppomax.engine.checkpoint_folders import Publication, Retention, partial_of, step_folder
from ppomax.engine.checkpoint_manifest import read_manifest, record_of
from ppomax.engine.checkpoint_writers import InlineWriter, ProcessWriter

RANK = """
import sys, time
from pathlib import Path
import torch
from ppomax.engine.checkpoint_writers import ProcessWriter

writer = ProcessWriter()
writer.add(Path(sys.argv[1]), (torch.ones(4 << 20),))
writer.start()
writer.answer(120)
print(writer._process.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def writer() -> Iterator[ProcessWriter]:
    """One for all tests that leave it alive: a process takes seconds to start."""
    made = ProcessWriter()
    yield made
    made.close()


def some_tensors(seed: int) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    whole = torch.randn(40, 6, generator=draw)
    return whole[3:7], whole[:, 2], whole.bfloat16(), torch.tensor(5), torch.empty(0, 4), torch.arange(9).view(3, 3)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_tensors_are_written_as_they_were_and_memory_and_process_serve_every_save(
    writer: ProcessWriter, tmp_path: Path
) -> None:
    process, fds = None, None
    for turn in range(3):
        tensors = some_tensors(turn)
        expected = [tensor.clone() for tensor in tensors]
        path = tmp_path / str(turn)
        writer.add(path, tensors)
        for tensor in tensors:
            tensor.zero_()
        writer.start()
        written = writer.answer(120)
        assert isinstance(written, dict)
        assert written[path].record == record_of(path)
        content = path.read_bytes()
        for (start, length), tensor in zip(written[path].extents, expected, strict=True):
            (tmp_path / "one").write_bytes(content[start : start + length])
            found = torch.load(tmp_path / "one", weights_only=True)
            assert torch.equal(found, tensor)
            assert found.dtype == tensor.dtype
        assert process in (None, writer._process.pid)
        assert fds in (None, open_files())
        process, fds = writer._process.pid, open_files()


def test_both_writers_write_the_same_bytes(writer: ProcessWriter, tmp_path: Path) -> None:
    records = []
    for one in (writer, InlineWriter()):
        path = tmp_path / type(one).__name__
        one.add(path, some_tensors(0))
        one.start()
        answer = one.answer(120)
        assert isinstance(answer, dict)
        records.append(answer[path])
    assert records[0].extents == records[1].extents


@pytest.mark.parametrize("kind", [ProcessWriter, InlineWriter])
def test_a_fault_is_an_answer_and_the_next_save_goes_on(kind: type, tmp_path: Path) -> None:
    one = kind()
    one.add(tmp_path / "missing" / "file", some_tensors(0))
    one.start()
    assert "No such file or directory" in str(one.answer(120))
    one.add(tmp_path / "file", some_tensors(0))
    one.start()
    assert isinstance(one.answer(120), dict)
    one.publish(Publication(tmp_path / "nothing", tmp_path / "final", {}, Retention(1)))
    assert "No such file or directory" in str(one.answer(120))
    one.close()


def test_a_writer_publishes(writer: ProcessWriter, tmp_path: Path) -> None:
    final = step_folder(tmp_path, 1)
    partial_of(final).mkdir()
    (partial_of(final) / "state.json").write_text("{}")
    writer.publish(Publication(partial_of(final), final, {}, Retention(1)))
    assert writer.answer(120) == {}
    assert list(read_manifest(final)) == ["state.json"]


def test_a_killed_writer_is_a_fault_that_says_so(tmp_path: Path) -> None:
    writer = ProcessWriter()
    writer.add(tmp_path / "first", some_tensors(0))
    writer.start()
    assert isinstance(writer.answer(120), dict)
    os.kill(writer._process.pid, signal.SIGSTOP)
    writer.add(tmp_path / "second", some_tensors(0))
    writer.start()
    assert writer.answer(0) is None
    os.kill(writer._process.pid, signal.SIGKILL)
    assert "ended by itself (exit code -9)" in str(writer.answer(120))
    writer.close()


def test_signals_to_the_job_leave_the_writer_at_work(writer: ProcessWriter, tmp_path: Path) -> None:
    for path in (tmp_path / "first", tmp_path / "second"):
        writer.add(path, some_tensors(0))
        writer.start()
        assert isinstance(writer.answer(120), dict)
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(writer._process.pid, signum)


def test_a_closed_writer_leaves_no_process_and_no_file_descriptor(tmp_path: Path) -> None:
    before = open_files()
    one = ProcessWriter()
    one.add(tmp_path / "file", some_tensors(0))
    one.start()
    one.answer(120)
    process = one._process.pid
    one.close()
    assert open_files() == before
    assert not Path(f"/proc/{process}").exists()


def test_a_killed_rank_leaves_no_writer_and_no_open_output(tmp_path: Path) -> None:
    rank = subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path / "file")], stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    process = int(rank.stdout.readline())
    assert Path(f"/proc/{process}").exists()
    rank.kill()
    assert rank.stdout.read() == ""  # returns: nobody else holds the pipe
    rank.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{process}").exists() and Path(f"/proc/{process}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)
