"""Where the host waits for the device while something runs, each wait with its place in the program.

On CUDA PyTorch reports them (`torch.cuda.set_sync_debug_mode`); waits for events are added. A CPU has one memory, so
there the program is followed as if it had two: a tensor is on the host if it was made without a device, came from
`.cpu()`, or was computed from such tensors alone; all others count as the device's. A wait is then what it would be on
CUDA: the host reads a value of a device tensor, shapes a result by one, or moves a tensor to the device without
`non_blocking`. What runs where the CPU backend leaves torch's functions alone (generation) is not seen on a CPU.
"""

import contextlib
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
READS = {
    *("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__contains__", "__repr__"),
    *("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "equal", "allclose", "is_nonzero"),
    *("__format__", "bincount"),
}
MOVES = {"to", "cuda"}
INDEXING = {"__getitem__", "__setitem__", "index_put", "index_put_"}
MASKS = (torch.bool, torch.uint8)


@contextlib.contextmanager
def host_syncs() -> Iterator[Counter[str]]:
    """Counts by place ("engine/ppo/update.py:164 _step") while it is open."""
    found: Counter[str] = Counter()
    with _cuda_syncs(found) if torch.cuda.is_available() else _Followed(found):
        yield found


@contextlib.contextmanager
def _cuda_syncs(found: Counter[str]) -> Iterator[None]:
    def note(message: Warning | str, *rest: Any, **options: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            found[_place()] += 1

    wait = torch.cuda.Event.synchronize

    def waits(event: torch.cuda.Event) -> None:
        found[_place()] += 1
        wait(event)

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(), patch.object(torch.cuda.Event, "synchronize", waits):
        warnings.simplefilter("always")
        with patch.object(warnings, "showwarning", note):
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode(before)


class _Followed(TorchFunctionMode):
    """Marks tensors of the host, as long as it is open, and counts waits."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        is_move = name in MOVES and (name == "cuda" or any(map(_names_device, (*args[1:], kwargs.get("device")))))
        all_on_host = all(map(_is_on_host, inputs))
        if _waits(func, name, inputs, args, kwargs, is_move=is_move):
            self._found[_place()] += 1
        result = func(*args, **kwargs)
        goes_to_host = name == "cpu" or (all_on_host and not is_move and (inputs or kwargs.get("device") is None))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and goes_to_host != _is_on_host(x):
                if any(x is one for one in inputs):  # a copy elsewhere, which on a CPU is the same tensor
                    if name == "cpu" or is_move:
                        result = x = x.view_as(x)
                    else:
                        continue
                x.is_on_host = goes_to_host  # type: ignore[attr-defined]
        return result


def _waits(func: Any, name: str, inputs: list[Tensor], args: tuple, kwargs: dict, *, is_move: bool) -> bool:
    device_inputs = [x for x in inputs if not _is_on_host(x)]
    if name in ("tensor", "as_tensor") and not inputs:
        return kwargs.get("device") is not None
    if is_move:
        return not device_inputs and not kwargs.get("non_blocking", False)
    if not device_inputs:
        return False
    if name == "where" and len(args) == 1:
        return True
    if name == "repeat_interleave":
        return len(inputs) > 1 and kwargs.get("output_size") is None
    if name == "copy_":
        return len(device_inputs) < len(inputs) and not (kwargs.get("non_blocking") or args[2:3] == (True,))
    if name in INDEXING:
        if name == "__setitem__" and not isinstance(args[2], Tensor):
            return False  # filled where the mask is True
        return any(isinstance(x, Tensor) and x.dtype in MASKS and not _is_on_host(x) for x in tree_leaves(args[1]))
    return name in READS


def _is_on_host(x: Tensor) -> bool:
    return getattr(x, "is_on_host", False)


def _names_device(x: Any) -> bool:
    return isinstance(x, torch.device | str) or (isinstance(x, Tensor) and not _is_on_host(x))


def _place() -> str:
    """The innermost line of the project, or of Megatron, that runs."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path != __file__ and ("/megatron/" in path or (path.startswith(str(ROOT)) and "/.venv" not in path)):
            return f"{_short(path)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def _short(path: str) -> str:
    return path[path.rindex("/megatron/") + 1 :] if "/megatron/" in path else str(Path(path).relative_to(ROOT))
