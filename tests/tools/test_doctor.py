"""`ppomax doctor` judges what ranks tell, measures their links, and is held up by no rank that fails."""

import contextlib
import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ppomax.engine.errors import CheckpointError, ConfigError
from ppomax.tools import doctor
from ppomax.tools.doctor_config import judge_folder, see_folder, try_folder
from ppomax.tools.doctor_facts import facts
from ppomax.tools.doctor_findings import GIB, Finding, judge
from ppomax.tools.doctor_links import PEER_BYTES, judge_links


def of(findings: list[Finding], check: str) -> list[Finding]:
    return [one for one in findings if one.check == check]


@pytest.fixture(scope="module")
def own() -> dict[str, Any]:
    """Facts of this machine, made healthy where a test machine may not be."""
    found = facts(0)
    found["limits"] = {"shm": 8 * GIB, "files": 65536, "memory": 64 * GIB, "total_memory": 64 * GIB}
    return found


@pytest.fixture
def two(own: dict[str, Any]) -> list[dict[str, Any]]:
    """Two hosts with one rank each, alike."""
    return [copy.deepcopy(own), copy.deepcopy(own)]


PLACES = ["alpha", "beta"]


def test_two_equal_hosts_have_no_fault(two: list[dict[str, Any]]) -> None:
    assert [one for one in judge(two, PLACES) if one.status != "OK"] == []


def test_a_differing_version_names_ranks_and_hosts(two: list[dict[str, Any]]) -> None:
    two[1]["versions"]["transformers"] = "5.0.0"
    (finding,) = of(judge(two, PLACES), "versions")
    assert finding.status == "FAIL"
    assert "transformers" in finding.found
    assert "5.0.0 on rank 1 (beta)" in finding.found


def test_a_silent_rank_is_named(two: list[dict[str, Any]]) -> None:
    (finding,) = of(judge([two[0], None], PLACES), "ranks")
    assert (finding.status, finding.found) == ("FAIL", "no word from rank 1 (beta)")


@pytest.mark.parametrize(
    ("change", "check", "says"),
    [
        (lambda one: one["limits"].update(shm=64 * 2**20), "shared memory", "beta: 0.1 GiB"),
        (lambda one: one["limits"].update(files=1024), "open files", "beta: 1024"),
        (lambda one: one["limits"].update(memory=2**30), "host memory", "beta: 1.0 of 64.0"),
        (lambda one: one.update(skew=-7.5), "clock", "beta: -7.500 s"),
    ],
    ids=["shm", "files", "memory", "clock"],
)
def test_a_poor_host_gets_a_warning_with_a_fix(
    two: list[dict[str, Any]], change: Callable[[dict[str, Any]], None], check: str, says: str
) -> None:
    change(two[1])
    good, bad = of(judge(two, PLACES), check)
    assert (good.status, bad.status) == ("OK", "WARN")
    assert says in bad.found
    assert bad.fix


def test_loopback_on_several_hosts_fails_and_names_the_interface(two: list[dict[str, Any]]) -> None:
    two[1]["network"].update(one_host=False, gloo_address="127.0.1.1", route=["eth0", "10.0.0.2"])
    failed = [one for one in of(judge(two, PLACES), "network") if one.status == "FAIL"]
    assert len(failed) == 1
    assert "beta: gloo would listen on 127.0.1.1" in failed[0].found
    assert "GLOO_SOCKET_IFNAME=eth0" in failed[0].fix


def test_a_gpu_that_others_use_and_an_old_one_are_warnings(two: list[dict[str, Any]]) -> None:
    gpu = {"name": "G", "capability": "90", "free": 79 * GIB, "total": 80 * GIB, "ecc": "Enabled", "ecc_errors": "0"}
    two[0]["gpu"] = gpu
    two[1]["gpu"] = gpu | {"free": 40 * GIB, "capability": "75", "ecc_errors": "3"}
    findings = judge(two, PLACES)
    assert [one.status for one in of(findings, "GPU of each rank")] == ["WARN"]  # they differ
    assert any("rank 1 (beta): 40.0 of 80.0 GiB free" in one.found for one in of(findings, "GPU memory"))
    assert any("3 uncorrected" in one.found for one in of(findings, "GPU memory"))
    assert any("capability 75" in one.found for one in of(findings, "GPU"))


def test_only_variables_of_the_network_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "secret-1")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    told = json.dumps(facts(0))
    assert "secret-1" not in told
    assert '"NCCL_DEBUG": "WARN"' in told


def test_a_slow_link_among_equals_is_named() -> None:
    seconds = PEER_BYTES["cpu"] / 1e9
    told = [{"all_reduce": {"4096": 1e-3}, "peer": seconds, "failed": ""} for _ in range(4)]
    told[2]["peer"] = 10 * seconds
    (finding,) = of(judge_links(told, ["a"] * 4, "cpu"), "neighbours")
    assert finding.status == "WARN"
    assert "slowest 0.10 GB/s, rank 1 (a) to 2 (a)" in finding.found


def test_space_for_checkpoints_is_counted(tmp_path: Path) -> None:
    told = [try_folder(str(tmp_path / "not" / "there"), 1)]
    assert told[0]["folder"] == str(tmp_path)
    assert not any(tmp_path.iterdir())
    free = told[0]["free"]
    (enough,), (too_little,) = (judge_folder(told, [True], ["a"], needed) for needed in (free // 2, free * 2))
    assert (enough.status, too_little.status) == ("OK", "FAIL")
    assert too_little.error is CheckpointError
    assert judge_folder([told[0] | {"inodes": 3}], [True], ["a"], 0)[0].status == "WARN"


def test_a_folder_that_only_one_host_has_fails(tmp_path: Path) -> None:
    told = [try_folder(str(tmp_path), 0), try_folder(str(tmp_path), 1)]
    assert see_folder(str(tmp_path), told[0]["token"])
    (fault,) = [one for one in judge_folder(told, [True, False], PLACES, 0) if one.status == "FAIL"]
    assert "beta does not see" in fault.found


def run(*arguments: str) -> tuple[int, str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = doctor.main(arguments)
    return code, printed.getvalue()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TORCH_NCCL_BLOCKING_WAIT"):
        monkeypatch.setenv(name, "lo")
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("alone")
def test_one_process_gets_a_table_and_code_0() -> None:
    code, printed = run()
    assert "all-reduce" in printed
    assert "right sums" in printed
    assert (code, dist.is_initialized()) == (0, False)


@pytest.mark.usefixtures("alone")
def test_a_configuration_that_cannot_run_gives_its_exit_code(tiny: Any, tmp_path: Path) -> None:
    code, printed = run("--json", "--stage", "sft", "data.train=nowhere.jsonl", f"model.policy={tmp_path}/no")
    assert code == CheckpointError.exit_code
    failed = [one for one in json.loads(printed)["findings"] if one["status"] == "FAIL"]
    assert [one["error"] for one in failed] == ["CheckpointError"]
    assert "no such folder" in failed[0]["found"]


@pytest.mark.usefixtures("alone")
def test_a_folder_with_a_run_is_a_fault(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    arguments = ["--json", "--stage", "sft", f"data.train={tiny.path('dialogues.jsonl')}", "data.max_length=160"]
    arguments += [f"model.policy={tiny.model('policy')}", f"train.output={tmp_path}"]
    code, printed = run(*arguments)
    assert code == ConfigError.exit_code
    assert "already holds a run" in printed
    assert run(*arguments, "train.resume=auto")[0] == 0
