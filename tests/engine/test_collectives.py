"""Which errors of a collective are about another rank, and what raise_on_all raises where the collective fails too."""

from unittest.mock import patch

import pytest
import torch.distributed as dist

from ppomax.engine.errors import ConfigError
from ppomax.engine.parallel.collectives import peer_failure, raise_on_all
from ppomax.engine.parallel.device import start

CLOSED = "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:40118"


def test_a_lost_connection_is_about_another_rank() -> None:
    def gather() -> None:
        raise RuntimeError(f"{CLOSED}\nmore")

    try:
        gather()
    except RuntimeError as error:
        failure = peer_failure(error)
    assert failure is not None
    assert str(failure).startswith("lost another rank in gather (")
    assert str(failure).endswith(f"({CLOSED})")
    assert failure.exit_code == 7


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError(CLOSED)])
def test_other_errors_are_this_ranks_own(error: Exception) -> None:
    assert peer_failure(error) is None


def test_an_error_of_nccl_is_about_another_rank() -> None:
    assert peer_failure(dist.DistBackendError("NCCL communicator was aborted on rank 1.")) is not None


def test_what_failed_here_is_raised_where_the_others_do_not_come() -> None:
    start(30)
    with patch.object(dist, "all_reduce", side_effect=RuntimeError(CLOSED)):
        with pytest.raises(ConfigError, match="cannot write: no space left"), raise_on_all(ConfigError, "cannot write"):
            raise OSError("no space left")
        with pytest.raises(RuntimeError, match="by peer"), raise_on_all(ConfigError, "cannot write"):
            pass
