"""examples/slurm.sbatch and node.sh run here as they are, with real torchruns; only Slurm's commands are stand-ins."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.dist

SRUN = """#!/usr/bin/env bash
# Two nodes: the command twice, and the worst exit code.
[[ $1 == --kill-on-bad-exit=1 ]] && shift
for node in 0 1; do SLURM_NODEID=$node "$@" & echo $! >>"$STUBS/tasks"; done
code=0
for task in $(cat "$STUBS/tasks"); do wait "$task" || code=$?; done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
    show) printf 'localhost\\nlocalhost\\n' ;;
    requeue) echo "$2" >>"$STUBS/requeued" ;;
esac
"""
SCANCEL = """#!/usr/bin/env bash
# Slurm may signal the processes that it started, or everything that runs on the nodes.
[[ $1 == --signal=USR1 && $2 == "$SLURM_JOB_ID" ]] || exit 9
all_below() { for child in $(pgrep -P "$1"); do all_below "$child"; echo "$child"; done; }
for task in $(cat "$STUBS/tasks"); do
    below=""
    [[ $SCANCEL_REACHES == all ]] && below=$(all_below "$task")
    kill -USR1 "$task" $below
done
"""
RANK = """
import os, signal, sys, time
from pathlib import Path
place = Path(os.environ["STUBS"])
asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
(place / f"rank_{os.environ['RANK']}").write_text(" ".join(sys.argv[1:]))
deadline = time.monotonic() + float(os.environ["RANK_SECONDS"])
while not asked and time.monotonic() < deadline:
    time.sleep(0.02)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as ppomax does: the request may come twice
(place / f"ended_{os.environ['RANK']}").write_text("saved" if asked else "done")
sys.exit(int(os.environ.get("RANK_CODE", "0")) if os.environ["RANK"] == "1" else 0)
"""


def start(tmp_path: Path, *, seconds: float, **environment: str) -> subprocess.Popen[str]:
    """The batch script, in a folder like the root of the repository."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    (tmp_path / "rank.py").write_text(RANK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "localhost,localhost", "SLURM_NNODES": "2"}
    own = {"TORCHRUN": str(Path(sys.executable).with_name("torchrun")), "GPUS_PER_NODE": "1", "RDZV_PORT": str(port)}
    return subprocess.Popen(
        ["bash", "examples/slurm.sbatch", "rank.py", "ppo.lam=0.95"],
        cwd=tmp_path,
        env={
            **os.environ,
            **slurm,
            **own,
            **environment,
            "PATH": f"{commands}:{os.environ['PATH']}",
            "STUBS": str(tmp_path),
            "RANK_SECONDS": str(seconds),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end_of(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=120)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"the script does not end; printed: {process.communicate()[0][-3000:]}")


def ask_to_stop(process: subprocess.Popen[str], tmp_path: Path) -> None:
    """As `#SBATCH --signal=B:USR1@900` does, once both ranks run."""
    deadline = time.monotonic() + 120
    while not all((tmp_path / f"rank_{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline
        assert process.poll() is None, end_of(process)
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGUSR1)


@pytest.mark.parametrize("reaches", ["tasks", pytest.param("all", marks=pytest.mark.slow)])
def test_near_the_end_of_its_time_a_job_saves_and_goes_back_into_the_queue(tmp_path: Path, reaches: str) -> None:
    if reaches == "all" and shutil.which("pgrep") is None:
        pytest.skip("the stand-in for scancel needs pgrep")
    process = start(tmp_path, seconds=300, SCANCEL_REACHES=reaches)
    ask_to_stop(process, tmp_path)
    printed = end_of(process)
    assert process.returncode == 0, printed
    assert (tmp_path / "requeued").read_text() == "4711\n"
    assert [(tmp_path / f"ended_{rank}").read_text() for rank in range(2)] == ["saved"] * 2
    assert (tmp_path / "rank_0").read_text() == "ppo.lam=0.95"


@pytest.mark.slow
def test_a_job_that_is_done_is_not_queued_again(tmp_path: Path) -> None:
    process = start(tmp_path, seconds=0.5)
    printed = end_of(process)
    assert process.returncode == 0, printed
    assert [(tmp_path / f"ended_{rank}").read_text() for rank in range(2)] == ["done"] * 2
    assert not (tmp_path / "requeued").exists()


@pytest.mark.slow
def test_a_job_that_fails_while_it_stops_is_not_queued_again(tmp_path: Path) -> None:
    # The torchrun of the host that has saved waits for the other one for minutes.
    process = start(tmp_path, seconds=300, SCANCEL_REACHES="tasks", RANK_CODE="6", RANKS_GONE_SECONDS="3")
    ask_to_stop(process, tmp_path)
    printed = end_of(process)
    assert process.returncode != 0, printed
    assert not (tmp_path / "requeued").exists()


def test_node_sh_ends_a_torchrun_that_outlives_its_ranks(tmp_path: Path) -> None:
    torchrun = tmp_path / "torchrun"  # one that waits for ever once its rank is gone, as beside a lost store
    torchrun.write_text("#!/usr/bin/env bash\nsleep 2\nexec -a agent sleep 300\n")
    torchrun.chmod(0o755)
    environment = {**os.environ, "TORCHRUN": str(torchrun), "RANKS_GONE_SECONDS": "2"}
    started = time.monotonic()
    done = subprocess.run(
        ["bash", EXAMPLES / "node.sh"], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 128 + signal.SIGKILL
    assert "the ranks are gone" in done.stderr
    assert time.monotonic() - started < 60
