"""How the vocabulary is spread over a tensor-parallel group, and the two collectives that kernels hide.

Rank r of the group holds the contiguous block of columns [r * V/tp, (r + 1) * V/tp) of logits and rows of the
vocabulary head.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def first_column(columns: int, tp_group: ProcessGroup | None) -> int:
    """Global id of this rank's first vocabulary column, when every rank holds `columns` of them."""
    return 0 if tp_group is None else dist.get_rank(tp_group) * columns


def gather_shards(x: Tensor, tp_group: ProcessGroup | None) -> Tensor:
    """The tensors x of every rank, stacked in rank order: [tp, *x.shape]. Every rank of the group must call it."""
    if tp_group is None or dist.get_world_size(tp_group) == 1:
        return x[None]
    shards = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(tp_group))]
    dist.all_gather(shards, x.contiguous(), group=tp_group)
    return torch.stack(shards)


def sum_shards(x: Tensor, tp_group: ProcessGroup | None) -> Tensor:
    """The sum of the tensors x over the group, in place if tp > 1. Every rank of the group must call it."""
    if tp_group is not None and dist.get_world_size(tp_group) > 1:
        dist.all_reduce(x, group=tp_group)
    return x
