"""Two hosts on one machine: two network namespaces joined by a cable (veth), for tests of runs on many hosts.

They share files, as hosts of a cluster do; processes reach each other over the cable alone, which can be cut.
"""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NUMBERS = itertools.count()
PORT = 29400
NODE_SH = Path(__file__).parents[2] / "examples" / "node.sh"
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))


@dataclass
class Hosts:
    """names: of the namespaces. addresses: of their ends of the cable. processes: what was started in them."""

    names: tuple[str, str]
    addresses: tuple[str, str]
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def torchrun(
        self, host: int, log: Path, arguments: Sequence[str], *, run_id: str, **environment: str
    ) -> subprocess.Popen[str]:
        """examples/node.sh, so torchrun, with one rank on a host, in a run of both; what it prints goes into `log`."""
        command = ["ip", "netns", "exec", self.names[host], "bash", str(NODE_SH)]
        command += ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", run_id]
        command += ["--rdzv-endpoint", f"{self.addresses[0]}:{PORT}", "--rdzv-conf", f"is_host={1 - host}"]
        command += ["--local-addr", self.addresses[host], "-m", "ppomax.engine.cli", *arguments]
        with log.open("w") as file:
            process = subprocess.Popen(
                command,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHRUN": TORCHRUN, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def cut(self) -> None:
        """Takes the cable out of the first host: nothing says so to the other one."""
        self._ip(0, "link", "set", "cable", "down")

    def mend(self) -> None:
        self._ip(0, "link", "set", "cable", "up")

    def _ip(self, host: int, *arguments: str) -> None:
        run("ip", "-n", self.names[host], *arguments)


def why_not() -> str:
    """Why there are no namespaces here; empty where they are permitted."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "network namespaces need Linux and iproute2"
    name = f"ppomax-try-{os.getpid()}"
    try:
        run("ip", "netns", "add", name)
        try:
            run("ip", "-n", name, "link", "add", "try0", "type", "veth", "peer", "name", "try1")
        finally:
            run("ip", "netns", "delete", name)
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not permitted here: {error.stderr.strip()}"
    return ""


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Makes the namespaces and removes them, with all that runs in them; and those of test runs that were killed."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for name in [line.split()[0] for line in listed.splitlines() if line.startswith("ppomax-")]:
        pid = name.split("-")[1]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            _remove(name)
    number = next(NUMBERS)
    names = (f"ppomax-{os.getpid()}-{number}-a", f"ppomax-{os.getpid()}-{number}-b")
    hosts = Hosts(names, ("10.213.77.1", "10.213.77.2"))
    try:
        for name in names:
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        run("ip", "-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, hosts.addresses, strict=True):
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "cable")
            run("ip", "-n", name, "link", "set", "cable", "up")
        yield hosts
    finally:
        for process in hosts.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for name in names:
            _remove(name)


def _remove(name: str) -> None:
    for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def wait_for(condition, seconds: float) -> bool:
    """Whether a condition comes true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False
