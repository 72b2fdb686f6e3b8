"""Process groups of a role, made from its layout: what Megatron takes as `pg_collection`, without its global
`parallel_state`.
"""

import datetime
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from ppomax.engine.parallel.collectives import collective_timeout
from ppomax.engine.parallel.layout import ParallelLayout


@dataclass(frozen=True)
class RoleGroups:
    """The groups of one role on this rank. A rank that is none of the role's has `outward` alone.

    megatron: tp, pp, dp and the rest under Megatron's names.
    results: the ranks with this rank's tp coordinate: a sum over them brings every result of the last stages to every
    rank.
    back: the ranks of pp once more: sampled tokens, and hidden states on their way from the last stage to the next
    chunk of the first, travel back beside the hidden states that travel forward.
    outward: the role's first rank and all ranks of the run that are not the role's: what it computes reaches them from
    there. None where there are no such ranks, and on the role's other ranks.
    """

    layout: ParallelLayout
    megatron: ProcessGroupCollection
    results: dist.ProcessGroup
    back: dist.ProcessGroup | None
    outward: dist.ProcessGroup | None = None

    @property
    def is_here(self) -> bool:
        """Whether this rank is one of the role's."""
        return dist.get_rank() in self.layout.ranks

    @property
    def tp_rank(self) -> int:
        return self.megatron.tp.rank()

    @property
    def pp_rank(self) -> int:
        return self.megatron.pp.rank()

    @property
    def dp_rank(self) -> int:
        return self.megatron.dp.rank()

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.layout.pp - 1

    def give_to_all(self, x: Tensor) -> None:
        """Overwrites x, on the ranks that are not the role's, with that of the role, the same on all of its ranks.

        Every rank of the run must call it. Where the role is on all of them nothing happens.
        """
        if self.outward is not None:
            whole = x.contiguous()
            dist.broadcast(whole, src=self.layout.first_rank, group=self.outward)
            if whole is not x:
                x.copy_(whole)

    def give_object_to_all(self, content: Any) -> Any:
        """On the ranks that are not the role's: what its first rank has as `content`; elsewhere content itself. Every
        rank of the run must call it. It travels as a pickle, between processes of one run.
        """
        if self.outward is None:
            return content
        box = [content]
        dist.broadcast_object_list(box, src=self.layout.first_rank, group=self.outward)
        return box[0]


def make_groups(layouts: dict[str, ParallelLayout], *, timeout_seconds: int = 600) -> dict[str, RoleGroups]:
    """The groups of each role; roles of equal layout share theirs. Every rank of the world must call it with the same
    layouts.

    timeout_seconds: a collective that takes longer fails. torch would not take it from the default group.
    """
    timeout = collective_timeout(timeout_seconds)
    made: dict[ParallelLayout, RoleGroups] = {}
    for layout in layouts.values():
        if layout not in made:
            made[layout] = _make(layout, timeout)
    return {role: made[layout] for role, layout in layouts.items()}


def _make(layout: ParallelLayout, timeout: datetime.timedelta) -> RoleGroups:
    shape = [layout.tp, 1, layout.pp, layout.dp]
    grid = HyperCommGrid(shape, ["tp", "cp", "pp", "dp"], rank_offset=layout.first_rank)
    groups = ProcessGroupCollection()
    groups.tp = grid.create_pg(["tp"], timeout=timeout)
    groups.cp = grid.create_pg(["cp"], timeout=timeout)
    groups.pp = grid.create_pg(["pp"], timeout=timeout)
    groups.dp = grid.create_pg(["dp"], timeout=timeout)
    groups.mp = grid.create_pg(["tp", "pp"], timeout=timeout)
    groups.tp_cp = grid.create_pg(["tp", "cp"], timeout=timeout)
    groups.dp_cp = grid.create_pg(["cp", "dp"], timeout=timeout)
    groups.tp_dp_cp = grid.create_pg(["tp", "cp", "dp"], timeout=timeout)
    # The distributed optimizer sums gradient norms over all ranks that hold a part of the model.
    groups.intra_dist_opt = grid.create_pg(["tp", "cp", "pp", "dp"], timeout=timeout)
    # There are no experts: a group of one for what asks for them, and the dense groups where a size must agree.
    groups.ep = groups.cp
    groups.expt_dp = groups.dp
    groups.tp_ep_pp = groups.mp
    groups.embd = _embedding_group(grid, timeout)
    groups.pos_embd = None
    results = grid.create_pg(["pp", "dp"], timeout=timeout)
    others = [rank for rank in range(dist.get_world_size()) if rank not in layout.ranks]
    return RoleGroups(
        layout=layout,
        megatron=groups,
        results=results,
        back=_own_group(grid.get_rank_enum(["pp"]), timeout),
        outward=_own_group([[layout.first_rank, *others]], timeout) if others else None,
    )


def _own_group(all_members: list[list[int]], timeout: datetime.timedelta) -> dist.ProcessGroup | None:
    """Makes a group of each list of ranks; returns this rank's, if any. Every rank of the world must call it."""
    mine = None
    for members in all_members:
        group = dist.new_group(members, timeout=timeout)
        if dist.get_rank() in members:
            mine = group
    return mine


def _embedding_group(grid: HyperCommGrid, timeout: datetime.timedelta) -> dist.ProcessGroup | None:
    """First and last stage of each pipeline: they hold copies of tied embeddings."""
    # Ranks of middle stages belong to none, which Megatron takes as a group of one.
    return _own_group([sorted({pipeline[0], pipeline[-1]}) for pipeline in grid.get_rank_enum(["pp"])], timeout)
