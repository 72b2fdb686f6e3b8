"""How one role is spread over the ranks of a run: arithmetic only, no torch.

Turns the layouts of the configuration and the number of ranks into `ParallelLayout`s, or says why that cannot be.
`groups.py` makes process groups from them.
"""

from dataclasses import dataclass

from ppomax.engine.config import ROLES, RoleLayout, RunConfig
from ppomax.engine.errors import ConfigError


@dataclass(frozen=True)
class ParallelLayout:
    """tp * pp * dp ranks: tensor-parallel ranks are neighbours, then pipeline stages, then replicas.

    vpp: model chunks on each pipeline rank. The pp * vpp chunks of a model follow each other around the ranks: rank r
    holds chunks r, pp + r, 2 pp + r, ...
    first_stage_layers, last_stage_layers: of pipeline stages that have another number of layers than the others.
    """

    tp: int
    pp: int
    dp: int
    vpp: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None

    @property
    def num_ranks(self) -> int:
        """Ranks that the role takes."""
        return self.tp * self.pp * self.dp

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(tp_rank, pp_rank, dp_rank) of a rank of the role, in the order of Megatron's grid [tp, cp = 1, pp, dp]."""
        if not 0 <= rank < self.num_ranks:
            raise ValueError(f"rank {rank} is outside the {self.num_ranks} ranks of {self}")
        return rank % self.tp, rank // self.tp % self.pp, rank // (self.tp * self.pp)


def make_layout(role: str, layout: RoleLayout, world_size: int) -> ParallelLayout:
    """The layout of `role` over all ranks of the run; raises ConfigError if its product does not divide them."""
    replica_size = layout.tp * layout.pp
    if world_size % replica_size:
        fits = ", ".join(str(size) for size in range(1, world_size + 1) if world_size % size == 0)
        product = f"tp {layout.tp} * pp {layout.pp} = {replica_size}"
        ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
        raise ConfigError(
            f"parallel.{role}: {product} does not divide the {ranks} of this run; "
            f"choose tp and pp so that their product is one of {fits}, or start a multiple of {replica_size} ranks "
            "(torchrun --nproc-per-node)"
        )
    return ParallelLayout(
        tp=layout.tp,
        pp=layout.pp,
        dp=world_size // replica_size,
        vpp=layout.vpp,
        first_stage_layers=layout.first_stage_layers,
        last_stage_layers=layout.last_stage_layers,
    )


def check_layout(config: RunConfig, world_size: int) -> None:
    """Raises one ConfigError that lists every layout that does not fit on `world_size` ranks, and whose it is."""
    faults = []
    layouts = {role: getattr(config.parallel, role) for role in ROLES}
    for layout in dict.fromkeys(layouts.values()):
        roles = [role for role in ROLES if layouts[role] == layout]
        try:
            make_layout(", ".join(roles), layout, world_size)
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError("\n".join(faults))
