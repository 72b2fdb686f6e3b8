"""Hugging Face folders to and from models that are split over ranks: `load_weights` and `save_hf`.

No rank ever holds a whole model. Loading reads the rows and columns that a rank owns; exporting gathers one parameter
at a time (`hf_export.py`) and writes one file at a time. `hf_config.py` has config.json, `hf_names.py` the names and
layouts, `hf_reader.py` the sources of weights, `hf_writer.py` the folder that is written.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ppomax.engine.data.tokenizer import Tokenizer
from ppomax.engine.errors import CheckpointError
from ppomax.engine.models.hf_export import export_weights, global_name
from ppomax.engine.models.hf_match import match_names
from ppomax.engine.models.hf_names import PADDING, SCALAR_HEAD, Recipe, local_columns, local_rows, recipe_of
from ppomax.engine.models.hf_reader import WeightReader, fresh_scalar_head
from ppomax.engine.models.hf_writer import EARLIER_EXPORT, MAX_FILE_BYTES, FolderWriter, tensor_order
from ppomax.engine.models.shape import ModelShape
from ppomax.engine.models.transformer import PackedModel
from ppomax.engine.parallel.collectives import raise_on_all
from ppomax.engine.parallel.groups import RoleGroups


@torch.no_grad()
def load_weights(
    chunk: PackedModel,
    reader: WeightReader,
    source: str,
    *,
    head: Literal["load", "fresh"] = "load",
    seed: int = 0,
) -> None:
    """Fills one of this rank's chunks of a model; no collective.

    source: the folder or setting that the weights come from, for messages.
    head: "load" takes the scalar head, if the model has one, from the reader; "fresh" draws it from the seed, so that a
    causal LM can be the trunk of a reward model or critic. A vocabulary head is always loaded.
    Raises CheckpointError if the reader has other tensors, or tensors of other sizes, than the whole model needs: every
    rank finds the same fault.
    """
    has_scalar_head = chunk.has_scalar_head and head == "load"
    names = match_names(chunk.shape, reader, source, has_scalar_head=has_scalar_head)
    tp, tp_rank = chunk.pg_collection.tp.size(), chunk.pg_collection.tp.rank()
    for name, parameter in chunk.named_parameters():
        recipe = recipe_of(global_name(chunk, name), chunk.shape, tp)
        if recipe.sources == (SCALAR_HEAD,) and head == "fresh":
            parameter.copy_(fresh_scalar_head(chunk.shape.hidden_size, seed=seed))
        else:
            sources = [names[source] for source in recipe.sources]
            fill_share(parameter, recipe, reader, sources, tp=tp, tp_rank=tp_rank)


def fill_share(
    parameter: Tensor, recipe: Recipe, reader: WeightReader, sources: list[str], *, tp: int, tp_rank: int
) -> None:
    """Writes one tensor-parallel rank's share of a parameter. sources: the reader's names of the recipe's sources."""
    ranges = local_rows(recipe, tp, tp_rank)
    parts: dict[int, Tensor] = {}
    first_row: dict[int, int] = {}
    # Of each source a rank has consecutive rows, though pieces of others may lie between them: one read is enough.
    for number in {part.source for part in ranges} - {PADDING}:
        mine = [part for part in ranges if part.source == number]
        columns = local_columns(recipe, reader.sizes[sources[number]][-1], tp, tp_rank)
        first_row[number] = mine[0].start
        parts[number] = reader.read(sources[number], slice(mine[0].start, mine[-1].stop), columns)
    row = 0
    for part in ranges:
        num_rows = part.stop - part.start
        target = parameter[row : row + num_rows]
        if part.source == PADDING:
            target.zero_()
        else:
            target.copy_(parts[part.source].narrow(0, part.start - first_row[part.source], num_rows))
        row += num_rows


def save_hf(
    chunks: Sequence[PackedModel],
    shape: ModelShape,
    groups: RoleGroups,
    folder: str,
    *,
    dtype: torch.dtype,
    tokenizer: Tokenizer | None = None,
    step_delimiter: str | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes a folder that transformers loads; the role's first rank writes. Every rank of the run must call it.

    chunks: this rank's. shape: the model's; or, of a model with both heads, that with scalar=True: the scalar head is
    written, the vocabulary head is not. dtype: of the written tensors. step_delimiter: of a process model.
    The folder appears complete or not at all. One that exists is replaced only if an earlier export wrote it.
    Raises CheckpointError on every rank if that rank cannot write.
    """
    fault = f"could not write {folder}; check the free space and the permissions of its parent folder"
    writer = None
    if dist.get_rank() == groups.layout.first_rank:
        dtypes = dict.fromkeys(tensor_order(shape), dtype)
        writer = FolderWriter(folder, shape, dtypes, max_file_bytes, EARLIER_EXPORT)
    try:
        with raise_on_all(CheckpointError, fault):
            if writer:
                writer.begin()
        for name, tensor in export_weights(chunks, shape, groups, dtype, everywhere=False):
            if writer:
                writer.add(name, tensor)
        with raise_on_all(CheckpointError, fault):
            if writer:
                writer.finish(tokenizer, step_delimiter=step_delimiter)
    finally:
        if writer:
            writer.discard()
