"""Collectives of a role outside Megatron's schedules: between stages, from the last stage, over replicas."""

import torch
import torch.distributed as dist
from torch import Tensor

from ppomax.engine.parallel.groups import RoleGroups


def receive_from_previous_stage(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, groups: RoleGroups
) -> Tensor:
    """The tensor that the previous pipeline stage sends; not for the first stage."""
    hidden = torch.empty(shape, dtype=dtype, device=device)
    dist.recv(hidden, group=groups.megatron.pp, group_src=groups.pp_rank - 1)
    return hidden


def send_to_next_stage(hidden: Tensor, groups: RoleGroups) -> None:
    """Gives a tensor to the next pipeline stage, which must be receiving; not for the last stage."""
    dist.send(hidden.contiguous(), group=groups.megatron.pp, group_dst=groups.pp_rank + 1)


def broadcast_from_last_stage(x: Tensor, groups: RoleGroups) -> None:
    """Overwrites x with that of the last pipeline stage. Every stage must call it."""
    if groups.layout.pp > 1:
        dist.broadcast(x, group=groups.megatron.pp, group_src=groups.layout.pp - 1)


def sum_over_replicas(x: Tensor, groups: RoleGroups) -> None:
    """Overwrites x with its sum over the replicas. Every replica must call it."""
    if groups.layout.dp > 1:
        dist.all_reduce(x, group=groups.megatron.dp)
