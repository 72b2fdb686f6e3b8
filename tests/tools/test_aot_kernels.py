"""The gate of compiled kernels: every kernel of kernels/ passes it for both GPUs, and each kind of bad kernel does not.

Kernels are compiled in processes of their own: in this one Triton interprets them.
"""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from ppomax.tools.aot_kernels import FLOAT64_ALLOWED, NARROW_ALLOWED, NO_TENSOR_CORE_ALLOWED, SPILLS_ALLOWED

WORKER = Path(__file__).with_name("aot_mutants_worker.py")


def started(*arguments: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python *arguments` with Triton compiling into a cache of its own."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PPOMAX_KERNELS")
    }
    variables = inherited | {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, *arguments], env=variables, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("operations", "archs"),
    [
        pytest.param((), {"sm_80", "sm_90"}, marks=pytest.mark.slow, id="all"),
        pytest.param(("gae", "rms_norm"), {"sm_90"}, id="some"),
    ],
)
def test_every_kernel_passes_the_gate(tmp_path: Path, operations: tuple[str, ...], archs: set[str]) -> None:
    only = ("--only", *operations) if operations else ()
    arguments = ("--arch", *archs, *only, "--output", str(tmp_path / "report"))
    finished = started("-m", "ppomax.tools.aot_kernels", *arguments, cache=tmp_path)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    rows = json.loads((tmp_path / "report" / "aot-kernels.json").read_text())
    assert {row["arch"] for row in rows} == archs
    table = (tmp_path / "report" / "aot-kernels.md").read_text()
    assert all(f"| {row['kernel']} | {row['call']} |" in table for row in rows)


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    finished = started(str(WORKER), cache=tmp_path_factory.mktemp("mutants"))
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1])


def test_a_good_kernel_has_no_fault(faults: dict[str, list[str]]) -> None:
    assert faults["_good_kernel"] == []


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        ("_spilling_kernel", "registers spill"),
        ("_float64_kernel", "on float64"),
        ("_atomic_kernel", "atomics"),
        ("_narrow_kernel", "no load of 16 bytes"),
        ("_narrow_kernel", "axes 1 and 2 end at 65535"),
        ("unaligned", "no load of 16 bytes"),
        ("_scalar_dot_kernel", "without tensor cores"),
        ("_shared_kernel", "bytes of shared memory"),
    ],
)
def test_a_bad_kernel_is_refused(faults: dict[str, list[str]], kernel: str, fault: str) -> None:
    assert any(fault in found for found in faults[kernel]), faults[kernel]


def test_every_exception_names_a_kernel_that_is_there_and_gives_a_reason() -> None:
    every = (SPILLS_ALLOWED, FLOAT64_ALLOWED, NARROW_ALLOWED, NO_TENSOR_CORE_ALLOWED)
    for key, reason in (item for allowed in every for item in allowed.items()):
        module, kernel = key.split()[0].split(".")
        assert hasattr(import_module(f"ppomax.kernels.{module}_triton"), kernel), key
        assert len(reason) > 20


def test_the_interpreter_is_refused(tmp_path: Path) -> None:
    finished = started("-m", "ppomax.tools.aot_kernels", cache=tmp_path, TRITON_INTERPRET="1")
    assert finished.returncode == 1
    assert "unset it" in finished.stderr


def test_an_unknown_operation_is_refused(tmp_path: Path) -> None:
    finished = started("-m", "ppomax.tools.aot_kernels", "--only", "softmax", cache=tmp_path)
    assert finished.returncode == 1
    assert "no operation softmax; there are adamw, " in finished.stderr
