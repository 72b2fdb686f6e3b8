"""The device of this process and the world of processes: CUDA with NCCL, or the CPU with gloo.

`start` is the first call of every stage: it must run before a megatron model is built.
"""

import contextlib
import datetime
import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from ppomax.engine.errors import ConfigError, PeerFailedError
from ppomax.engine.parallel.agent import end_with_agent
from ppomax.engine.parallel.collectives import collective_timeout
from ppomax.engine.parallel.environment import check_same_everywhere, keep_to_this_host, versions


def start(timeout_seconds: int, *, agreed: Mapping[str, str] | None = None) -> torch.device:
    """Sets up device, CPU backend and the default process group; returns the device of this rank.

    Under torchrun the world comes from the environment; otherwise this process is a world of one. Every rank must
    call it. agreed: what must be the same on every rank, besides versions. Raises ConfigError on all of them where it
    is not.
    """
    end_with_agent()
    warnings.filterwarnings("ignore", module="megatron")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", category=FutureWarning, message="Please use DTensor")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    # Notes of megatron-core on parts that we replace on purpose (MLP class, expert groups).
    logging.getLogger("megatron").setLevel(logging.ERROR)
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local_rank} has no GPU of its own: this host has {torch.cuda.device_count()}; "
                "start torchrun with at most that many --nproc-per-node"
            )
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        from ppomax.engine.parallel import cpu_backend

        cpu_backend.install()
        device = torch.device("cpu")
    if not dist.is_initialized():
        timeout = collective_timeout(timeout_seconds)
        keep_to_this_host()
        world = join_store(timeout)
        if world["world_size"] > 1:
            facts = versions() | dict(agreed or {})
            world["store"] = check_same_everywhere(**world, facts=facts, timeout_seconds=timeout_seconds)
        dist.init_process_group("nccl" if has_gpu else "gloo", **world, timeout=timeout)
    _prepare_megatron_globals()
    return device


def join_store(timeout: datetime.timedelta) -> dict[str, Any]:
    """store, rank and world_size: torchrun's, or a world of one. Raises PeerFailedError where no store answers."""
    if "RANK" not in os.environ:
        return {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    except (dist.DistError, RuntimeError) as error:
        place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        raise PeerFailedError(
            f"rank {os.environ['RANK']} does not reach the run's store at {place} (MASTER_ADDR, MASTER_PORT) within "
            f"{timeout.total_seconds():g} s; does that name stand for the first host, from here? is the port open? "
            f"({str(error).splitlines()[0]})"
        ) from error
    return {"store": store, "rank": rank, "world_size": world_size}


def this_device() -> torch.device:
    """The device of this process, after `start`."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _prepare_megatron_globals() -> None:
    """The two module globals of megatron-core that explicit process groups do not replace (docs/design.md)."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
    tracker = get_cuda_rng_tracker()
    if "model-parallel-rng" not in tracker.get_states():
        # Sequence parallelism forks this state around dropout; our models have none, so its value never matters.
        tracker.add("model-parallel-rng", 1)


def torch_functions_as_they_are() -> contextlib.AbstractContextManager:
    """Within it no CPU backend stands before torch's functions: for code that makes many calls and names no device."""
    return torch._C.DisableTorchFunction()


def stop() -> None:
    """Leaves the process group (a clean exit)."""
    if dist.is_initialized():
        dist.destroy_process_group()
