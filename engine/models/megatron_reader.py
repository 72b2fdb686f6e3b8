"""The weights in a distributed checkpoint of Megatron under their Hugging Face names."""

from pathlib import Path

import torch
from torch import Tensor

from ppomax.engine.errors import CheckpointError
from ppomax.engine.models.distributed_checkpoint import OPTIMIZER, DistributedCheckpoint, has_layers
from ppomax.engine.models.hf_names import Recipe, weight_sizes
from ppomax.engine.models.hf_reader import ALL, some
from ppomax.engine.models.megatron_names import is_vocabulary, saved_parameters, stored_key
from ppomax.engine.models.shape import ModelShape

SCALAR_HEAD_BESIDE = "scalar_head.weight"
"""The scalar head of a model that has a vocabulary head too: a reward model while the LM term of Eq. 2 trains it."""


class MegatronReader:
    """Reads what is asked for and no more; dtypes and sizes as of a Hugging Face folder. See `StoredWeights`."""

    def __init__(self, folder: Path, shape: ModelShape) -> None:
        """shape: with scalar=True, of a checkpoint with both heads: the scalar head.

        Raises CheckpointError unless the checkpoint holds a model of this shape, and nothing beside it but the states
        of its optimizer.
        """
        self.checkpoint = DistributedCheckpoint(folder)
        self.shape = shape
        # Before the names of all layers are made: a damaged description may announce any number of them.
        stored = max((tensor.size[0] for key, tensor in self.checkpoint.tensors.items() if has_layers(key)), default=0)
        if shape.num_layers > stored:
            raise CheckpointError(
                f"{folder} has {stored} layers, not {shape.num_layers}; "
                "its weights and its description belong to different models"
            )
        self._recipes = saved_parameters(shape)
        self._place: dict[str, tuple[str, int]] = {
            source: (parameter, number)
            for parameter, recipe in self._recipes.items()
            for number, source in enumerate(recipe.sources)
        }
        self.sizes = weight_sizes(shape)
        self._check()
        tensors = self.checkpoint.tensors
        self.dtypes = {name: tensors[self._key(parameter)[0]].dtype for name, (parameter, _) in self._place.items()}

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        parameter, source = self._place[name]
        key, layer = self._key(parameter)
        first, last, _ = rows.indices(self.sizes[name][0])
        runs = _stored_rows(self._recipes[parameter], source, first, last)
        if len(runs) == 1:
            return self.checkpoint.read(key, layer, slice(*runs[0]), columns)
        out = torch.empty(0)
        row = 0
        for start, stop in runs:
            part = self.checkpoint.read(key, layer, slice(start, stop), columns)
            if row == 0:
                out = part.new_empty(last - first, *part.shape[1:])
            out[row : row + len(part)] = part
            row += len(part)
        return out

    def origin(self, name: str) -> str:
        return str(self.checkpoint.folder)

    def _key(self, parameter: str) -> tuple[str, int]:
        if self.shape.scalar and parameter == "output_layer.weight" and SCALAR_HEAD_BESIDE in self.checkpoint.tensors:
            return SCALAR_HEAD_BESIDE, 0
        return stored_key(parameter)

    def _check(self) -> None:
        folder, shape, tensors = self.checkpoint.folder, self.shape, self.checkpoint.tensors
        # Of a model with two heads the other one is left where it is.
        other_head = "output_layer.weight" if shape.scalar else SCALAR_HEAD_BESIDE
        wanted = {self._key(parameter)[0] for parameter in self._recipes}
        if shape.scalar and tensors.get(self._key("output_layer.weight")[0]) is None:
            raise CheckpointError(f"{folder} has no scalar head: it is not a reward model or critic")
        missing = sorted(wanted - tensors.keys())
        extra = [key for key in tensors if key not in wanted | {other_head} and not key.startswith(OPTIMIZER)]
        if missing or extra:
            what = f"lacks {some(missing)}" if missing else f"has {some(extra)}, for which there is no place"
            raise CheckpointError(f"{folder} is not the checkpoint of a {shape.family} model of this shape: it {what}")
        for parameter, recipe in self._recipes.items():
            key = self._key(parameter)[0]
            size = tensors[key].size
            rows = sum(piece.rows for piece in recipe.pieces)
            layers = (shape.num_layers,) if has_layers(key) else ()
            expected = (*layers, rows, *self.sizes[recipe.sources[0]][1:])
            # The vocabulary may be padded to a multiple of tp, which divides the heads.
            padding = size[0] - rows if is_vocabulary(parameter, shape) else 0
            found = (rows, *size[1:]) if 0 < padding < shape.num_heads else size
            if found != expected:
                raise CheckpointError(
                    f"{folder}: {key} has shape {list(size)}, not {list(expected)}; "
                    "its weights and its description belong to different models"
                )


def _stored_rows(recipe: Recipe, source: int, first: int, last: int) -> list[tuple[int, int]]:
    """Runs of rows of the stored parameter that are rows first..last of one of its sources."""
    runs: list[tuple[int, int]] = []
    stored = taken = 0
    for piece in recipe.pieces:
        if piece.source == source:
            start, stop = max(first - taken, 0), min(last - taken, piece.rows)
            if start < stop:
                runs.append((stored + start, stored + stop))
            taken += piece.rows
        stored += piece.rows
    return runs
