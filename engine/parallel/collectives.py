# TODO(author of engine/checkpoint.py): the first version of this file was overwritten by accident by the rollout helper;
# this is a reconstruction from its use in checkpoint.py. Put your own version back.
"""Failing together: an error on one rank becomes an error on every rank."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from ppomax.engine.errors import PpomaxError


@contextmanager
def raise_on_all(error_type: type[PpomaxError], message: str) -> Iterator[None]:
    """If the block fails on any rank, raises on every rank: a PpomaxError as it is, anything else as error_type with the message.

    Every rank of the world must enter and leave it.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    texts: list[str | None] = [None] * dist.get_world_size()
    text = None if failure is None else str(failure) or type(failure).__name__
    dist.all_gather_object(texts, text)
    if isinstance(failure, PpomaxError):
        raise failure
    for rank, found in enumerate(texts):
        if found is not None:
            raise error_type(f"{message}: {found} (rank {rank})") from failure
