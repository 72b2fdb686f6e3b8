"""Weight differences, as the models of "Secrets of RLHF" were released: what a tuned model adds to a public one.

As in the released tool, only tensors of layers are differences; embedding, final norm and head are in a diff as they
are, so that the vocabulary may have grown. `inv_freq` buffers of old releases of transformers are ignored everywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ppomax.engine.compare_models import largest_difference
from ppomax.engine.conversion import has_tokenizer, write_hf
from ppomax.engine.errors import CheckpointError
from ppomax.engine.models.hf_names import EMBEDDING
from ppomax.engine.models.hf_writer import tensor_order
from ppomax.engine.models.stored_model import StoredModel, open_model

BODY = ("family", "num_layers", "hidden_size", "num_heads", "num_query_groups", "head_dim", "ffn_hidden_size")
"""What raw and tuned model must agree in."""

STEP_BYTES = 4 * 2**20
"""How much of a tensor is added at a time."""


@dataclass
class Recovery:
    """How far raw + diff is from the tuned model: the largest |difference| and the tensor that has it."""

    largest: float = 0.0
    tensor: str = ""


def make_diff(raw: str, tuned: str, target: str) -> Recovery:
    """Writes tuned - raw as a Hugging Face folder: layers in float32, the rest in its own type.

    Sums of floating-point numbers are rounded: returns how far `merge_diff` is from tuned. Raises CheckpointError.
    """
    base, model = _open_both(raw, tuned)
    recovery = Recovery()
    dtypes = {name: torch.float32 if _is_difference(name) else _dtype(model, name) for name in model.names}

    def difference(name: str, public: Tensor, own: Tensor) -> Tensor:
        added = own.float() - public.float()
        error = largest_difference((public.float() + added).to(_dtype(model, EMBEDDING)), own)
        if error > recovery.largest:
            recovery.largest, recovery.tensor = error, name
        return added

    tensors = ((name, _combined(base, model, name, dtypes[name], difference)) for name in tensor_order(model.shape))
    write_hf(target, model.shape, dtypes, tensors, tokenizer=None, source=model.folder)
    return recovery


def merge_diff(raw: str, diff: str, target: str, *, dtype: torch.dtype | None = None) -> None:
    """Writes raw + diff as a Hugging Face folder.

    dtype: of the weights; None takes that of the diff's embedding, which is the tuned model's. Raises CheckpointError.
    """
    base, model = _open_both(raw, diff)
    dtypes = dict.fromkeys(model.names, dtype or _dtype(model, EMBEDDING))

    def total(name: str, public: Tensor, own: Tensor) -> Tensor:
        return public.float() + own.float()

    tensors = ((name, _combined(base, model, name, dtypes[name], total)) for name in tensor_order(model.shape))
    side_files = model.folder if has_tokenizer(model.folder) else base.folder
    write_hf(target, model.shape, dtypes, tensors, tokenizer=None, source=side_files)


def _open_both(raw: str, other: str) -> tuple[StoredModel, StoredModel]:
    base, model = open_model(raw), open_model(other)
    for opened in (base, model):
        if opened.is_megatron:
            raise CheckpointError(
                f"{opened.folder} is a Megatron checkpoint; run `ppomax convert megatron-to-hf` first"
            )
    differing = [name for name in BODY if getattr(base.shape, name) != getattr(model.shape, name)]
    if differing:
        faults = ", ".join(
            f"{name} is {getattr(base.shape, name)} and {getattr(model.shape, name)}" for name in differing
        )
        raise CheckpointError(f"{raw} is not the model that {other} was made from: {faults}")
    return base, model


def _combined(
    base: StoredModel,
    model: StoredModel,
    name: str,
    dtype: torch.dtype,
    combine: Callable[[str, Tensor, Tensor], Tensor],
) -> Tensor:
    """combine of both models' weights where the diff is one; elsewhere the model's own."""
    own = model.names[name]
    size = model.weights.sizes[own]
    out = torch.empty(size, dtype=dtype)
    step = max(1, STEP_BYTES // (4 * torch.Size(size[1:]).numel()))
    for first in range(0, size[0], step):
        rows = slice(first, min(first + step, size[0]))
        weight = model.weights.read(own, rows)
        out[rows] = combine(name, base.weights.read(base.names[name], rows), weight) if _is_difference(name) else weight
    return out


def _dtype(model: StoredModel, name: str) -> torch.dtype:
    return model.weights.dtypes[model.names[name]]


def _is_difference(name: str) -> bool:
    return ".layers." in name
