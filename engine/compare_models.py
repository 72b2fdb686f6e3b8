"""The largest difference between the weights of two models, layer by layer, whatever format each is in."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ppomax.engine.errors import CheckpointError
from ppomax.engine.models.hf_names import EMBEDDING
from ppomax.engine.models.hf_writer import tensor_order
from ppomax.engine.models.stored_model import StoredModel

STEP_BYTES = 4 * 2**20
"""How much of a tensor is compared at a time."""


@dataclass(frozen=True)
class Difference:
    """The largest |a - b| in a layer (inf where one side is not a number), and the tensor that has it."""

    layer: str
    largest: float
    tensor: str


def compare_models(a: StoredModel, b: StoredModel) -> list[Difference]:
    """One entry for the embedding, each layer, the final norm and the head.

    Raises CheckpointError where the models have different shapes: their weights cannot be compared then.
    """
    ours, theirs = asdict(a.shape), asdict(b.shape)
    differing = [name for name in ours if ours[name] != theirs[name]]
    if differing:
        faults = ", ".join(f"{name} is {ours[name]} and {theirs[name]}" for name in differing)
        raise CheckpointError(f"{a.folder} and {b.folder} are different models: {faults}")
    found: dict[str, Difference] = {}
    for name in tensor_order(a.shape):
        largest = max(largest_difference(x, y) for x, y in _pieces(a, b, name))
        layer = _layer(name)
        if layer not in found or largest > found[layer].largest:
            found[layer] = Difference(layer, largest, name)
    return list(found.values())


def largest_difference(x: Tensor, y: Tensor) -> float:
    """Largest |x - y|; numbers that are equal, and entries that are not numbers on both sides, differ by 0."""
    wide = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
    x, y = x.to(wide), y.to(wide)
    same = (x == y) | (x.isnan() & y.isnan())
    return float((x - y).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).masked_fill(same, 0).max())


def _pieces(a: StoredModel, b: StoredModel, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    size = a.weights.sizes[a.names[name]]
    step = max(1, STEP_BYTES // (4 * torch.Size(size[1:]).numel()))
    for first in range(0, size[0], step):
        rows = slice(first, min(first + step, size[0]))
        yield a.weights.read(a.names[name], rows), b.weights.read(b.names[name], rows)


def _layer(name: str) -> str:
    if name.startswith("model.layers."):
        return f"layer {name.split('.')[2]}"
    return {EMBEDDING: "embedding", "model.norm.weight": "final norm"}.get(name, "head")
