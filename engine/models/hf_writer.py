"""Writes a Hugging Face folder from tensors that arrive one by one: weights, index, config.json, tokenizer.

Runs on one rank, and knows nothing of the others; `hf_checkpoint.save_hf` brings the tensors to it.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ppomax.engine.data.tokenizer import Tokenizer
from ppomax.engine.errors import CheckpointError
from ppomax.engine.models.hf_config import config_json
from ppomax.engine.models.hf_names import parameter_names, recipe_of, weight_sizes
from ppomax.engine.models.hf_reader import INDEX_FILE, SINGLE_FILE
from ppomax.engine.models.shape import ModelShape

MAX_FILE_BYTES = 5 * 10**9
"""Largest file of an export, as transformers 4 had it."""

EXPORT_MARK = {"exported_by": "ppomax"}
"""A field of config.json: tells our folders, which an export may replace, from those of others."""


class FolderWriter:
    """Collects tensors into files of a folder beside the target, which takes the target's place once it is complete.

    Call `begin`, `add` for every tensor in the order of `tensor_order`, `finish`, and at the end, always, `discard`.
    """

    def __init__(self, folder: str, shape: ModelShape, dtype: torch.dtype, max_file_bytes: int) -> None:
        self._target = Path(folder).absolute()
        self._partial = self._target.with_name(f"{self._target.name}.tmp-{os.getpid()}")
        self._shape, self._dtype = shape, dtype
        self._files = plan_files(tensor_order(shape), weight_sizes(shape), dtype.itemsize, max_file_bytes)
        self._file_of = {name: file for file, names in self._files.items() for name in names}
        self._pending: dict[str, Tensor] = {}
        self._fault: Exception | None = None

    def begin(self) -> None:
        """Makes the partial folder; raises CheckpointError if the target may not be replaced."""
        if self._target.exists() and not _is_replaceable(self._target):
            raise CheckpointError(
                f"{self._target} exists and is not the work of an earlier export; move it away or choose another folder"
            )
        self._partial.mkdir(parents=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes the next tensor. A failure is kept for `finish`: the other ranks go on sending until then."""
        if self._fault is not None:
            return
        try:
            self._pending[name] = tensor.cpu()
            file = self._file_of[name]
            if len(self._pending) == len(self._files[file]):
                save_file(self._pending, self._partial / file, metadata={"format": "pt"})
                # safetensors makes files that only their owner may read.
                (self._partial / file).chmod(self._partial.stat().st_mode & 0o666)
                self._pending = {}
        except Exception as error:
            self._fault, self._pending = error, {}

    def finish(self, tokenizer: Tokenizer | None) -> None:
        """Writes what is not weights and puts the folder in place; raises what went wrong here or in `add`."""
        if self._fault is not None:
            raise self._fault
        self._write_json_files(tokenizer)
        if tokenizer is not None:
            tokenizer.save(self._partial)
        _replace(self._target, self._partial)

    def discard(self) -> None:
        """Removes what is left of a failed export."""
        shutil.rmtree(self._partial, ignore_errors=True)

    def _write_json_files(self, tokenizer: Tokenizer | None) -> None:
        bos, eos, pad = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) if tokenizer else (None, None, None)
        dtype = str(self._dtype).removeprefix("torch.")
        config = config_json(self._shape, dtype=dtype, bos_id=bos, eos_id=eos, pad_id=pad)
        _write_json(self._partial / "config.json", config | EXPORT_MARK)
        if not self._shape.scalar:
            ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
            _write_json(self._partial / "generation_config.json", ids)
        if len(self._files) > 1:
            total = self._shape.num_parameters() * self._dtype.itemsize
            index = {"metadata": {"total_size": total}, "weight_map": self._file_of}
            _write_json(self._partial / INDEX_FILE, index)


def tensor_order(shape: ModelShape) -> list[str]:
    """The tensors of a folder in the order in which an export writes them."""
    return [source for name in parameter_names(shape) for source in recipe_of(name, shape, tp=1).sources]


def plan_files(
    order: list[str], sizes: Mapping[str, tuple[int, ...]], itemsize: int, max_file_bytes: int
) -> dict[str, list[str]]:
    """File names and the tensors in each, in the given order; only a lone tensor may exceed max_file_bytes."""
    files: list[list[str]] = [[]]
    num_bytes = 0
    for name in order:
        size = itemsize * torch.Size(sizes[name]).numel()
        if files[-1] and num_bytes + size > max_file_bytes:
            files.append([])
            num_bytes = 0
        files[-1].append(name)
        num_bytes += size
    if len(files) == 1:
        return {SINGLE_FILE: files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": names for i, names in enumerate(files, start=1)}


def _is_replaceable(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.items() >= EXPORT_MARK.items() and any(folder.glob("*.safetensors"))


def _replace(target: Path, new: Path) -> None:
    """Puts the folder `new` in the place of target, which stays as it was if that fails."""
    if not target.exists():
        new.rename(target)
        return
    old = target.with_name(f"{target.name}.old-{os.getpid()}")
    target.rename(old)
    try:
        new.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
