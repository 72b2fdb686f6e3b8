"""What counts as a wait of the host for the device, on a CPU that is followed as if it had one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ppomax.tools.host_syncs import host_syncs

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: float(x[0]),
        lambda x: int(x[0]),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: (x > 0).nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.where(x > 0),
        lambda x: torch.zeros(3).copy_(x),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: torch.tensor([1.0], device=CPU),
        lambda x: torch.tensor([1.0]).to(CPU),
        lambda x: x.copy_(torch.zeros(3)),
    ],
)
def test_a_wait_is_counted(wait: Callable[[Tensor], Any]) -> None:
    x = torch.ones(3)
    with host_syncs() as found:
        wait(x)
    assert sum(found.values()) == 1
    assert next(iter(found)).startswith("tests/tools/test_host_syncs.py:")


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x * 2 + torch.zeros_like(x),
        lambda x: torch.where(x > 0, x, 0.0).sum(),
        lambda x: torch.tensor([3, 4]).tolist(),
        lambda x: bool((torch.arange(3) + torch.ones(3)).sum() > 0),
        lambda x: torch.tensor([1.0]).to(CPU, non_blocking=True),
        lambda x: x[torch.arange(2, device=CPU)],
        lambda x: x.long().repeat_interleave(x.long(), output_size=3),
        lambda x: x.float().to(torch.float64).view(-1),
    ],
)
def test_work_without_a_wait_is_not_counted(work: Callable[[Tensor], Any]) -> None:
    x = torch.ones(3)
    with host_syncs() as found:
        work(x)
    assert not found


def test_a_copy_stays_on_the_host_and_the_tensor_on_the_device() -> None:
    x = torch.ones(3)
    with host_syncs() as found:
        copy = x.cpu()
        copy.tolist()
        (copy + 1).sum().item()
        assert sum(found.values()) == 1
        copy.to(CPU).tolist()  # there, and read
        x.tolist()
    assert sum(found.values()) == 4
