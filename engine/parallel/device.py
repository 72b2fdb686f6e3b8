"""The device of this process and the world of processes: CUDA with NCCL, or the CPU with gloo.

`start` is the first call of every stage: it must run before a megatron model is built.
"""

import contextlib
import datetime
import logging
import os
import warnings

import torch
import torch.distributed as dist

from ppomax.engine.errors import ConfigError
from ppomax.engine.parallel.agent import end_with_agent


def start(timeout_seconds: int) -> torch.device:
    """Sets up device, CPU backend and the default process group; returns the device of this rank.

    Under torchrun the world comes from the environment; otherwise this process is a world of one. Every rank must
    call it.
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
        timeout = datetime.timedelta(seconds=timeout_seconds)
        backend = "nccl" if has_gpu else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    _prepare_megatron_globals()
    return device


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
