"""Manifests, publication and retention of checkpoint folders, without a model."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ppomax.engine.checkpoint_folders import (
    Publication,
    Retention,
    list_checkpoints,
    partial_of,
    remove_leftovers,
    step_folder,
    superfluous,
)
from ppomax.engine.checkpoint_manifest import FileRecord, find_fault, read_manifest, share_of, write_manifest
from ppomax.engine.errors import CheckpointError

PUBLISH = """
import os, signal, sys
from pathlib import Path
from ppomax.engine.checkpoint_folders import Publication, Retention, partial_of, step_folder

folder, call, step = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
count = 0

def killing(function):
    def call_or_die(*args):
        global count
        count += 1
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return call_or_die

os.fsync, os.rename, os.replace = killing(os.fsync), killing(os.rename), killing(os.replace)
final = step_folder(folder, step)
Publication(partial_of(final), final, {}, Retention(2)).run()
print(count)
"""


def fill(folder: Path, step: int, **state: object) -> tuple[Path, Path]:
    final = step_folder(folder, step)
    partial = partial_of(final)
    (partial / "policy").mkdir(parents=True)
    (partial / "policy" / "__0_0.distcp").write_bytes(bytes(range(step, step + 50)))
    (partial / "state.json").write_text(json.dumps({"step": step, **state}))
    return partial, final


def publish(folder: Path, step: int, keep: int = 100, **state: object) -> Path:
    partial, final = fill(folder, step, **state)
    Publication(partial, final, {}, Retention(keep)).run()
    return final


def is_whole(checkpoint: Path) -> bool:
    return all(find_fault(checkpoint, name, record) is None for name, record in read_manifest(checkpoint).items())


def test_a_published_checkpoint_has_all_files_in_its_manifest_and_is_the_latest(tmp_path: Path) -> None:
    final = publish(tmp_path, 3)
    assert sorted(read_manifest(final)) == ["policy/__0_0.distcp", "state.json"]
    assert is_whole(final)
    assert (tmp_path / "latest").read_text() == "step_00000003\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000003"]


def test_a_publisher_killed_at_any_call_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    """Before the folder has its name, between name and pointer, and while old ones are removed."""
    seen = set()
    for call in itertools.count(1):
        folder = tmp_path / str(call)
        for step in (1, 2):
            publish(folder, step)
        fill(folder, 3)
        done = subprocess.run(
            [sys.executable, "-c", PUBLISH, str(folder), str(call), "3"], capture_output=True, text=True
        )
        if done.returncode == 0:  # it has no such call any more
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        names = [path.name for path in list_checkpoints(folder)]
        assert names in (
            ["step_00000001", "step_00000002"],
            ["step_00000001", "step_00000002", "step_00000003"],
            ["step_00000002", "step_00000003"],
        )
        assert all(is_whole(path) for path in list_checkpoints(folder))
        pointer = (folder / "latest").read_text().strip()
        assert (folder / pointer).is_dir()
        seen.add((names[-1], pointer))
        remove_leftovers(folder)
        assert publish(folder, 4).is_dir()
    # Among them the crash between folder and pointer.
    assert ("step_00000003", "step_00000002") in seen
    assert ("step_00000002", "step_00000002") in seen


def test_a_manifest_that_lost_a_file_is_damaged(tmp_path: Path) -> None:
    final = publish(tmp_path, 1)
    path = final / "manifest.json"
    content = json.loads(path.read_text())
    del content["files"]["state.json"]
    path.write_text(json.dumps(content, indent=1) + "\n")
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        read_manifest(final)


def test_readers_share_the_files_by_size() -> None:
    records = {name: FileRecord(size, "") for name, size in {"a": 5, "b": 90, "c": 60, "d": 30}.items()}
    assert [share_of(records, part, 2) for part in range(2)] == [["b", "a"], ["c", "d"]]
    assert share_of(records, 5, 6) == []


def test_a_fault_names_file_expected_and_found(tmp_path: Path) -> None:
    write_manifest(tmp_path, {})
    (tmp_path / "x").write_bytes(b"1234")
    assert find_fault(tmp_path, "x", FileRecord(5, "")) == f"{tmp_path / 'x'}: expected 5 bytes, found 4"
    assert "expected SHA-256 00, found 03ac67421" in str(find_fault(tmp_path, "x", FileRecord(4, "00")))
    assert "found no such file" in str(find_fault(tmp_path, "y", FileRecord(4, "00")))


def test_the_newest_every_fifth_and_the_best_stay(tmp_path: Path) -> None:
    rewards = {4: 0.1, 6: 0.9, 7: 0.5, 8: None, 9: 0.9}
    for step in range(1, 13):
        evaluation = {"evaluation": {"reward": rewards[step]}} if step in rewards else {}
        publish(tmp_path, step, **evaluation)

    def kept(retention: Retention, *protected: int) -> list[int]:
        gone = superfluous(tmp_path, retention, [step_folder(tmp_path, step) for step in protected])
        return [int(path.name[5:]) for path in list_checkpoints(tmp_path) if path not in gone]

    assert kept(Retention(2)) == [11, 12]
    assert kept(Retention(1, every_steps=5)) == [5, 10, 12]
    assert kept(Retention(1, num_best=1, metric="reward")) == [6, 12]
    assert kept(Retention(1, num_best=2, metric="reward")) == [6, 9, 12]
    assert kept(Retention(1, num_best=1, metric="reward", is_lower_better=True)) == [4, 12]
    assert kept(Retention(1, num_best=1, metric="loss")) == [12]
    assert kept(Retention(1), 3) == [3, 12]


def test_checkpoints_that_the_run_did_not_go_on_from_are_set_aside_not_removed(tmp_path: Path) -> None:
    old = [publish(tmp_path, step) for step in (1, 2, 3)]
    partial, final = fill(tmp_path, 2)
    Publication(partial, final, {}, Retention(1), superseded=(old[1], old[2])).run()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000002"]
    aside = [tmp_path / f"step_0000000{step}.superseded-1" for step in (2, 3)]
    assert all(is_whole(path) for path in [*aside, final])


def test_a_removed_checkpoint_loses_its_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path, 1)
    names = []
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: (names.append(Path(b).name), rename(a, b)))
    publish(tmp_path, 2, keep=1)
    assert names == ["step_00000002", ".step_00000001.removed"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000002"]
