"""How one role is spread over the ranks of a run: arithmetic only, no torch.

Turns the layouts of the configuration and the number of ranks into `ParallelLayout`s, or says why that cannot be.
`groups.py` makes process groups from them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ppomax.engine.config import RunConfig
from ppomax.engine.config_models import ROLES, RoleLayout
from ppomax.engine.errors import ConfigError


@dataclass(frozen=True)
class ParallelLayout:
    """tp * pp * dp consecutive ranks: tensor-parallel ranks are neighbours, then pipeline stages, then replicas.

    vpp: model chunks on each pipeline rank. The pp * vpp chunks of a model follow each other around the ranks: rank r
    holds chunks r, pp + r, 2 pp + r, ...
    first_stage_layers, last_stage_layers: of pipeline stages that have another number of layers than the others.
    first_rank: of the run, where the role begins.
    """

    tp: int
    pp: int
    dp: int
    vpp: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    first_rank: int = 0

    @property
    def ranks(self) -> range:
        """The ranks of the run that the role takes."""
        return range(self.first_rank, self.first_rank + self.num_ranks)

    @property
    def num_ranks(self) -> int:
        """Ranks that the role takes."""
        return self.tp * self.pp * self.dp

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(tp_rank, pp_rank, dp_rank) of a rank of the role, in the order of Megatron's grid [tp, cp = 1, pp, dp]."""
        if rank not in self.ranks:
            raise ValueError(f"rank {rank} is outside the {self.num_ranks} ranks of {self}")
        number = rank - self.first_rank
        return number % self.tp, number // self.tp % self.pp, number // (self.tp * self.pp)


def make_layout(role: str, layout: RoleLayout, world_size: int) -> ParallelLayout:
    """The layout of `role` over its ranks of the run; raises ConfigError if they are not there, or its product does
    not divide them.
    """
    first = layout.first_rank
    num_ranks = world_size - first if layout.num_ranks is None else layout.num_ranks
    if num_ranks < 1 or first + num_ranks > world_size:
        wanted = f"ranks from {first} on" if layout.num_ranks is None else f"ranks {first} to {first + num_ranks - 1}"
        raise ConfigError(
            f"parallel.{role}: {wanted}, but this run has {_ranks(world_size)}, 0 to {world_size - 1}; "
            "lower first_rank or num_ranks, or start more ranks (torchrun --nproc-per-node)"
        )
    replica_size = layout.tp * layout.pp
    if num_ranks % replica_size:
        fits = ", ".join(str(size) for size in range(1, num_ranks + 1) if num_ranks % size == 0)
        product = f"tp {layout.tp} * pp {layout.pp} = {replica_size}"
        whose = "this run" if layout.is_everywhere else "the role"
        remedy = (
            f"start a multiple of {replica_size} ranks (torchrun --nproc-per-node)"
            if layout.num_ranks is None
            else f"set num_ranks to a multiple of {replica_size}"
        )
        raise ConfigError(
            f"parallel.{role}: {product} does not divide the {_ranks(num_ranks)} of {whose}; "
            f"choose tp and pp so that their product is one of {fits}, or {remedy}"
        )
    return ParallelLayout(
        tp=layout.tp,
        pp=layout.pp,
        dp=num_ranks // replica_size,
        vpp=layout.vpp,
        first_stage_layers=layout.first_stage_layers,
        last_stage_layers=layout.last_stage_layers,
        first_rank=first,
    )


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"


def check_layout(config: RunConfig, world_size: int, roles: Sequence[str] = ROLES) -> None:
    """Raises one ConfigError that lists every layout that does not fit on `world_size` ranks, and whose it is; or the
    ranks that none of `roles`, those that the stage runs, would use.
    """
    faults = []
    layouts = {role: getattr(config.parallel, role) for role in ROLES}
    for layout in dict.fromkeys(layouts.values()):
        alike = [role for role in ROLES if layouts[role] == layout]
        try:
            make_layout(", ".join(alike), layout, world_size)
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError("\n".join(faults))
    taken = {rank for role in roles for rank in make_layout(role, layouts[role], world_size).ranks}
    idle = [rank for rank in range(world_size) if rank not in taken]
    if idle:
        raise ConfigError(
            f"ranks {', '.join(map(str, idle))} of {world_size} would have nothing to do: this command runs "
            f"{', '.join(roles)}, which parallel.*.first_rank and num_ranks place elsewhere; change these, or start "
            "fewer ranks"
        )
