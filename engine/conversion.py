"""Models and training checkpoints between Hugging Face folders and Megatron's distributed checkpoints.

One process, no GPU, no process group, no model: tensors go from file to file, a chunk at a time.
"""

import contextlib
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ppomax.engine.checkpoint_manifest import files_below, record_of, write_manifest
from ppomax.engine.checkpoint_state import STATE_FILE, read_state, shape_of_role
from ppomax.engine.data.tokenizer import Tokenizer, load_tokenizer
from ppomax.engine.errors import CheckpointError, ConfigError
from ppomax.engine.models.atomic_folder import NOTHING, AtomicFolder
from ppomax.engine.models.checkpoint_writer import COMMON_FILE, CheckpointWriter
from ppomax.engine.models.distributed_checkpoint import has_layers, weight_of
from ppomax.engine.models.hf_names import PADDING, Recipe, recipe_of, row_ranges
from ppomax.engine.models.hf_writer import MAX_FILE_BYTES, FolderWriter, tensor_order
from ppomax.engine.models.megatron_names import (
    Share,
    Split,
    is_vocabulary,
    saved_parameters,
    shares,
    stored_key,
    stored_rows,
)
from ppomax.engine.models.megatron_reader import SCALAR_HEAD_BESIDE, MegatronReader
from ppomax.engine.models.process_model import delimiter_of_checkpoint
from ppomax.engine.models.shape import ModelShape
from ppomax.engine.models.side_files import write_side_files
from ppomax.engine.models.stored_model import StoredModel, open_model

STEP_BYTES = 16 * 2**20
"""How much of a tensor is read at a time on its way into a chunk."""


def hf_to_megatron(source: str, target: str, *, split: Split, dtype: torch.dtype | None = None) -> StoredModel:
    """Writes a Hugging Face folder as a distributed checkpoint, with config.json and tokenizer beside it.

    split: whose chunks it has; any layout can load it. dtype: of the weights; None keeps theirs.
    Returns what was converted. Raises CheckpointError, and leaves nothing behind then.
    """
    model = open_model(source)
    if model.is_megatron:
        raise CheckpointError(f"{source} is a Megatron checkpoint already; expected a Hugging Face folder")
    split.check(model.shape)
    dtypes = dict.fromkeys(saved_parameters(model.shape), dtype) if dtype else _key_dtypes(model)
    _check_vocabulary(_own_tokenizer(model.folder), model.shape)
    with _filled(target) as partial:
        writer = CheckpointWriter(partial)
        for parameter, recipe in saved_parameters(model.shape).items():
            _write_parameter(writer, model, parameter, recipe, split, dtypes[parameter])
        writer.finish({"content_metadata": {}})
        write_side_files(
            partial, model.shape, dtypes["embedding.word_embeddings.weight"], tokenizer=None, source=model.folder
        )
    return model


