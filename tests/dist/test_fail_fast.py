"""A rank that dies or raises ends the whole run: no rank waits for it beyond the timeout, and the first failure is
named. Real processes under torchrun, which a long-lived pool of workers could not survive.
"""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ppomax.engine.config_help import toml_value

pytestmark = pytest.mark.dist
TIMEOUT = 30
"""parallel.timeout_seconds of these runs."""
SLACK = 15.0
"""Seconds beyond it: torchrun's own polling, and processes that end on a busy machine."""
FAILING = Path(__file__).with_name("failing_stage.py")
PHASES = ("load", "rollout", "scoring", "experience", "policy_update", "critic_update", "checkpoint", "export")
QUICK = [("rollout", "raise", 1), ("policy_update", "kill", 1)]
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in itertools.product(PHASES, ("raise", "kill"), (0, 1))
]
SPLIT = {
    role: {"num_ranks": 1} if role in ("policy", "reference") else {"first_rank": 1}
    for role in ("policy", "critic", "reference", "reward")
}


def failing_arguments(
    tiny: Any, tmp_path: Path, phase: str, kind: str, rank: int, parallel: dict[str, Any]
) -> list[str]:
    config = tiny.config("ppo", tmp_path / "run", parallel=parallel, checkpoint={"every": 1})
    arguments = [f"{name}.{key}={toml_value(x)}" for name, section in config.items() for key, x in section.items()]
    return [phase, kind, str(rank), str(tmp_path / "failed_at"), "ppo", "ppo.preset=none", *arguments]


def run_until_failure(
    tiny: Any, tmp_path: Path, phase: str, kind: str, rank: int, parallel: dict[str, Any], *, timeout: int = TIMEOUT
) -> tuple[float, str]:
    """Seconds from the failure of a rank to the end of the run, and what the run printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(FAILING)]
    command += failing_arguments(tiny, tmp_path, phase, kind, rank, {**parallel, "timeout_seconds": timeout})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        pytest.fail(f"the run goes on for ever; printed: {printed[-3000:]}")
    ended = time.time()
    assert process.returncode != 0, printed
    assert (tmp_path / "failed_at").exists(), f"it failed before the phase; printed: {printed}"
    return ended - float((tmp_path / "failed_at").read_text()), printed


def check(printed: str, seconds: float, kind: str, rank: int) -> None:
    print(f"{seconds:.1f} s")
    assert seconds < TIMEOUT + SLACK, printed
    root = printed[printed.index("Root Cause") :]
    assert re.search(rf"rank\s+: {rank} ", root), printed
    if kind == "raise":
        assert f"[rank {rank}] " in printed
        assert "the test's own failure" in printed
        assert re.search(r"exitcode\s+: 1 ", root), printed
    else:
        assert "SIGKILL" in root, printed
    other = 1 - rank
    said = [line for line in printed.splitlines() if line.startswith(f"[rank {other}] ")]
    assert not any("Traceback" in line for line in said), "the rank that did not fail has a traceback"


@pytest.mark.parametrize(("phase", "kind", "rank"), CASES)
def test_no_rank_outlives_one_that_fails(tiny: Any, tmp_path: Path, phase: str, kind: str, rank: int) -> None:
    seconds, printed = run_until_failure(tiny, tmp_path, phase, kind, rank, {"tp": 2})
    check(printed, seconds, kind, rank)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["raise", "kill"])
@pytest.mark.parametrize(("phase", "rank"), [("rollout", 0), ("policy_update", 0), ("critic_update", 1)])
def test_no_rank_outlives_one_with_other_roles(tiny: Any, tmp_path: Path, phase: str, rank: int, kind: str) -> None:
    seconds, printed = run_until_failure(tiny, tmp_path, phase, kind, rank, SPLIT)
    check(printed, seconds, kind, rank)


HANGING = 10
"""parallel.timeout_seconds of the runs in which a rank hangs: longer than any of their own passes."""
SECONDS_OF_TORCHRUN = 30.0
"""How long torchrun waits before it kills a rank that does not end at SIGTERM."""
HANGS = list(itertools.product(PHASES, ("sleep", "stop"), (0, 1)))


@pytest.mark.slow  # the quick ones are in test_watchdog.py
@pytest.mark.parametrize(
    ("phase", "kind", "rank"),
    HANGS,
)
def test_a_rank_that_hangs_is_named_and_ends_with_all_others(
    tiny: Any, tmp_path: Path, phase: str, kind: str, rank: int
) -> None:
    seconds, printed = run_until_failure(tiny, tmp_path, phase, kind, rank, {"tp": 2}, timeout=HANGING)
    check_hang(printed, seconds, kind, rank)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sleep", "stop"])
@pytest.mark.parametrize(("phase", "rank"), [("rollout", 0), ("scoring", 1), ("policy_update", 0), ("export", 1)])
def test_a_rank_with_other_roles_that_hangs_is_named(
    tiny: Any, tmp_path: Path, phase: str, rank: int, kind: str
) -> None:
    seconds, printed = run_until_failure(tiny, tmp_path, phase, kind, rank, SPLIT, timeout=HANGING)
    check_hang(printed, seconds, kind, rank)


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named(tiny: Any, tmp_path: Path) -> None:
    """Without torchrun, which would take half a minute to end the stopped rank."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    arguments = failing_arguments(tiny, tmp_path, "policy_update", "stop", 0, {"tp": 2, "timeout_seconds": HANGING})
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "OMP_NUM_THREADS": "1"}
    world["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    ranks = [
        subprocess.Popen(
            [sys.executable, str(FAILING), *arguments],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed, _ = ranks[1].communicate(timeout=240)
        seconds = time.time() - float((tmp_path / "failed_at").read_text())
        assert ranks[0].poll() is None
    finally:
        for rank in ranks:
            rank.kill()
        ranks[0].communicate()
    assert ranks[1].returncode == 7, printed
    assert seconds < HANGING + SLACK, printed
    assert "where rank 0 did not arrive in time: rank 0 gives no sign of life" in printed


def check_hang(printed: str, seconds: float, kind: str, rank: int) -> None:
    print(f"{seconds:.1f} s\n" + "\n".join(line for line in printed.splitlines() if "in time" in line))
    assert seconds < HANGING + SLACK + (SECONDS_OF_TORCHRUN if kind == "stop" else 0), printed
    other = 1 - rank
    said = next(line for line in printed.splitlines() if line.startswith(f"[rank {other}] ppomax: PeerFailedError"))
    assert re.search(rf"rank {other} has been for \d+ s in .+, where rank {rank} did not arrive in time", said), said
    root = printed[printed.index("Root Cause") :]
    if kind == "sleep":
        assert re.search(rf"rank {rank} has been for \d+ s in fail .*failing_stage\.py:\d+", said), said
        assert re.search(rf"rank\s+: {rank} ", root), printed
        assert "time.sleep(3600)" in printed
    else:
        assert f"rank {rank} gives no sign of life" in said
    assert "exitcode  : 0" not in printed
