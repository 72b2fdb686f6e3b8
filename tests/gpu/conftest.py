"""Every test of this folder needs a CUDA device, and is skipped with that reason where there is none."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The CUDA device, with this process as a world of its own and products of float32 in float32."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here; run `make test-gpu` on a machine that has one")
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield torch.device("cuda", 0)
    torch.set_float32_matmul_precision(precision)
