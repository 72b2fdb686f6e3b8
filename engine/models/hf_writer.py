"""Writes a Hugging Face folder from tensors that arrive one by one: weights, index, config.json, tokenizer.

Runs on one rank, and knows nothing of the others; `hf_checkpoint.save_hf` brings the tensors to it.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ppomax.engine.data.tokenizer import Tokenizer
from ppomax.engine.models.atomic_folder import AtomicFolder, Replaceable
from ppomax.engine.models.hf_names import EMBEDDING, parameter_names, recipe_of, weight_sizes
from ppomax.engine.models.hf_reader import INDEX_FILE, SINGLE_FILE
from ppomax.engine.models.safetensors_file import SafetensorsWriter
from ppomax.engine.models.shape import ModelShape
from ppomax.engine.models.side_files import EXPORT_MARK, write_json, write_side_files

MAX_FILE_BYTES = 5 * 10**9
"""Largest file of an export, as transformers 4 had it."""


class FolderWriter:
    """Writes tensors into the files of a folder beside the target, which takes the target's place once it is complete.

    Call `begin`, `add` for every tensor, `finish`, and at the end, always, `discard`.
    """

    def __init__(
        self,
        folder: str,
        shape: ModelShape,
        dtypes: Mapping[str, torch.dtype],
        max_file_bytes: int,
        replaceable: Replaceable,
    ) -> None:
        """dtypes: of every tensor. replaceable: which targets that exist may be replaced, say `EARLIER_EXPORT`."""
        self._folder = AtomicFolder(folder, replaceable)
        self._shape, self._dtypes = shape, dtypes
        self._sizes = weight_sizes(shape)
        self._files = plan_files(tensor_order(shape), self._sizes, dtypes, max_file_bytes)
        self._file_of = {name: file for file, names in self._files.items() for name in names}
        self._open: dict[str, SafetensorsWriter] = {}
        self.fault: Exception | None = None

    def begin(self) -> None:
        """Makes the partial folder; raises CheckpointError if the target may not be replaced."""
        self._folder.begin()

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes the next tensor. A failure is kept in `fault` for `finish`: other ranks go on sending until then."""
        if self.fault is not None:
            return
        try:
            file = self._file_of[name]
            if file not in self._open:
                tensors = {other: (self._dtypes[other], self._sizes[other]) for other in self._files[file]}
                self._open[file] = SafetensorsWriter(self._folder.partial / file, tensors)
            self._open[file].add(name, tensor.cpu())
            if self._open[file].is_complete:
                self._open[file].close()
        except Exception as error:
            self.fault = error

    def finish(
        self, tokenizer: Tokenizer | None, *, source: Path | None = None, step_delimiter: str | None = None
    ) -> None:
        """Writes what is not weights and puts the folder in place; raises what went wrong here or in `add`.

        source, step_delimiter: see `write_side_files`.
        """
        if self.fault is not None:
            raise self.fault
        unfinished = [file for file in self._files if file not in self._open or not self._open[file].is_complete]
        if unfinished:
            raise ValueError(f"tensors of {unfinished} were never added")
        if len(self._files) > 1:
            total = sum(torch.Size(self._sizes[name]).numel() * dtype.itemsize for name, dtype in self._dtypes.items())
            index = {"metadata": {"total_size": total}, "weight_map": self._file_of}
            write_json(self._folder.partial / INDEX_FILE, index)
        dtype = self._dtypes[EMBEDDING]
        write_side_files(
            self._folder.partial,
            self._shape,
            dtype,
            tokenizer=tokenizer,
            source=source,
            step_delimiter=step_delimiter,
        )
        self._folder.commit()

    def discard(self) -> None:
        """Removes what is left of a failed export."""
        self._folder.discard()


def tensor_order(shape: ModelShape) -> list[str]:
    """The tensors of a folder in the order in which an export writes them."""
    return [source for name in parameter_names(shape) for source in recipe_of(name, shape, tp=1).sources]


def plan_files(
    order: list[str], sizes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], max_file_bytes: int
) -> dict[str, list[str]]:
    """File names and the tensors in each, in the given order; only a lone tensor may exceed max_file_bytes."""
    files: list[list[str]] = [[]]
    num_bytes = 0
    for name in order:
        size = dtypes[name].itemsize * torch.Size(sizes[name]).numel()
        if files[-1] and num_bytes + size > max_file_bytes:
            files.append([])
            num_bytes = 0
        files[-1].append(name)
        num_bytes += size
    if len(files) == 1:
        return {SINGLE_FILE: files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": names for i, names in enumerate(files, start=1)}


def _is_export(folder: Path) -> bool:
    """An empty folder, or one that an earlier export wrote."""
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.items() >= EXPORT_MARK.items() and any(folder.glob("*.safetensors"))


EARLIER_EXPORT = Replaceable(_is_export, "the work of an earlier export")
"""The rule of training runs, which export again when they are started again."""
