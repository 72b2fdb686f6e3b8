"""Failing together: an error on one rank becomes an error on every rank, so that nobody is left waiting."""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from ppomax.engine.errors import PeerFailedError, PpomaxError


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
    dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if isinstance(failure, OSError):
        raise kind(f"{what}: {failure}") from failure
    if failure is not None:
        raise failure
    if failed.item():
        raise PeerFailedError(f"{what}: it failed on another rank; see that rank's message")
