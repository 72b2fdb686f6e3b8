"""safetensors files, read by byte ranges and written tensor by tensor.

The library's reader maps whole files into memory and its writer takes all tensors of a file at once. Here the memory
in use is that of the rows asked for, or of the tensor being written.
"""

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppomax.engine.errors import CheckpointError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}
MAX_HEADER_BYTES = 100_000_000  # the limit of the library itself
PIECE_BYTES = 16 * 2**20
"""How much is read at a time where only some columns are kept."""


@dataclass(frozen=True)
class TensorSpan:
    """Where a tensor lies in its file: bytes start..stop."""

    dtype: torch.dtype
    size: tuple[int, ...]
    start: int
    stop: int


def read_header(file: FileIO, path: Path) -> dict[str, TensorSpan]:
    """Name and place of every tensor. path: for messages.

    Raises CheckpointError unless the file is exactly its header and the tensors that the header names, end to end.
    """
    try:
        return _parse_header(file, os.fstat(file.fileno()).st_size)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); it is cut short, damaged, or a renamed pickle: "
            "copy it again"
        ) from error


def _parse_header(file: FileIO, file_bytes: int) -> dict[str, TensorSpan]:
    (header_bytes,) = struct.unpack("<Q", os.pread(file.fileno(), 8, 0))
    if header_bytes > min(file_bytes - 8, MAX_HEADER_BYTES):
        raise ValueError(f"its first 8 bytes announce a header of {header_bytes} bytes, the file has {file_bytes}")
    header = json.loads(os.pread(file.fileno(), header_bytes, 8), object_pairs_hook=_unique_keys)
    header.pop("__metadata__", None)
    begin = 8 + header_bytes
    spans = {name: _span(name, entry, begin) for name, entry in header.items()}
    end = begin
    for span in sorted(spans.values(), key=lambda span: span.start):
        if span.start != end:
            raise ValueError(f"its tensors do not lie end to end at byte {end}")
        end = span.stop
    if end != file_bytes:
        raise ValueError(f"its header describes {end} bytes, the file has {file_bytes}")
    return spans


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header names a tensor twice")
    return found


def _span(name: str, entry: Mapping[str, Any], begin: int) -> TensorSpan:
    size, (start, stop) = entry["shape"], entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*size, start, stop)):
        raise ValueError(f"shape or offsets of {name} are not whole numbers")
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} has the unknown dtype {entry['dtype']}")
    span = TensorSpan(DTYPES[entry["dtype"]], tuple(size), begin + start, begin + stop)
    if span.stop - span.start != torch.Size(size).numel() * span.dtype.itemsize:
        raise ValueError(f"{name} of shape {size} and dtype {entry['dtype']} has {stop - start} bytes")
    return span


def read_rows(file: FileIO, span: TensorSpan, rows: slice, columns: slice) -> Tensor:
    """Some rows and, of a matrix, some columns. Raises OSError where the file ends before them."""
    first, last, _ = rows.indices(span.size[0])
    width = torch.Size(span.size[1:]).numel()
    row_bytes = width * span.dtype.itemsize
    kept = range(width)[columns]
    out = torch.empty(max(last - first, 0), len(kept), dtype=span.dtype)
    if len(kept) == width:
        read_into(file, out, span.start + first * row_bytes)
    else:
        step = max(1, PIECE_BYTES // max(1, row_bytes))
        for row in range(0, len(out), step):
            piece = torch.empty(len(out[row : row + step]), width, dtype=span.dtype)
            read_into(file, piece, span.start + (first + row) * row_bytes)
            out[row : row + step] = piece[:, columns]
    return out.view(len(out), len(kept)) if len(span.size) > 1 else out.view(-1)


def read_into(file: FileIO, target: Tensor, offset: int) -> None:
    """Fills a contiguous tensor with the bytes from `offset` on. Raises OSError where the file ends before."""
    view = byte_view(target)
    done = 0
    while done < len(view):
        count = os.preadv(file.fileno(), [view[done:]], offset + done)
        if count == 0:
            raise OSError(f"the file ends at byte {offset + done}, {len(view) - done} bytes too early")
        done += count


def digest_of(file: FileIO, span: TensorSpan) -> str:
    """SHA-256 of a tensor's type, size and bytes. Raises OSError where the file ends before them."""
    digest = hashlib.sha256(f"{span.dtype} {list(span.size)}\n".encode())
    piece = torch.empty(min(PIECE_BYTES, span.stop - span.start), dtype=torch.uint8)
    for start in range(span.start, span.stop, PIECE_BYTES):
        part = piece[: span.stop - start]
        read_into(file, part, start)
        digest.update(byte_view(part))
    return digest.hexdigest()


def byte_view(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


class SafetensorsWriter:
    """Writes one file whose tensors are known beforehand and come one by one, in any order. Call `close` at the end."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        names = {dtype: name for name, dtype in DTYPES.items()}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._tensors, self._start = dict(tensors), {}
        end = 0
        # The widest first: whatever their sizes, every tensor is aligned to its type.
        for name in sorted(tensors, key=lambda name: -tensors[name][0].itemsize):
            dtype, size = tensors[name]
            self._start[name] = end
            end += torch.Size(size).numel() * dtype.itemsize
            header[name] = {"dtype": names[dtype], "shape": list(size), "data_offsets": [self._start[name], end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._begin = 8 + len(text)
        self._missing = set(tensors)
        self._file = path.open("xb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def add(self, name: str, tensor: Tensor) -> None:
        dtype, size = self._tensors[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != size or name not in self._missing:
            raise ValueError(f"{name}: {tensor.dtype} {list(tensor.shape)} was not announced, or comes a second time")
        self._file.seek(self._begin + self._start[name])
        self._file.write(byte_view(tensor.contiguous()))
        self._missing.remove(name)

    @property
    def is_complete(self) -> bool:
        return not self._missing

    def close(self) -> None:
        """Brings the file to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
