"""One tensor as torch.save writes it (a zip file with a pickle and the numbers), inside of a larger file."""

import os
import struct
import zipfile
import zlib
from io import FileIO, RawIOBase
from typing import Any

import torch

from ppomax.engine.models.pickled_records import read_tensor_pickle
from ppomax.engine.models.safetensors_file import PIECE_BYTES

LOCAL_HEADER = struct.Struct("<4s5H3L2H")
"""What precedes each file in a zip file; its last two numbers are the lengths of what follows it."""


def find_numbers(window: "Window", size: tuple[int, ...], dtype: torch.dtype) -> int:
    """Where in a file of torch.save the numbers of its one tensor begin, which must have this size and type.

    Raises ValueError, and what zipfile and pickle raise of a damaged file.
    """
    with zipfile.ZipFile(window) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        prefix = name.removesuffix("data.pkl")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it is compressed")
        if archive.read(prefix + "byteorder") != b"little":
            raise ValueError("its numbers are not little-endian")
        storage, offset, found, stride, *_ = read_tensor_pickle(archive.read(name)).state
        _, stored_dtype, key, _, count = storage.state
        wanted = torch.empty(size, dtype=dtype, device="meta")
        if (tuple(found), tuple(stride), offset, stored_dtype) != (size, wanted.stride(), 0, dtype):
            raise ValueError(f"it holds {stored_dtype} {list(found)}, expected {dtype} {list(size)}")
        entry = archive.getinfo(f"{prefix}data/{key}")
        num_bytes = wanted.numel() * dtype.itemsize
        if entry.file_size != num_bytes or count != wanted.numel():
            raise ValueError(f"it holds {entry.file_size} bytes of numbers, expected {num_bytes}")
        signature, *_, name_length, extra_length = LOCAL_HEADER.unpack(
            window.pread(entry.header_offset, LOCAL_HEADER.size)
        )
        start = entry.header_offset + LOCAL_HEADER.size + name_length + extra_length
        if signature != b"PK\x03\x04" or window.checksum(start, num_bytes) != entry.CRC:
            raise ValueError("the checksum of its numbers is wrong")
    return start


class Window(RawIOBase):
    """A part of a file as a file of its own. Only what is asked for is read."""

    def __init__(self, file: FileIO, start: int, stop: int) -> None:
        self._file, self._start, self._size, self._position = file, start, stop - start, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        content = self.pread(self._position, len(buffer))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def pread(self, position: int, num_bytes: int) -> bytes:
        num_bytes = max(0, min(num_bytes, self._size - position))
        return os.pread(self._file.fileno(), num_bytes, self._start + position)

    def checksum(self, position: int, num_bytes: int) -> int:
        """CRC-32, as zip files have it."""
        crc = 0
        for first in range(position, position + num_bytes, PIECE_BYTES):
            crc = zlib.crc32(self.pread(first, min(PIECE_BYTES, position + num_bytes - first)), crc)
        return crc
