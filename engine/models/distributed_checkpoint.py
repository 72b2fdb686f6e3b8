"""Distributed checkpoints of Megatron (torch_dist folders), read by byte ranges in one process, without Megatron.

Such a folder has `.metadata` (a pickle: names, shapes and places of all chunks) and data files `__R_K.distcp`, in which
every chunk is a file of torch.save. Megatron stacks the layers of a model in one tensor: `layer` is an index into its
first dimension. Nothing is believed: chunks must tile their tensors and not share bytes, and a chunk's bytes must have
the checksum that torch stored with them.
"""

import errno
import json
import math
import os
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppomax.engine.errors import CheckpointError
from ppomax.engine.models.pickled_records import Record, read_metadata_pickle
from ppomax.engine.models.safetensors_file import PIECE_BYTES, read_into
from ppomax.engine.models.saved_tensor import Window, find_numbers

METADATA_FILE = ".metadata"
LAYERS = "decoder.layers."
OPTIMIZER = "optimizer.state."
"""Optimizer states are called optimizer.state.{param, exp_avg, exp_avg_sq}.<name of the weight>."""

ALL = slice(None)


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: first index and number along (layer, row, column), and the bytes of its file of torch.save."""

    first: tuple[int, int, int]
    count: tuple[int, int, int]
    size: tuple[int, ...]
    file: str
    start: int
    stop: int


@dataclass(frozen=True)
class StoredTensor:
    """size: as stored, [V, H] of an embedding, [layers, ...] of what layers have."""

    size: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


def is_distributed_checkpoint(folder: Path) -> bool:
    return (folder / METADATA_FILE).is_file()


def has_layers(key: str) -> bool:
    """Whether the first dimension of a stored tensor counts layers."""
    return weight_of(key).startswith(LAYERS)


def weight_of(key: str) -> str:
    """The weight that a stored tensor is, or is a state of the optimizer for."""
    return key.removeprefix(OPTIMIZER).partition(".")[2] if key.startswith(OPTIMIZER) else key


class DistributedCheckpoint:
    """tensors: by name. Raises CheckpointError where the folder is damaged, at once or when the chunk is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _check_backend(folder / "metadata.json")
        metadata = read_metadata_pickle(folder / METADATA_FILE)
        try:
            self.tensors = _tensors(metadata)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise CheckpointError(
                f"{folder / METADATA_FILE} is damaged ({error}); take another checkpoint, or copy it again"
            ) from error
        self._check_files()
        self._by_layer: dict[tuple[str, int], list[Chunk]] = {}
        for key, tensor in self.tensors.items():
            for chunk in tensor.chunks:
                for layer in range(chunk.first[0], chunk.first[0] + chunk.count[0]):
                    self._by_layer.setdefault((key, layer), []).append(chunk)
        self._data_start: dict[Chunk, int] = {}

    def read(self, key: str, layer: int = 0, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """Some rows and, of a matrix, some columns of a tensor, or of one layer of it."""
        tensor = self.tensors[key]
        size = tensor.size[1:] if has_layers(key) else tensor.size
        first_row, last_row, _ = rows.indices(size[0])
        first_column, last_column, _ = columns.indices(size[1]) if len(size) > 1 else (0, 1, 1)
        out = torch.empty(last_row - first_row, last_column - first_column, dtype=tensor.dtype)
        for chunk in self._by_layer[key, layer]:
            (_, row, column), (_, num_rows, num_columns) = chunk.first, chunk.count
            top, bottom = max(first_row, row), min(last_row, row + num_rows)
            left, right = max(first_column, column), min(last_column, column + num_columns)
            if top < bottom and left < right:
                target = out[top - first_row : bottom - first_row, left - first_column : right - first_column]
                self._read_box(chunk, layer - chunk.first[0], top - row, slice(left - column, right - column), target)
        return out if len(size) > 1 else out.view(-1)

    def _read_box(self, chunk: Chunk, layer: int, row: int, columns: slice, target: Tensor) -> None:
        """Fills target from a chunk, from a layer and row of it on."""
        _, num_rows, width = chunk.count
        row_bytes = width * target.dtype.itemsize
        with self._open(chunk.file) as file:
            start = self._checked_start(file, chunk, target.dtype) + (layer * num_rows + row) * row_bytes
            try:
                self._fill(file, start, width, columns, target)
            except OSError as error:
                raise self._damaged(chunk, error) from error

    def _fill(self, file: FileIO, start: int, width: int, columns: slice, target: Tensor) -> None:
        """Fills target with some columns of consecutive rows of this width."""
        if target.is_contiguous() and target.shape[1] == width:
            read_into(file, target, start)
            return
        row_bytes = width * target.dtype.itemsize
        step = max(1, PIECE_BYTES // row_bytes)
        for first in range(0, len(target), step):
            piece = torch.empty(len(target[first : first + step]), width, dtype=target.dtype)
            read_into(file, piece, start + first * row_bytes)
            target[first : first + step] = piece[:, columns]

    def _checked_start(self, file: FileIO, chunk: Chunk, dtype: torch.dtype) -> int:
        """Where in its file the numbers of a chunk begin. Reads all of them once and compares their checksum."""
        if chunk not in self._data_start:
            try:
                window = Window(file, chunk.start, chunk.stop)
                self._data_start[chunk] = chunk.start + find_numbers(window, chunk.size, dtype)
            except Exception as error:  # zipfile and pickle answer damage with errors of a dozen types
                raise self._damaged(chunk, error) from error
        return self._data_start[chunk]

    def _damaged(self, chunk: Chunk, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.folder / chunk.file} is damaged between bytes {chunk.start} and {chunk.stop} ({error}); "
            "take another checkpoint, or copy it again"
        )

    def _open(self, file: str) -> FileIO:
        try:
            # Opening a pipe would wait for somebody to write into it.
            if not os.path.isfile(self.folder / file):
                raise FileNotFoundError(errno.ENOENT, "there is no such file")
            return (self.folder / file).open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder / file} cannot be read ({error.strerror}), but {METADATA_FILE} names it; copy it again"
            ) from error

    def _check_files(self) -> None:
        """No two chunks share bytes, and all of them lie inside of their files."""
        chunks = [chunk for tensor in self.tensors.values() for chunk in tensor.chunks]
        sizes: dict[str, int] = {}
        for name in {chunk.file for chunk in chunks}:
            with self._open(name) as file:
                sizes[name] = os.fstat(file.fileno()).st_size
        end = dict.fromkeys(sizes, 0)
        for chunk in sorted(chunks, key=lambda chunk: (chunk.file, chunk.start)):
            size = sizes[chunk.file]
            if chunk.start < end[chunk.file] or chunk.stop > size:
                raise CheckpointError(
                    f"{self.folder / chunk.file} has {size} bytes and cannot hold a chunk of its own at {chunk.start} "
                    f"to {chunk.stop}: it is cut short, or {METADATA_FILE} is damaged; copy it again"
                )
            end[chunk.file] = chunk.stop