def megatron_to_hf(
    source: str,
    target: str,
    *,
    role: str | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: str | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> StoredModel:
    """Writes a Hugging Face folder from a converted checkpoint, or from one role of a training checkpoint.

    dtype: of the weights; None keeps theirs. tokenizer: folder or file; None takes the one of the converted folder, or
    that of the run whose checkpoint it is. Returns what was converted. Raises CheckpointError, and leaves nothing
    behind then.
    """
    model = open_model(source, role)
    if not model.is_megatron:
        raise CheckpointError(f"{source} is a Hugging Face folder already; expected a Megatron checkpoint")
    loaded = _load_tokenizer(Path(tokenizer)) if tokenizer else run_tokenizer(model.step) if model.step else None
    _check_vocabulary(loaded or _own_tokenizer(model.folder), model.shape)
    dtypes = dict.fromkeys(model.names, dtype) if dtype else {name: model.weights.dtypes[name] for name in model.names}
    tensors = ((name, model.weights.read(model.names[name])) for name in tensor_order(model.shape))
    write_hf(
        target,
        model.shape,
        dtypes,
        tensors,
        tokenizer=loaded,
        source=None if model.step else model.folder,
        step_delimiter=delimiter_of_checkpoint(model.step, model.folder.name) if model.step else None,
        max_file_bytes=max_file_bytes,
    )
    return model


def reshard(source: str, target: str, *, split: Split) -> None:
    """Rewrites a training checkpoint, all roles with their optimizers, as ranks of another layout would save it.

    Any layout loads any checkpoint; of one whose chunks are its own each rank reads its own bytes alone.
    Raises CheckpointError, and leaves nothing behind then.
    """
    step = Path(source)
    roles = {role: shape_of_role(step, role) for role in read_state(step)["roles"]}
    missing = [step / role / COMMON_FILE for role in roles if not (step / role / COMMON_FILE).is_file()]
    if missing:
        raise CheckpointError(f"{missing[0]} is missing; take another checkpoint, or copy it again")
    with _filled(target) as partial:
        for role, shape in roles.items():
            split.check(shape)
            (partial / role).mkdir()
            reader = MegatronReader(step / role, shape)
            writer = CheckpointWriter(partial / role)
            _reshard_role(reader, writer, split)
            writer.finish(step / role / COMMON_FILE)
        shutil.copyfile(step / STATE_FILE, partial / STATE_FILE)
        write_manifest(partial, {name: record_of(partial / name) for name in files_below(partial)})


def write_hf(
    target: str,
    shape: ModelShape,
    dtypes: Mapping[str, torch.dtype],
    tensors: Iterator[tuple[str, Tensor]],
    *,
    tokenizer: Tokenizer | None,
    source: Path | None,
    step_delimiter: str | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes a Hugging Face folder from tensors that come one by one; they are cast to dtypes.

    tokenizer, source, step_delimiter: see `write_side_files`.
    """
    writer = FolderWriter(target, shape, dtypes, max_file_bytes, NOTHING)
    try:
        with _faults_of_writing(target):
            writer.begin()
            for name, tensor in tensors:
                writer.add(name, tensor.to(dtypes[name]))
                if writer.fault is not None:
                    break
            writer.finish(tokenizer, source=source, step_delimiter=step_delimiter)
    finally:
        writer.discard()


def run_tokenizer(step: Path) -> Tokenizer | None:
    """The tokenizer of the run that wrote a checkpoint: of its exports, else of the models that it started from."""
    run = step.absolute().parent.parent
    places = [run / "hf", run / "critic_hf"]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        model = tomllib.loads((run / "config.toml").read_text())["model"]
        places += [Path(model[key]) for key in ("tokenizer", "policy") if model.get(key)]
    found = next((place for place in places if has_tokenizer(place)), None)
    return _load_tokenizer(found) if found else None


def has_tokenizer(place: Path) -> bool:
    """Whether a tokenizer can be loaded from a file or folder."""
    return place.is_file() or any((place / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def _own_tokenizer(folder: Path) -> Tokenizer | None:
    return _load_tokenizer(folder) if has_tokenizer(folder) else None


def _load_tokenizer(path: Path) -> Tokenizer:
    try:
        return load_tokenizer(path)
    except (
        ConfigError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ) as error:  # also of odd files
        raise CheckpointError(f"the tokenizer {path} cannot be used: {error}") from error


def _check_vocabulary(tokenizer: Tokenizer | None, shape: ModelShape) -> None:
    if tokenizer is not None and tokenizer.vocab_size > shape.vocab_size:
        raise CheckpointError(
            f"{tokenizer.path} has {tokenizer.vocab_size} tokens, but the model has embeddings for {shape.vocab_size}: "
            "it belongs to another model; give the right one with --tokenizer, or remove it from the folder"
        )


def _key_dtypes(model: StoredModel) -> dict[str, torch.dtype]:
    """The type of each parameter; a checkpoint stacks the layers of one kind, which must share theirs."""
    first: dict[str, tuple[str, torch.dtype]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for parameter, recipe in saved_parameters(model.shape).items():
        for source in recipe.sources:
            name, dtype = model.names[source], model.weights.dtypes[model.names[source]]
            other, wanted = first.setdefault(stored_key(parameter)[0], (name, dtype))
            if dtype != wanted:
                raise CheckpointError(
                    f"{model.weights.origin(name)}: {name} is {dtype}, but {other}, which a Megatron checkpoint keeps "
                    f"in one tensor with it, is {wanted}; choose one type with --dtype"
                )
            dtypes[parameter] = dtype
    return dtypes


def _write_parameter(
    writer: CheckpointWriter, model: StoredModel, parameter: str, recipe: Recipe, split: Split, dtype: torch.dtype
) -> None:
    shape, weights = model.shape, model.weights
    sources = [model.names[source] for source in recipe.sources]
    padded = recipe_of(parameter, shape, split.tp) if is_vocabulary(parameter, shape) else recipe
    columns = weights.sizes[sources[0]][1:]
    size = (stored_rows(parameter, recipe, shape, split.tp), *columns)
    for share in shares(parameter, recipe, size[0], columns[0] if columns else 1, split.tp):
        chunk = torch.zeros(share.rows.stop - share.rows.start, share.columns.stop - share.columns.start, dtype=dtype)
        step = max(1, STEP_BYTES // (chunk.shape[1] * dtype.itemsize))
        row = 0
        for part in row_ranges(padded, share.rows.start, share.rows.stop):
            for first in range(part.start, part.stop, step):
                last = min(first + step, part.stop)
                if part.source != PADDING:
                    found = weights.read(sources[part.source], slice(first, last), share.columns)
                    chunk[row : row + last - first] = found.view(last - first, -1)
                row += last - first
        key, layer = stored_key(parameter)
        rank = split.stage_of(parameter, shape.num_layers) * split.tp + share.tp_rank
        _add_chunk(writer, key, layer, shape, size, share, chunk, rank)


def _reshard_role(reader: MegatronReader, writer: CheckpointWriter, split: Split) -> None:
    checkpoint, shape = reader.checkpoint, reader.shape
    parameters: dict[str, list[tuple[str, Recipe]]] = {}
    saved = saved_parameters(shape, extra_scalar_head=SCALAR_HEAD_BESIDE in checkpoint.tensors)
    for parameter, recipe in saved.items():
        parameters.setdefault(stored_key(parameter)[0], []).append((parameter, recipe))
    for key, tensor in checkpoint.tensors.items():
        if weight_of(key) not in parameters:
            raise CheckpointError(f"{checkpoint.folder} has {key}, which is no state of a weight of this model")
        columns = (tensor.size[1:] if has_layers(key) else tensor.size)[1:]
        for parameter, recipe in parameters[weight_of(key)]:
            size = (stored_rows(parameter, recipe, shape, split.tp), *columns)
            layer = stored_key(parameter)[1]
            true_rows = sum(piece.rows for piece in recipe.pieces)
            for share in shares(parameter, recipe, size[0], columns[0] if columns else 1, split.tp):
                rows = slice(min(share.rows.start, true_rows), min(share.rows.stop, true_rows))
                found = checkpoint.read(key, layer, rows, share.columns).view(rows.stop - rows.start, -1)
                padding = found.new_zeros(share.rows.stop - share.rows.start - len(found), found.shape[1])
                chunk = torch.cat([found, padding]) if len(padding) else found
                rank = split.stage_of(parameter, shape.num_layers) * split.tp + share.tp_rank
                _add_chunk(writer, key, layer, shape, size, share, chunk, rank)


def _add_chunk(
    writer: CheckpointWriter,
    key: str,
    layer: int,
    shape: ModelShape,
    size: tuple[int, ...],
    share: Share,
    chunk: Tensor,
    rank: int,
) -> None:
    """Adds the share `chunk` [rows, columns] of a parameter of this size, or of its optimizer's state."""
    offsets = (share.rows.start, share.columns.start)[: len(size)]
    chunk = chunk if len(size) > 1 else chunk[:, 0]
    if has_layers(key):
        writer.add(key, (shape.num_layers, *size), (layer, *offsets), chunk[None], rank=rank)
    else:
        writer.add(key, size, offsets, chunk, rank=rank)


@contextlib.contextmanager
def _filled(target: str) -> Iterator[Path]:
    """A folder that takes the target's name when the body is done, and is removed when it fails."""
    folder = AtomicFolder(target, NOTHING)
    try:
        with _faults_of_writing(target):
            folder.begin()
            yield folder.partial
            folder.commit()
    finally:
        folder.discard()


@contextlib.contextmanager
def _faults_of_writing(target: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"could not write {target}: {error}; check the free space and the permissions of its parent folder"
        ) from error
