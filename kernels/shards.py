"""How the vocabulary is spread over a tensor-parallel group, and the two collectives that kernels hide.

Rank r of the group holds the contiguous block of columns [r * V/tp, (r + 1) * V/tp) of logits and rows of the
vocabulary head.
"""

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group


def group_name(tp_group: ProcessGroup | None) -> str | None:
    """The name by which a custom operator, whose arguments cannot be groups, is told its group; see `group_of`."""
    return None if tp_group is None else tp_group.group_name


def group_of(name: str | None) -> ProcessGroup | None:
    """The group of this process that has this name."""
    return None if name is None else _resolve_process_group(name)  # type: ignore[arg-type]  # a str of its own type


def group_size(tp_group: ProcessGroup | None) -> int:
    return 1 if tp_group is None else dist.get_world_size(tp_group)


def first_column(columns: int, tp_group: ProcessGroup | None) -> int:
    """Global id of this rank's first vocabulary column, when every rank holds `columns` of them."""
    return 0 if tp_group is None else dist.get_rank(tp_group) * columns


def num_real_columns(columns: int, first: int, vocab_size: int | None) -> int:
    """How many of the `columns` from id `first` on are tokens; the rest, the last ones, are padding."""
    return columns if vocab_size is None else min(max(vocab_size - first, 0), columns)


def gather_shards(x: Tensor, tp_group: ProcessGroup | None) -> Tensor:
    """The tensors x of every rank, stacked in rank order: [tp, *x.shape]. Every rank of the group must call it."""
    if group_size(tp_group) == 1:
        return x[None]
    shards = x.new_empty(group_size(tp_group), *x.shape)
    dist.all_gather_into_tensor(shards.flatten(), x.flatten(), group=tp_group)
    return shards


def sum_shards(x: Tensor, tp_group: ProcessGroup | None) -> Tensor:
    """The sum of the tensors x over the group, in place if tp > 1. Every rank of the group must call it."""
    finish_sums([start_sum(x, tp_group)])
    return x


def start_sum(x: Tensor, tp_group: ProcessGroup | None) -> dist.Work | None:
    """Starts to sum the tensors x over the group, in place; x may be read after `finish_sums`."""
    if group_size(tp_group) == 1:
        return None
    return dist.all_reduce(x, group=tp_group, async_op=True)


def finish_sums(works: Iterable[dist.Work | None]) -> None:
    """Waits for sums that `start_sum` started."""
    for work in works:
        if work is not None:
            work.wait()
