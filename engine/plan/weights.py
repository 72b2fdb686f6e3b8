"""Parameters of a model on one rank, and the bytes that they, their gradients and Adam's state take: exact.

Arithmetic over `ModelShape` and `ParallelLayout`; tests compare it with what roles allocate. The buffers are those of
Megatron's DistributedDataParallel with the distributed optimizer: one per chunk of the model, parameters from the last
to the first, each start a multiple of 64 numbers, each bucket's end one of lcm(dp, 128).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ppomax.engine.models.shape import ModelShape, layers_per_stage
from ppomax.engine.parallel.layout import ParallelLayout

PARAMETER_START = 64
BUCKET_END = 128
ITEMSIZE = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Parameter:
    """numel: numbers on this rank. is_shared: an embedding that two pipeline stages hold, in a bucket of its own."""

    numel: int
    is_shared: bool = False


def num_layers(shape: ModelShape, layout: ParallelLayout, pp_rank: int) -> int:
    """Of each chunk of a pipeline rank."""
    stages = layers_per_stage(
        shape.num_layers, pp=layout.pp, first=layout.first_stage_layers, last=layout.last_stage_layers
    )
    return stages[pp_rank] // layout.vpp


def layer_matrices(shape: ModelShape, tp: int) -> dict[str, int]:
    """Numbers in each matrix of a layer on one tp rank."""
    heads = shape.num_heads + 2 * shape.num_query_groups
    return {
        "linear_qkv": shape.hidden_size * heads * shape.head_dim // tp,
        "linear_proj": shape.num_heads * shape.head_dim * shape.hidden_size // tp,
        "linear_fc1": shape.hidden_size * 2 * shape.ffn_hidden_size // tp,
        "linear_fc2": shape.ffn_hidden_size * shape.hidden_size // tp,
    }


def vocabulary_matrix(shape: ModelShape, tp: int) -> int:
    """Numbers of the embedding, or of a vocabulary head, on one tp rank."""
    return shape.padded_vocab_size(tp) // tp * shape.hidden_size


def chunk_parameters(
    shape: ModelShape, layout: ParallelLayout, pp_rank: int, chunk: int, *, extra_scalar_head: bool = False
) -> Iterator[Parameter]:
    """The parameters of one chunk of a pipeline rank, in the order of the modules."""
    is_first = pp_rank == 0 and chunk == 0
    is_last = pp_rank == layout.pp - 1 and chunk == layout.vpp - 1
    is_copied = shape.tie_embeddings and layout.pp > 1
    hidden, heads = shape.hidden_size, shape.num_heads + 2 * shape.num_query_groups
    matrices = layer_matrices(shape, layout.tp)
    if is_first:
        yield Parameter(vocabulary_matrix(shape, layout.tp), is_shared=is_copied)
    for _ in range(num_layers(shape, layout, pp_rank)):
        yield Parameter(hidden)
        yield Parameter(matrices["linear_proj"])
        yield Parameter(matrices["linear_qkv"])
        if shape.qkv_bias:
            yield Parameter(heads * shape.head_dim // layout.tp)
        if shape.qk_norm:
            yield Parameter(shape.head_dim)
            yield Parameter(shape.head_dim)
        yield Parameter(hidden)
        yield Parameter(matrices["linear_fc1"])
        yield Parameter(matrices["linear_fc2"])
    if not is_last:
        return
    yield Parameter(hidden)
    if shape.scalar:
        yield Parameter(hidden)
    elif not (shape.tie_embeddings and is_first):
        yield Parameter(vocabulary_matrix(shape, layout.tp), is_shared=is_copied)
    if extra_scalar_head:
        yield Parameter(hidden)


def stage_parameters(
    shape: ModelShape, layout: ParallelLayout, pp_rank: int, *, extra_scalar_head: bool = False
) -> list[list[Parameter]]:
    """Those of every chunk of a pipeline rank."""
    return [
        list(chunk_parameters(shape, layout, pp_rank, chunk, extra_scalar_head=extra_scalar_head))
        for chunk in range(layout.vpp)
    ]


def num_parameters(chunks: list[list[Parameter]]) -> int:
    return sum(parameter.numel for chunk in chunks for parameter in chunk)


def buffer_numel(parameters: list[Parameter], dp: int) -> int:
    """Numbers in the gradient buffer of one chunk, padding included."""
    end_multiple = math.lcm(dp, BUCKET_END)
    position, is_open = 0, False
    for parameter in reversed(parameters):
        position = _up(position, PARAMETER_START)
        if parameter.is_shared and is_open:
            position = _up(position, end_multiple)
        position += parameter.numel
        is_open = not parameter.is_shared
        if parameter.is_shared:
            position = _up(position, end_multiple)
    return _up(position, end_multiple)


@dataclass(frozen=True)
class StateBytes:
    """What a role keeps on one rank as long as it lives. numel: numbers in its weights, padding included."""

    numel: int
    weights: int
    gradients: int
    optimizer: int


def state_bytes(chunks: list[list[Parameter]], dp: int, dtype: str, *, trained: bool) -> StateBytes:
    """dtype: "fp32" or "bf16", of the weights; gradients and moments are float32, and 16-bit weights have float32 main
    weights beside them, split over dp as the moments are.
    """
    itemsize = ITEMSIZE[dtype]
    if not trained:
        numel = num_parameters(chunks)
        return StateBytes(numel, numel * itemsize, 0, 0)
    numel = sum(buffer_numel(chunk, dp) for chunk in chunks)
    per_number = 8 if itemsize == 4 else 12
    return StateBytes(numel, numel * itemsize, 4 * numel, per_number * numel // dp)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
