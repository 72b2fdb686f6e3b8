"""`ppomax doctor` on two ranks: one verdict, and no rank that fails holds up the other."""

import contextlib
import io
import json
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ppomax.engine.errors import ConfigError
from ppomax.tools import doctor

pytestmark = pytest.mark.dist
OnRanks = Callable[..., list[Any]]


def of_rank(behaviour: str, seconds: float) -> tuple[int, str, float]:
    """The doctor on this rank of two: exit code, output, seconds. Rank 1 fails to look at itself, or falls silent."""
    torch.set_num_threads(1)
    before = doctor.facts, doctor.measure
    if os.environ["RANK"] == "1" and behaviour == "fails":
        doctor.facts = fail
    if os.environ["RANK"] == "1" and behaviour == "silent":
        doctor.measure = lambda *_: time.sleep(2 * seconds) or {"all_reduce": {}, "peer": None, "failed": "overslept"}
    started = time.monotonic()
    try:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = doctor.main(["--json", "--timeout", str(seconds)])
        return code, printed.getvalue(), time.monotonic() - started
    finally:
        doctor.facts, doctor.measure = before
        if dist.is_initialized():
            dist.destroy_process_group()


def fail(local_rank: int) -> dict[str, Any]:
    raise OSError("no driver here")


def test_two_ranks_agree_on_the_verdict(on_ranks: OnRanks) -> None:
    (code, printed, _), other = on_ranks(2, of_rank, "", 60.0)
    found = json.loads(printed)
    assert (code, other[:2]) == (0, (0, ""))
    assert found["ranks"] == 2
    assert found["counts"]["FAIL"] == 0
    assert {"all-reduce", "neighbours", "versions"} <= {one["check"] for one in found["findings"]}


@pytest.mark.parametrize(
    ("behaviour", "check", "says"),
    [("fails", "ranks", "OSError: no driver here"), ("silent", "links between ranks", "rank ")],
)
def test_a_rank_that_fails_is_a_row_and_holds_nobody_up(
    on_ranks: OnRanks, behaviour: str, check: str, says: str
) -> None:
    seconds = 5.0
    (code, printed, took), (other, nothing, _) = on_ranks(2, of_rank, behaviour, seconds)
    assert (code, other, nothing) == (ConfigError.exit_code, ConfigError.exit_code, "")
    (fault,) = [one for one in json.loads(printed)["findings"] if one["status"] == "FAIL"]
    assert fault["check"] == check
    assert says in fault["found"]
    assert took < 2 * seconds + doctor.SLACK_SECONDS + doctor.GOODBYE_SECONDS
