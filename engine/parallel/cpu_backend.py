"""Lets megatron-core 0.16 run on CPU with gloo. Imported only where there is no GPU; nothing inside megatron is edited.

megatron-core names CUDA in three ways, and each gets the smallest answer that is right on one CPU "device": 1.
functions of `torch.cuda` (streams, events, RNG state): replaced by stand-ins that do nothing or act on the CPU
generator; 2. `device="cuda"` in factory calls, `Tensor.cuda()` and `Tensor.type()` (the optimizers sort parameters by
the string "torch.cuda.FloatTensor"): rewritten by one TorchFunctionMode; 3. two functions of
`megatron.core.tensor_parallel.random` that read the CUDA generator. The functions that it replaces are those listed
as blocking in docs/design.md, section "CPU backend".
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _Stream:
    """A stream on which everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = CPU
        self.cuda_stream = 0

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def query(self) -> bool:
        return True

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *args: Any) -> None: ...


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


_REWRITTEN_METHODS = frozenset({torch.Tensor.cuda, torch.Tensor.type, torch.Tensor.to})


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites CUDA devices to the CPU in every torch call."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not kwargs and func not in _REWRITTEN_METHODS:
            return func(*args)  # nearly every call: this mode stands before each torch operation
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


def install() -> None:
    """Installs the stand-ins for the life of the process; a second call does nothing."""
    if getattr(torch.cuda.current_device, "ppomax", False):
        return

    def current_device() -> torch.device:
        return CPU

    current_device.ppomax = True  # type: ignore[attr-defined]
    stand_ins: dict[str, Any] = {
        "current_device": current_device,
        "set_device": lambda *a, **k: None,
        "device_count": lambda: 1,
        "synchronize": lambda *a, **k: None,
        "empty_cache": lambda: None,
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda *a, **k: _Stream(),
        "default_stream": lambda *a, **k: _Stream(),
        "stream": lambda s: contextlib.nullcontext(),
        "get_rng_state": lambda *a, **k: torch.get_rng_state(),
        "set_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
        # torch.manual_seed calls torch.cuda.manual_seed_all: going through it here would recurse for ever.
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
    }
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
    torch.cuda.nvtx.range_push = lambda *a, **k: None
    torch.cuda.nvtx.range_pop = lambda *a, **k: None
    torch.nn.Module.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]

    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    enter()


def enter() -> None:
    """Puts the mode before torch's functions in this thread, for the life of it: each thread has modes of its own."""
    _CudaMeansCpu().__enter__()
