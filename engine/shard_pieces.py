"""A replica's part of the optimizer's state as pieces of whole tensors, so that it is saved from where it lies.

Each replica holds one range of every gradient bucket: of a matrix [R, C] any run of entries, from the middle of a row
to the middle of another. That is at most three rectangles, and a distributed checkpoint takes rectangles of any size.
Megatron's way to the same checkpoint gathers the whole state on all replicas first, in several copies.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor


def rectangles(size: Sequence[int], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, size) of the rectangles of which entries begin..end of a tensor, counted row by row, consist."""
    if begin >= end:
        return
    if len(size) == 1:
        yield (begin,), (end - begin,)
        return
    row = prod(size[1:])
    first, last = -(-begin // row), end // row  # whole rows
    if first > last:  # within one row
        spans = [(begin, end)]
    else:
        spans = [(begin, first * row), (last * row, end)]
        if first < last:
            yield (first, *[0] * (len(size) - 1)), (last - first, *size[1:])
    for start, stop in spans:
        if start < stop:
            number = start // row
            for offset, inner in rectangles(size[1:], start - number * row, stop - number * row):
                yield (number, *offset), (1, *inner)


def pieces_of(
    whole: ShardedTensor | ShardedTensorFactory, parameter: Tensor, begin: int, state: Mapping[str, Tensor]
) -> Iterator[ShardedTensor]:
    """What is saved of a parameter's state, under the names that Megatron gives it.

    whole: how the parameter is saved. begin: of its entries, row by row, the first that this replica has. state: by
    name, [n] for entries begin..begin + n.
    """
    parts = whole.build() if isinstance(whole, ShardedTensorFactory) else [whole]
    end = begin + len(next(iter(state.values())))
    for part in parts:
        # A part is some rows of the parameter: gate and up projection lie in one matrix.
        start = part.data.storage_offset() - parameter.storage_offset()
        size = tuple(part.data.shape)
        low, high = max(begin, start), min(end, start + part.data.numel())
        for offset, inner in rectangles(size, low - start, high - start):
            first = start + _flat(offset, size) - begin
            layer, place = part.global_offset[: part.prepend_axis_num], part.global_offset[part.prepend_axis_num :]
            local = (*[1] * part.prepend_axis_num, *inner)
            for name, values in state.items():
                yield replace(
                    part,
                    key=f"optimizer.state.{name}.{part.key}",
                    data=values[first : first + prod(inner)].view(local),
                    dtype=values.dtype,
                    local_shape=local,
                    global_offset=(*layer, *(a + b for a, b in zip(place, offset, strict=True))),
                    axis_fragmentations=None,
                    # Of the copies that tensor-parallel ranks and pipeline stages hold one is saved, of replicas each.
                    replica_id=(*part.replica_id[:-1], 0),
                    prepend_axis_num=0,
                )


def _flat(offset: Sequence[int], size: Sequence[int]) -> int:
    position = 0
    for index, length in zip(offset, size, strict=True):
        position = position * length + index
    return position
