"""Whether a source of weights has what a model needs, no more and no less."""

import torch

from ppomax.engine.errors import CheckpointError
from ppomax.engine.models.hf_names import (
    EMBEDDING,
    RELEASED_SCALAR_HEAD,
    SCALAR_HEAD,
    VOCABULARY_HEAD,
    weight_sizes,
)
from ppomax.engine.models.hf_reader import WeightReader, some
from ppomax.engine.models.shape import ModelShape

STEP_BYTES = 16 * 2**20
"""How much of a head is compared at a time."""


def match_names(shape: ModelShape, reader: WeightReader, source: str, *, has_scalar_head: bool) -> dict[str, str]:
    """Compares the reader with what the model needs; returns the reader's name of each needed tensor.

    source: the folder or setting that the weights come from, for messages. has_scalar_head: whether the model takes a
    scalar head from the reader.
    Raises CheckpointError where tensors are missing, left over or of other sizes, and where a head that config.json
    ties to the embedding is stored too and is another one.
    """
    # Before the names of all layers are made: a damaged config.json may announce any number of them.
    if shape.num_layers > len(reader.sizes):
        raise CheckpointError(
            f"{source} has {len(reader.sizes)} weights, too few for {shape.num_layers} layers; copy the folder again, "
            "or correct its config.json"
        )
    wanted = weight_sizes(shape)
    wanted.pop(SCALAR_HEAD, None)
    if has_scalar_head:
        wanted[SCALAR_HEAD] = (1, shape.hidden_size)
    names = {name: name for name in wanted}
    if SCALAR_HEAD not in reader.sizes and RELEASED_SCALAR_HEAD in reader.sizes and SCALAR_HEAD in names:
        names[SCALAR_HEAD] = RELEASED_SCALAR_HEAD
    missing = [name for name in names.values() if name not in reader.sizes]
    if missing == [SCALAR_HEAD]:
        raise CheckpointError(
            f"{source} is not a reward model or critic: it has no scalar head ({SCALAR_HEAD}, {RELEASED_SCALAR_HEAD}); "
            "give a folder that `ppomax reward` or `ppomax critic` wrote"
        )
    if missing:
        raise CheckpointError(
            f"{source} lacks {len(missing)} of the {len(names)} weights of a {shape.family} model with "
            f"{shape.num_layers} layers: {some(missing)}; copy the folder again, or correct its config.json"
        )
    for name, found in names.items():
        if tuple(reader.sizes[found]) != wanted[name]:
            raise CheckpointError(
                f"{reader.origin(found)}: {found} has shape {list(reader.sizes[found])}, not {list(wanted[name])}; "
                f"the weights and the config.json of {source} belong to different models"
            )
    extra = [name for name in reader.sizes if name not in names.values() and not _is_ignorable(name)]
    if extra:
        raise CheckpointError(
            f"{source} has {len(extra)} weights that a {shape.family} model has no place for: {some(extra)}; "
            "they would be lost: choose a plain model (merge adapters first)"
        )
    if shape.tie_embeddings and VOCABULARY_HEAD in reader.sizes:
        _check_tied_head(reader, source)
    return names


def _check_tied_head(reader: WeightReader, source: str) -> None:
    size = tuple(reader.sizes[EMBEDDING])
    step = max(1, STEP_BYTES // (8 * size[1]))
    parts = [slice(first, first + step) for first in range(0, size[0], step)]
    if tuple(reader.sizes[VOCABULARY_HEAD]) != size or not all(
        torch.equal(reader.read(EMBEDDING, rows).double(), reader.read(VOCABULARY_HEAD, rows).double())
        for rows in parts
    ):
        raise CheckpointError(
            f"{source}: config.json says tie_word_embeddings, but {VOCABULARY_HEAD} differs from {EMBEDDING} and would "
            'be lost; set "tie_word_embeddings": false in config.json, or remove that tensor'
        )


def _is_ignorable(name: str) -> bool:
    """Heads that this model does not use, and the rotary buffers that old releases of transformers stored."""
    return name in (VOCABULARY_HEAD, SCALAR_HEAD, RELEASED_SCALAR_HEAD) or name.endswith("rotary_emb.inv_freq")
