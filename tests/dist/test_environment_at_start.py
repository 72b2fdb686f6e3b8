"""Every stage of several ranks compares them before its first collective."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.dist
OnRanks = Callable[..., list[Any]]


def error_of_stage(config: dict[str, Any], switch: str) -> str:
    """What a stage ends with where the last rank has another switch."""
    from ppomax.engine.config import RunConfig
    from ppomax.engine.train_sft import run

    before = os.environ.get("PPOMAX_KERNELS", "")
    if os.environ["RANK"] == "1":
        os.environ["PPOMAX_KERNELS"] = switch
    try:
        run(RunConfig.model_validate(config))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        os.environ["PPOMAX_KERNELS"] = before
    return "none"


def listens() -> list[str]:
    """Addresses at which this process listens once its ranks have met."""
    import torch
    import torch.distributed as dist

    from ppomax.engine.parallel.device import start, stop

    start(60)
    dist.all_reduce(torch.ones(1))
    found = [one.laddr.ip for one in psutil.Process().net_connections() if one.status == psutil.CONN_LISTEN]
    stop()
    return found


def test_a_stage_names_the_rank_that_differs(on_ranks: OnRanks, tiny: Any, tmp_path: Path) -> None:
    errors = on_ranks(2, error_of_stage, tiny.config("sft", tmp_path / "run"), "reference")
    for error in errors:
        assert error.startswith("ConfigError: the ranks of this run differ")
        assert "$PPOMAX_KERNELS: cpu on rank 0" in error
        assert "reference on rank 1" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ranks_of_one_host_listen_on_loopback_alone(on_ranks: OnRanks, num_ranks: int) -> None:
    found = on_ranks(num_ranks, listens)
    assert {address for addresses in found for address in addresses} <= {"127.0.0.1", "::1"}
    if num_ranks > 1:
        assert all(found), "gloo listens somewhere"
