"""Runs every test of this folder with the torch reference and with the Triton kernels, those in Triton's interpreter.

Mark a test `one_version` when the implementation cannot make a difference to it. Tests of a file that sets HAS_C run
with the C kernels, too.
"""

from collections.abc import Iterator

import pytest
import torch

from ppomax.kernels import native


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not metafunc.definition.get_closest_marker("one_version"):
        versions = ["reference", "triton", *(["c"] if getattr(metafunc.module, "HAS_C", False) else [])]
        metafunc.parametrize("_version", versions, indirect=True)


@pytest.fixture(autouse=True)
def _version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    version = getattr(request, "param", "reference")
    if version == "c" and native.load() is None:
        pytest.skip(reason="there is no C compiler")
    if version in ("reference", "c"):
        monkeypatch.setenv("PPOMAX_KERNELS", "cpu" if version == "c" else "reference")
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
