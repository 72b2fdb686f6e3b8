"""The worker pool itself: results by rank, errors with their traceback, and life after a job that hangs."""

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ppomax.engine.errors import DataError

pytestmark = pytest.mark.dist
OnRanks = Callable[..., list[Any]]


def sum_of_ranks(factor: int) -> tuple[int, int]:
    from ppomax.engine.parallel.device import start

    start(30)
    total = torch.tensor(dist.get_rank() * factor)
    dist.all_reduce(total)
    return dist.get_world_size(), int(total)


def fail_on(rank: int) -> None:
    sum_of_ranks(1)
    if dist.get_rank() == rank:
        raise DataError("a bad row")
    dist.barrier()


def hang_on(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        time.sleep(100)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_job_has_a_world_of_its_own(on_ranks: OnRanks, num_ranks: int) -> None:
    expected = 10 * sum(range(num_ranks))
    assert on_ranks(num_ranks, sum_of_ranks, 10) == [(num_ranks, expected)] * num_ranks


def test_the_first_error_is_raised_with_its_traceback(on_ranks: OnRanks) -> None:
    with pytest.raises(DataError, match="a bad row") as caught:
        on_ranks(4, fail_on, 2)
    assert "in fail_on" in caught.value.__notes__[0]
    assert "rank 2" in caught.value.__notes__[0]
    assert on_ranks(4, sum_of_ranks, 1) == [(4, 6)] * 4


@pytest.mark.slow
def test_a_job_that_hangs_is_killed_and_the_next_one_runs(on_ranks: OnRanks) -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[1\] did not finish"):
        on_ranks(2, hang_on, 1, timeout=3)
    assert on_ranks(2, sum_of_ranks, 1) == [(2, 1)] * 2
