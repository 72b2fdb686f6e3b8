"""Process groups of a role, made from its layout: what Megatron takes as `pg_collection`, without its global
`parallel_state`.
"""

import datetime
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection

from ppomax.engine.parallel.layout import ParallelLayout


@dataclass(frozen=True)
class RoleGroups:
    """The groups of one role on this rank.

    megatron: tp, pp, dp and the rest under Megatron's names.
    results: the ranks with this rank's tp coordinate: a sum over them brings every result of the last stages to every
    rank.
    back: the ranks of pp once more: sampled tokens, and hidden states on their way from the last stage to the next
    chunk of the first, travel back beside the hidden states that travel forward.
    """

    layout: ParallelLayout
    megatron: ProcessGroupCollection
    results: dist.ProcessGroup
    back: dist.ProcessGroup | None

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


def make_groups(layouts: dict[str, ParallelLayout], *, timeout_seconds: int = 600) -> dict[str, RoleGroups]:
    """The groups of each role; roles of equal layout share theirs. Every rank of the world must call it with the same
    layouts.

    timeout_seconds: a collective that takes longer fails. torch would not take it from the default group.
    """
    timeout = datetime.timedelta(seconds=timeout_seconds)
    made: dict[ParallelLayout, RoleGroups] = {}
    for layout in layouts.values():
        if layout not in made:
            made[layout] = _make(layout, timeout)
    return {role: made[layout] for role, layout in layouts.items()}


def _make(layout: ParallelLayout, timeout: datetime.timedelta) -> RoleGroups:
    grid = HyperCommGrid([layout.tp, 1, layout.pp, layout.dp], ["tp", "cp", "pp", "dp"])
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
    return RoleGroups(
        layout=layout, megatron=groups, results=results, back=_own_group(grid.get_rank_enum(["pp"]), timeout)
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
