"""Reads the pickles of distributed checkpoints as plain records: no class of theirs is imported, none of it runs.

A pickle names what it wants to call. Here every name is looked up in a short list, and what stands there is a record
that keeps its arguments; any other name ends the reading.
"""

import pickle
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from ppomax.engine.errors import CheckpointError

METADATA = "torch.distributed.checkpoint.metadata"
PLANNER = "torch.distributed.checkpoint.planner"
FILESYSTEM = "torch.distributed.checkpoint.filesystem"
MAX_METADATA_BYTES = 2**30  # some millions of chunks
DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool")
STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


REFUSED_OPCODES = {pickle.BYTEARRAY8[0], pickle.EMPTY_SET[0], pickle.ADDITEMS[0], pickle.FROZENSET[0]}


class Record:
    """An object of a pickle: the arguments that its class would be called with, or its state."""

    def __init__(self, *args: Any) -> None:
        self.state: Any = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    @property
    def kind(self) -> str:
        return type(self).__name__


def read_metadata_pickle(path: Path) -> Record:
    """The record "Metadata" of a checkpoint's `.metadata`. Raises CheckpointError for anything else.

    The allowed names are those of our own checkpoints. BytesStorageMetadata is not among them: torch unpickles such
    entries of the data files without its guard.
    """
    kinds = {
        METADATA: (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        ),
        PLANNER: ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
        FILESYSTEM: ("_StorageInfo",),
    }
    allowed: dict[tuple[str, str], Any] = {("torch", name): getattr(torch, name) for name in DTYPES}
    allowed |= {("torch", "Size"): tuple, ("torch.serialization", "_get_layout"): str}
    allowed |= {(module, name): _kind(name) for module, names in kinds.items() for name in names}
    try:
        if path.stat().st_size > MAX_METADATA_BYTES:
            raise CheckpointError(f"it has {path.stat().st_size} bytes, expected at most {MAX_METADATA_BYTES}")
        content = _RecordUnpickler(path.read_bytes(), allowed).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:
        raise CheckpointError(f"{path}: not a readable checkpoint metadata file ({error})") from error
    if not isinstance(content, Record) or content.kind != "Metadata":
        raise CheckpointError(f"{path}: it holds no checkpoint metadata; take another checkpoint")
    return content


def read_tensor_pickle(content: bytes) -> Record:
    """The record "tensor" of the pickle in a file of torch.save.

    Its state: (storage, offset, size, stride, requires_grad, hooks), where the storage is a record with the state
    ("storage", dtype, name of its bytes, device, number of elements). Raises whatever a broken pickle raises.
    """
    allowed: dict[tuple[str, str], Any] = {("torch", name): dtype for name, dtype in STORAGES.items()}
    allowed |= {("torch._utils", "_rebuild_tensor_v2"): _kind("tensor"), ("collections", "OrderedDict"): dict}
    tensor = _RecordUnpickler(content, allowed, lambda parts: _kind("storage")(*parts)).load()
    if not isinstance(tensor, Record) or tensor.kind != "tensor":
        raise ValueError("it holds no tensor")
    return tensor


def _kind(name: str) -> type[Record]:
    """A class of its own for every reading: a pickle may set attributes of the classes that it names."""
    return type(name, (Record,), {})


def _check_keys(keys: list[Any]) -> None:
    """Refuses keys that take as long to hash as somebody likes, such as tuples of tuples."""
    for key in keys:
        if not isinstance(key, str | Record):
            raise CheckpointError(f"refused: a key of type {type(key).__name__}, expected text or an index")


def _set_item(unpickler: Any) -> None:
    _check_keys(unpickler.stack[-2:-1])
    PYTHON_UNPICKLER.load_setitem(unpickler)


def _set_items(unpickler: Any) -> None:
    _check_keys(unpickler.stack[::2])
    PYTHON_UNPICKLER.load_setitems(unpickler)


PYTHON_UNPICKLER: Any = pickle._Unpickler


# The version in Python: that in C makes room for as many objects as a damaged pickle says it has.
class _RecordUnpickler(pickle._Unpickler):
    # Both versions make room at once for a bytearray of any size that a pickle announces, and hash what goes into sets.
    dispatch = {
        opcode: load for opcode, load in pickle._Unpickler.dispatch.items() if opcode not in REFUSED_OPCODES
    } | {pickle.SETITEM[0]: _set_item, pickle.SETITEMS[0]: _set_items}

    def __init__(
        self,
        content: bytes,
        allowed: Mapping[tuple[str, str], Any],
        load_storage: Callable[[tuple[Any, ...]], Record] | None = None,
    ) -> None:
        super().__init__(BytesIO(content))
        self._allowed, self._load_storage = allowed, load_storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise CheckpointError(f"refused: it names {module}.{name}, which no checkpoint of this kind contains")
        return self._allowed[module, name]

    def persistent_load(self, pid: Any) -> Any:
        if self._load_storage is None:
            raise CheckpointError("refused: it names an object outside of the file")
        return self._load_storage(pid)
