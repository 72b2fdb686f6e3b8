"""Which implementation computes, and that deciding it does not load triton."""

import os
import subprocess
import sys

import pytest
import torch

from ppomax.kernels import dispatch, gae_reference
from ppomax.kernels.dispatch import implementation, use_triton

pytestmark = pytest.mark.one_version

CPU = torch.zeros(1)


@pytest.fixture
def triton_everywhere(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """triton is installed, and its interpreter is on."""
    monkeypatch.setattr(dispatch, "_triton_is_installed", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("PPOMAX_KERNELS", raising=False)
    return monkeypatch


def test_interpreted_operation_uses_triton(triton_everywhere: pytest.MonkeyPatch) -> None:
    assert use_triton(CPU, None)


def test_environment_can_ask_for_the_reference(triton_everywhere: pytest.MonkeyPatch) -> None:
    triton_everywhere.setenv("PPOMAX_KERNELS", "reference")
    assert not use_triton(CPU)


def test_missing_triton_means_the_reference(triton_everywhere: pytest.MonkeyPatch) -> None:
    triton_everywhere.setattr(dispatch, "_triton_is_installed", lambda: False)
    assert not use_triton(CPU)


def test_cpu_tensor_uses_the_reference_without_the_interpreter(triton_everywhere: pytest.MonkeyPatch) -> None:
    triton_everywhere.delenv("TRITON_INTERPRET")
    assert not use_triton(CPU)


def test_reference_module_is_the_implementation_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert implementation("gae", CPU) is gae_reference


def test_import_of_every_kernel_loads_no_triton() -> None:
    code = (
        "import sys, pkgutil, importlib, ppomax.kernels as k\n"
        "for m in pkgutil.iter_modules(k.__path__):\n"
        "    if not m.name.endswith('_triton'): importlib.import_module('ppomax.kernels.' + m.name)\n"
        "assert 'ppomax.kernels.gae' in sys.modules\n"
        "assert 'triton' not in sys.modules"
    )
    environment = {**os.environ, "PPOMAX_KERNELS": "reference"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment)
