"""Runs every test of this folder with the torch reference and with the Triton kernels, those in Triton's interpreter.

Mark a test `one_version` when the implementation cannot make a difference to it.
"""

from collections.abc import Iterator

import pytest
import torch


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not metafunc.definition.get_closest_marker("one_version"):
        metafunc.parametrize("_version", ["reference", "triton"], indirect=True)


@pytest.fixture(autouse=True)
def _version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if getattr(request, "param", "reference") == "reference":
        monkeypatch.setenv("PPOMAX_KERNELS", "reference")
    else:
        monkeypatch.delenv("PPOMAX_KERNELS", raising=False)
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread for small tensors: more only costs, on a machine that runs several things at once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
