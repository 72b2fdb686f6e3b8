"""Failing together: an error on one rank becomes an error on every rank, so that nobody is left waiting."""

import contextlib
import datetime
import traceback
from collections.abc import Iterator

import torch
import torch.distributed as dist

from ppomax.engine.errors import PeerFailedError, PpomaxError

SIGNS_OF_A_LOST_PEER = ("by peer", "Broken pipe", "Timed out waiting", "timeout caused pair closure")
"""Parts of the messages with which gloo says that another process is gone or does not answer."""
NCCL_GRACE = 30
"""Seconds that the watchdog has to end the ranks before NCCL does."""


def collective_timeout(timeout_seconds: int) -> datetime.timedelta:
    """What process groups are given as timeout. At its end NCCL ends the process, without a word about the others: the
    watchdog (watchdog.py), which names them after timeout_seconds, comes before.
    """
    return datetime.timedelta(seconds=timeout_seconds + (NCCL_GRACE if torch.cuda.is_available() else 0))


@contextlib.contextmanager
def raise_on_all(kind: type[PpomaxError], what: str) -> Iterator[None]:
    """If the body fails on any rank, it fails on every rank. Collective over the world.

    Where the body raised: that error (an OSError becomes `kind` with `what`); elsewhere: PeerFailedError.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    failed = torch.tensor([float(failure is not None)], device=device)
    try:
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    except RuntimeError:
        if failure is None:
            raise
        # The others are not here: they wait elsewhere, or are gone. What failed here first is what counts.
    if isinstance(failure, OSError):
        raise kind(f"{what}: {failure}") from failure
    if failure is not None:
        raise failure
    if failed.item():
        raise PeerFailedError(f"{what}: it failed on another rank; see that rank's message")


def give_from_first_rank(x: torch.Tensor) -> None:
    """Overwrites x with that of the first rank of the run. Collective over the world."""
    if dist.get_world_size() > 1:
        dist.broadcast(x, src=0)


def peer_failure(error: Exception) -> PeerFailedError | None:
    """What a collective's error says about another rank; None for an error of this one."""
    text = str(error)
    is_gloos = isinstance(error, RuntimeError) and any(sign in text for sign in SIGNS_OF_A_LOST_PEER)
    if not is_gloos and not isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return None
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "/torch/" not in frame.filename]
    place = f" in {ours[-1].name} ({ours[-1].filename}:{ours[-1].lineno})" if ours else ""
    return PeerFailedError(
        f"lost another rank{place}: it ended, or did not answer for parallel.timeout_seconds; see that rank's message, "
        f"or torchrun's summary ({text.splitlines()[0]})"
    )
