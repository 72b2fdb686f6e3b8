"""Writes a distributed checkpoint of Megatron (a torch_dist folder) chunk by chunk, without Megatron."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ppomax.engine.models.distributed_checkpoint import METADATA_FILE

COMMON_FILE = "common.pt"
BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class CheckpointWriter:
    """Call `add` for every chunk and `finish` at the end: until then the folder has no `.metadata`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._chunks: dict[str, list[ChunkStorageMetadata]] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}

    def add(self, key: str, size: tuple[int, ...], offsets: tuple[int, ...], chunk: Tensor, *, rank: int) -> None:
        """Writes the chunk of a tensor of this whole size that begins at offsets. rank: whose file it goes to."""
        if key not in self._chunks:
            self._chunks[key] = []
            properties = TensorProperties(dtype=chunk.dtype)
            self._tensors[key] = TensorStorageMetadata(properties, torch.Size(size), self._chunks[key])
        self._chunks[key].append(ChunkStorageMetadata(torch.Size(offsets), chunk.size()))
        name = f"__{rank}_0.distcp"
        if name not in self._files:
            self._files[name] = (self._folder / name).open("xb")
        file = self._files[name]
        start = file.tell()
        # torch.save writes the whole storage of a view.
        whole = chunk.untyped_storage().nbytes() == chunk.numel() * chunk.itemsize and chunk.is_contiguous()
        try:
            torch.save(chunk if whole else chunk.clone(memory_format=torch.contiguous_format), file)
        except RuntimeError as error:  # what torch makes of a write that failed
            raise OSError(f"{self._folder / name}: {error.__context__ or error}") from error
        self._places[MetadataIndex(key, offsets)] = _StorageInfo(name, start, file.tell() - start)

    def finish(self, common: Mapping[str, Any] | Path) -> None:
        """Writes the rest. common: the content of common.pt, or a common.pt that is copied."""
        for file in self._files.values():
            file.close()
        if isinstance(common, Path):
            (self._folder / COMMON_FILE).write_bytes(common.read_bytes())
        else:
            torch.save(dict(common), self._folder / COMMON_FILE)
        (self._folder / "metadata.json").write_text(json.dumps(BACKENDS))
        metadata = Metadata(self._tensors, storage_data=self._places, storage_meta=StorageMeta())
        with (self._folder / METADATA_FILE).open("xb") as file:
            pickle.dump(metadata, file)
