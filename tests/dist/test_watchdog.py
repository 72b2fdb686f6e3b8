"""What ranks say, and do, when they wait in vain: for one that computes for ever, and for each other."""

import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from ppomax.engine.errors import PeerFailedError

pytestmark = pytest.mark.dist
OnRanks = Callable[..., list[Any]]
TIMEOUT = 3.0


def wait_for_one_that_computes(missing: int) -> list[tuple[str, int]]:
    """As with NCCL, whose collectives give no error: those of this world wait much longer than the watchdog. Returns
    with which texts and exit codes the watchdog would have ended this rank.
    """
    from ppomax.engine.parallel import watchdog
    from ppomax.engine.parallel.device import start

    start(60)
    left: list[tuple[str, int]] = []
    with (
        patch.object(watchdog, "_leave", lambda text, code: left.append((text, code))),
        patch.object(watchdog, "SECONDS_TO_LEAVE", 0.5),
    ):
        dog = watchdog.Watchdog(TIMEOUT)
        dist.barrier()
        if dist.get_rank() == missing:
            compute_for(TIMEOUT + 5)
        dist.all_reduce(torch.ones(1))
        dog.stop()
    return left


def compute_for(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(100))


def wait_for_each_other() -> None:
    from ppomax.engine.parallel import watchdog
    from ppomax.engine.parallel.device import start

    start(int(TIMEOUT))
    dog = watchdog.Watchdog(TIMEOUT)
    try:
        dist.recv(torch.ones(1), 1 - dist.get_rank())
    except RuntimeError as error:
        dog.explain(error)
        raise


def finish_in_time() -> list[tuple[str, int]]:
    from ppomax.engine.parallel import watchdog
    from ppomax.engine.parallel.device import start

    start(60)
    left: list[tuple[str, int]] = []
    with patch.object(watchdog, "_leave", lambda text, code: left.append((text, code))):
        dog = watchdog.Watchdog(1.0)
        for _ in range(4):
            if dist.get_rank() == 0:
                time.sleep(0.7)
            dist.all_reduce(torch.ones(1))
        dog.stop()
    return left


def test_a_rank_that_computes_for_ever_is_ended_first_and_named(on_ranks: OnRanks) -> None:
    results = on_ranks(3, wait_for_one_that_computes, 1)
    (own, code), *_more = results[1]
    assert code == 1
    assert "in compute_for" in own
    for rank in (0, 2):
        ((said, code),) = results[rank]
        assert code == PeerFailedError.exit_code
        assert "in all_reduce of ranks 0, 1, 2" in said
        assert "where rank 1 did not arrive in time: rank 1 has been for" in said
        assert "compute_for (" in said


def test_ranks_that_wait_for_each_other_are_listed(on_ranks: OnRanks) -> None:
    with pytest.raises(
        PeerFailedError, match=r"rank \d has been for . s in recv .* no rank is known to hang: rank \d has"
    ):
        on_ranks(2, wait_for_each_other)


def test_nobody_is_ended_while_collectives_finish_in_time(on_ranks: OnRanks) -> None:
    assert on_ranks(2, finish_in_time) == [[], []]
