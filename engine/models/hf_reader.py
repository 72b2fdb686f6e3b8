"""Where weights come from, tensor by tensor under their Hugging Face names: a folder of safetensors, or random draws.

Both are read through the same interface, so that a random model is the same model for every parallel layout.
"""

import json
import os
import zlib
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ppomax.engine.errors import CheckpointError
from ppomax.engine.models.hf_names import SCALAR_HEAD, weight_sizes
from ppomax.engine.models.safetensors_file import TensorSpan, digest_of, read_header, read_rows
from ppomax.engine.models.shape import ModelShape

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

ALL = slice(None)


class WeightReader(Protocol):
    """A source of named tensors of which parts can be read."""

    @property
    def sizes(self) -> Mapping[str, tuple[int, ...]]:
        """Name and size of every tensor."""
        ...

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """Some rows and, of a matrix, some columns of a tensor, on the CPU."""
        ...

    def origin(self, name: str) -> str:
        """Where a tensor comes from, for messages."""
        ...


class StoredWeights(WeightReader, Protocol):
    """Tensors of a folder, which have a type there."""

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """Name and type of every tensor."""
        ...


class SafetensorsReader:
    """The weights of a Hugging Face folder, of which it reads only the bytes asked for.

    Pickles are refused: loading one runs whatever code is in it.
    """

    def __init__(self, folder: str) -> None:
        """Opens every file of the folder and checks it against the index; raises CheckpointError."""
        self._folder = Path(folder)
        self._file_of: dict[str, str] = {}
        self._files: dict[str, FileIO] = {}
        self._contents: dict[str, dict[str, TensorSpan]] = {}
        if (self._folder / SINGLE_FILE).is_file():
            self._open(SINGLE_FILE)
            self._file_of = dict.fromkeys(self._contents[SINGLE_FILE], SINGLE_FILE)
        else:
            self._file_of = self._read_index()
            for file in sorted(set(self._file_of.values())):
                self._open(file)
            self._check_index()
        self.sizes = {name: self._span(name).size for name in self._file_of}
        self.dtypes = {name: self._span(name).dtype for name in self._file_of}

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        span = self._span(name)
        if not span.dtype.is_floating_point or span.dtype.itemsize == 1:
            raise CheckpointError(
                f"{self.origin(name)}: {name} is {span.dtype}, expected bfloat16, float16, float32 or float64; "
                "choose a model that is not quantised"
            )
        try:
            return read_rows(self._files[self._file_of[name]], span, rows, columns)
        except OSError as error:
            raise CheckpointError(f"cannot read {name} of {self.origin(name)}: {error}; copy the file again") from error

    def digest(self, name: str) -> str:
        """SHA-256 of a tensor's type, size and bytes. Raises OSError."""
        return digest_of(self._files[self._file_of[name]], self._span(name))

    def origin(self, name: str) -> str:
        return str(self._folder / self._file_of[name])

    def _span(self, name: str) -> TensorSpan:
        return self._contents[self._file_of[name]][name]

    def _open(self, file: str) -> None:
        path = self._folder / file
        if not os.path.isfile(path):  # False, too, for names that no file can have
            raise CheckpointError(f"{path} is missing, but {self._folder / INDEX_FILE} names it; copy the folder again")
        try:
            self._files[file] = path.open("rb", buffering=0)
            self._contents[file] = read_header(self._files[file], path)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}; copy the file again") from error

    def _read_index(self) -> dict[str, str]:
        path = self._folder / INDEX_FILE
        if not path.is_file():
            self._refuse_folder()
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            index = {str(name): str(file) for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{path} is not an index of safetensors files ({error!r}); expected a JSON object with weight_map"
            ) from error
        outside = sorted(file for file in set(index.values()) if Path(file).name != file)
        if outside:
            raise CheckpointError(f"{path} names {outside[0]!r}, expected the name of a file in the same folder")
        return index

    def _refuse_folder(self) -> None:
        if not self._folder.is_dir():
            raise CheckpointError(
                f"{self._folder} is not a folder; expected a downloaded Hugging Face model: config.json and safetensors"
            )
        pickles = sorted(path.name for pattern in PICKLES for path in self._folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{self._folder} has only pickled weights ({some(pickles)}), which run code when they are loaded; "
                "if you trust it, convert it with transformers: "
                "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
            )
        raise CheckpointError(f"{self._folder} has no weights: expected {SINGLE_FILE}, or {INDEX_FILE} and its files")

    def _check_index(self) -> None:
        absent = [name for name, file in self._file_of.items() if name not in self._contents[file]]
        if absent:
            raise CheckpointError(
                f"{self.origin(absent[0])} lacks {some(absent)}, which {self._folder / INDEX_FILE} says it holds; "
                "copy the folder again"
            )
        # What no index names is listed too, so that nothing is lost unseen.
        for file, content in self._contents.items():
            for name in content:
                other = self._file_of.setdefault(name, file)
                if other != file:
                    raise CheckpointError(
                        f"{self._folder} has {name} in {other} and in {file}: one of the files is of another model; "
                        "copy the folder again"
                    )


class RandomReader:
    """Freshly drawn weights: each tensor depends on the seed and its name alone.

    Matrices are normal with deviation std, norms 1, biases 0; a scalar head is `fresh_scalar_head`.
    """

    def __init__(self, shape: ModelShape, *, seed: int, std: float) -> None:
        self.sizes = weight_sizes(shape)
        self._seed = seed
        self._std = std

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        size = self.sizes[name]
        if name == SCALAR_HEAD:
            return fresh_scalar_head(size[1], seed=self._seed)[rows, columns]
        if len(size) == 1:
            return torch.full(size, 1.0 if name.endswith("norm.weight") else 0.0)[rows]
        return _normal(name, size, seed=self._seed, std=self._std)[rows, columns]

    def origin(self, name: str) -> str:
        return f"random weights, seed {self._seed}"


def fresh_scalar_head(hidden_size: int, *, seed: int) -> Tensor:
    """[1, H] float32, normal with deviation 1 / sqrt(H + 1), as in Stiennon et al. 2020."""
    return _normal(SCALAR_HEAD, (1, hidden_size), seed=seed, std=(hidden_size + 1) ** -0.5)


def _normal(name: str, size: tuple[int, ...], *, seed: int, std: float) -> Tensor:
    # torch's CPU generator drops all but the low 32 bits of its seed: the hash must cover both.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.empty(size).normal_(std=std, generator=generator)


def some(names: list[str]) -> str:
    """The first few of many names, for messages."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
