"""Two pieces of work of one process at the same time, on a CPU with several threads.

A small operation gains little from a second thread, and what is between operations nothing at all. Where two models
have work that does not depend on each other, each takes half of the threads instead.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
import torch.distributed as dist

A = TypeVar("A")
B = TypeVar("B")


def can_share_threads() -> bool:
    """Whether `side_by_side` uses two threads: one rank, no GPU, and at least two threads for torch.

    Several ranks would begin their collectives in different orders; on a GPU streams do what threads do here.
    """
    return not torch.cuda.is_available() and dist.get_world_size() == 1 and torch.get_num_threads() > 1


def side_by_side(first: Callable[[], A], second: Callable[[], B]) -> tuple[A, B]:
    """What both return. Where threads can be shared they run at the same time, `second` in a thread of its own, and
    must not touch the same things; else one after the other. Raises what either raises, when both have ended.

    Whether gradients are recorded is not handed on to `second`: it says so itself.
    """
    if not can_share_threads():
        return first(), second()
    num_threads = torch.get_num_threads()
    with ThreadPoolExecutor(1, initializer=_begin_thread, initargs=(num_threads // 2,)) as executor:
        other = executor.submit(second)
        torch.set_num_threads(num_threads - num_threads // 2)
        try:
            result = first()
        finally:
            other.exception()  # waits for it
            torch.set_num_threads(num_threads)
    return result, other.result()


def _begin_thread(num_threads: int) -> None:
    from ppomax.engine.parallel import cpu_backend

    cpu_backend.enter()
    torch.get_num_threads()  # the first time in a thread torch takes the number that was set last, in any thread
    torch.set_num_threads(num_threads)
