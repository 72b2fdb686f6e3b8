"""A run over two hosts: one that is cut off ends it with a clear error on both, and it goes on exactly."""

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ppomax.engine.config_file import toml_value

pytestmark = pytest.mark.dist
OnRanks = Callable[..., list[Any]]

TIMEOUT = 30
"""parallel.timeout_seconds: a collective fails after it."""
SLACK = 60.0
"""For node.sh, which ends a torchrun whose rank is gone after 5 s here, and the load of the machine."""
STEPS, CUT_AFTER = 5, 2


def _by_path(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_by_path_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


namespaces = _by_path("namespaces")


@pytest.fixture(scope="module")
def permitted() -> None:
    reason = namespaces.why_not()
    if reason:
        pytest.skip(reason)


@pytest.fixture
def hosts(permitted: None) -> Iterator[Any]:
    with namespaces.two_hosts() as pair:
        yield pair


def run_stage(config: dict[str, Any]) -> None:
    from ppomax.engine.config import RunConfig

    import_module("ppomax.engine.train_ppo").run(RunConfig.model_validate(config))


def records(output: Path) -> list[dict[str, Any]]:
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows if row["kind"] == "ppo"]


def arguments_of(config: dict[str, Any]) -> list[str]:
    fields = [f"{name}.{key}={toml_value(x)}" for name, section in config.items() for key, x in section.items()]
    return ["ppo", "ppo.preset=none", *fields]


def start_both(
    hosts: Any, tmp_path: Path, arguments: list[str], name: str, **environment: str
) -> tuple[list[Any], list[Path]]:
    logs = [tmp_path / f"{name}_{host}.log" for host in range(2)]
    return [hosts.torchrun(host, logs[host], arguments, run_id=name, **environment) for host in range(2)], logs


def end_of(process: subprocess.Popen[str], log: Path, seconds: float) -> str:
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        pytest.fail(f"still running after {seconds:.0f} s; printed: {log.read_text()[-3000:]}")
    return log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, {"pp": 2}], ids=["dp2", "pp2"])
def test_a_run_that_loses_a_host_goes_on_exactly(
    on_ranks: OnRanks, hosts: Any, tiny: Any, tmp_path: Path, layout: dict[str, int]
) -> None:
    shared: dict[str, Any] = {
        "parallel": layout,
        "train": {"steps": STEPS},
        "checkpoint": {"every": 1, "keep": 2},
    }
    straight, output = tmp_path / "straight", tmp_path / "run"
    on_ranks(2, run_stage, tiny.config("ppo", straight, **shared), timeout=300)
    config = tiny.config("ppo", output, **shared)
    config["train"]["resume"] = "auto"
    config["parallel"] = {**layout, "timeout_seconds": TIMEOUT}
    arguments = arguments_of(config)

    processes, logs = start_both(hosts, tmp_path, arguments, "first", RANKS_GONE_SECONDS="5")
    published = output / "checkpoints"
    assert namespaces.wait_for(
        lambda: len(records(output)) >= CUT_AFTER and any(published.glob("step_*/state.json")), 240
    ), logs[0].read_text()
    hosts.cut()
    cut = time.monotonic()
    assert namespaces.wait_for(lambda: all("PeerFailedError" in log.read_text() for log in logs), TIMEOUT + SLACK)
    said = time.monotonic() - cut
    printed = [end_of(process, log, SLACK) for process, log in zip(processes, logs, strict=True)]
    print(f"after the cut both ranks said so in {said:.1f} s, both hosts had ended in {time.monotonic() - cut:.1f} s")
    assert all(process.returncode != 0 for process in processes)
    for rank, text in enumerate(printed):
        assert f"[rank {rank}] ppomax: PeerFailedError: " in text
        assert "Traceback" not in "".join(line for line in text.splitlines() if line.startswith("[rank"))
    assert len(records(output)) < STEPS

    hosts.mend()
    processes, logs = start_both(hosts, tmp_path, arguments, "second")
    printed = [end_of(process, log, 300) for process, log in zip(processes, logs, strict=True)]
    assert [process.returncode for process in processes] == [0, 0], printed
    done = records(output)
    assert [row["step"] for row in done][-1] == STEPS
    assert {row["step"]: row for row in done} == {row["step"]: row for row in records(straight)}
    for name in ("hf", "critic_hf"):
        ours, theirs = (load_file(folder / name / "model.safetensors") for folder in (output, straight))
        assert all(torch.equal(ours[weight], theirs[weight]) for weight in theirs)


@pytest.mark.slow
def test_the_doctor_sees_two_hosts_and_a_cut_cable(hosts: Any, tmp_path: Path) -> None:
    """The hosts have one name, which stands for loopback: gloo gets the interface that leads to the other one."""
    processes, logs = start_both(hosts, tmp_path, ["doctor", "--json"], "doctor")
    printed = end_of(processes[0], logs[0], 120)
    end_of(processes[1], logs[1], 60)
    assert [process.returncode for process in processes] == [0, 0], printed
    found = json.loads(printed[printed.index("{") : printed.rindex("}") + 1])
    assert found["ranks"] == 2
    (network,) = [one["found"] for one in found["findings"] if one["check"] == "network"]
    assert all(f"gloo on cable ({address})" in network for address in hosts.addresses)
    assert {"all-reduce", "neighbours"} <= {one["check"] for one in found["findings"] if one["status"] == "OK"}