def _check_backend(path: Path) -> None:
    """Megatron writes this file last."""
    try:
        backend = json.loads(path.read_text())["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): the checkpoint is not complete; take another one, or copy it again"
        ) from error
    if backend != "torch_dist":
        raise CheckpointError(f"{path}: sharded_backend is {backend!r}, expected 'torch_dist'; save it in that format")


def _tensors(metadata: Record) -> dict[str, StoredTensor]:
    places: dict[tuple[str, tuple[int, ...]], Any] = {}
    for index, info in metadata.state["storage_data"].items():
        name, offsets = index.state["fqn"], _whole_numbers(index.state["offset"])
        if (name, offsets) in places:
            raise ValueError(f"{name} has two places for the chunk at {list(offsets)}")
        places[name, offsets] = info.state
    tensors = {key: _tensor(key, stored, places) for key, stored in metadata.state["state_dict_metadata"].items()}
    if places:
        raise ValueError(f"it has places for chunks that no tensor has: {sorted(places)[0]}")
    return tensors


def _tensor(key: str, stored: Record, places: dict[tuple[str, tuple[int, ...]], Any]) -> StoredTensor:
    """Takes the tensor's chunks out of places."""
    dtype, size = stored.state["properties"].state[0], _whole_numbers(stored.state["size"])
    if stored.kind != "TensorStorageMetadata" or not isinstance(dtype, torch.dtype):
        raise ValueError(f"{key} is no tensor")
    layered = has_layers(key)
    if len(size) not in ((2, 3) if layered else (1, 2)):
        raise ValueError(f"{key} has the shape {list(size)}")
    chunks = []
    for part in stored.state["chunks"]:
        offsets, sizes = _whole_numbers(part.state["offsets"]), _whole_numbers(part.state["sizes"])
        if len(offsets) != len(size) or len(sizes) != len(size) or 0 in sizes:
            raise ValueError(f"{key} of shape {list(size)} has a chunk of shape {list(sizes)}")
        place = places.pop((key, offsets))
        file, start, length = place["relative_path"], *_whole_numbers((place["offset"], place["length"]))
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".distcp"):
            raise ValueError(f"{key} lies in a file called {reprlib.repr(file)}")
        chunks.append(Chunk(_box(offsets, layered, 0), _box(sizes, layered, 1), sizes, file, start, start + length))
    _check_tiles(key, _box(size, layered, 1), chunks)
    for chunk in chunks:
        # Later the layers are counted one by one, and a damaged file may announce any number of them.
        if chunk.stop - chunk.start < math.prod(chunk.size) * dtype.itemsize:
            raise ValueError(f"{key} has a chunk of shape {list(chunk.size)} in {chunk.stop - chunk.start} bytes")
    return StoredTensor(size, dtype, tuple(chunks))


def _box(numbers: tuple[int, ...], layered: bool, fill: int) -> tuple[int, int, int]:
    """Numbers along (layer, row, column); fill stands where the tensor has no such dimension."""
    layer, rest = (numbers[0], numbers[1:]) if layered else (fill, numbers)
    return (layer, rest[0], rest[1] if len(rest) > 1 else fill)


def _check_tiles(key: str, size: tuple[int, int, int], chunks: Sequence[Chunk]) -> None:
    """The chunks cover the tensor, each element once."""
    for chunk in chunks:
        if any(first + count > end for first, count, end in zip(chunk.first, chunk.count, size, strict=True)):
            raise ValueError(f"{key} has a chunk at {list(chunk.first)} outside of its shape")
    if sum(math.prod(chunk.count) for chunk in chunks) != math.prod(size):
        raise ValueError(f"the chunks of {key} do not cover it")
    ordered = sorted(chunks, key=lambda chunk: chunk.first)
    for number, chunk in enumerate(ordered):
        for other in ordered[number + 1 :]:
            if other.first[0] >= chunk.first[0] + chunk.count[0]:
                break
            if all(
                other.first[axis] < chunk.first[axis] + chunk.count[axis]
                and chunk.first[axis] < other.first[axis] + other.count[axis]
                for axis in range(3)
            ):
                raise ValueError(f"two chunks of {key} overlap at {list(other.first)}")


def _whole_numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{reprlib.repr(values)} are not whole numbers")
    return values
