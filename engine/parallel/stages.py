"""Collectives of a role outside Megatron's schedules: between chunks, from the last stage, over replicas."""

import torch
import torch.distributed as dist
from torch import Tensor

from ppomax.engine.parallel.groups import RoleGroups


def receive_from_previous_stage(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, groups: RoleGroups
) -> Tensor:
    """The tensor that the previous pipeline stage sends; to the first stage the last one, after each chunk but its
    last.
    """
    hidden = torch.empty(shape, dtype=dtype, device=device)
    group = groups.back if groups.is_first_stage else groups.megatron.pp
    dist.recv(hidden, group=group, group_src=(groups.pp_rank - 1) % groups.layout.pp)
    return hidden


def start_send_to_next(hidden: Tensor, groups: RoleGroups) -> tuple[Tensor, dist.Work]:
    """Starts to give a tensor to the next pipeline stage, from the last one to the first. Both results are to be kept
    until the second is waited for.
    """
    hidden = hidden.contiguous()
    group = groups.back if groups.is_last_stage else groups.megatron.pp
    work = dist.isend(hidden, group=group, group_dst=(groups.pp_rank + 1) % groups.layout.pp)
    assert work is not None
    return hidden, work


def start_broadcast_of_last_stage(x: Tensor, groups: RoleGroups) -> dist.Work | None:
    """Starts to overwrite x with that of the last pipeline stage; None with one stage. Every stage must call it, in the
    same order. It has a group of its own: it must not stand in the way of what stages send to each other meanwhile.
    """
    if groups.layout.pp == 1:
        return None
    return dist.broadcast(x, group=groups.back, group_src=groups.layout.pp - 1, async_op=True)


def sum_over_replicas(x: Tensor, groups: RoleGroups) -> None:
    """Overwrites x with its sum over the replicas. Every replica must call it."""
    if groups.layout.dp > 1:
        dist.all_reduce(x, group=groups.megatron.dp)


def max_over_replica(x: Tensor, groups: RoleGroups) -> None:
    """Overwrites x with the largest over the ranks of this replica. Every one of them must call it."""
    dist.all_reduce(x, op=dist.ReduceOp.MAX, group=groups.megatron.mp)


def max_over_role(x: Tensor, groups: RoleGroups) -> None:
    """Overwrites x with the largest over all ranks of the role. Every one of them must call it."""
    dist.all_reduce(x, op=dist.ReduceOp.MAX, group=groups.megatron.intra_dist_opt)
