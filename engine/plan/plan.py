"""The plan of a stage: bytes of every rank in every phase, predicted times, and whether it fits."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from ppomax.engine.config import RunConfig
from ppomax.engine.errors import DoesNotFitError
from ppomax.engine.models.shape import ModelShape
from ppomax.engine.plan.gpus import Gpu
from ppomax.engine.plan.memory import GIB, PHASES, Bytes, RoleMemory, role_memory
from ppomax.engine.plan.models import PlannedRole, planned_roles
from ppomax.engine.plan.moments import Moment, held, moments
from ppomax.engine.plan.timing import (
    Cost,
    checkpoint_cost,
    export_cost,
    load_cost,
    offload_cost,
    rollout_cost,
    scoring_cost,
    update_cost,
)
from ppomax.engine.plan.workload import Workload, make_workload

ITERATION = ("rollout", "scoring", "update", "offload")
"""What every iteration does; the rest comes now and then."""
CACHE_SHARE = 0.5
"""As rollout/generate.py: of what is free when generation starts, the cache's part where sampling.cache_gib is 0."""


@dataclass(frozen=True)
class RankPlan:
    """One rank, and all that have the same stages of the same roles. roles: in the order in which they are loaded."""

    rank: int
    roles: tuple[RoleMemory, ...]

    def kept(self, moment: Moment) -> Bytes:
        """What all roles have on the device at a moment, without what the work takes besides."""
        parts = (held(memory, moment.needs.get(memory.role.name, ())) for memory in self.roles)
        return sum(parts, Bytes())

    def peak(self, phase: str) -> Bytes:
        """The most of a phase, in which roles work one after the other. Loading has only the roles so far."""
        if phase != "load":
            of_phase = [moment for moment in moments(self.roles) if moment.phase == phase]
            return max((self.kept(one) + one.extra for one in of_phase), key=lambda part: part.total)
        so_far, peaks = Bytes(), []
        for memory in self.roles:
            peaks.append(so_far + memory.resident + memory.extra["load"])
            so_far += held(memory, ())
        return max(peaks, key=lambda part: part.total)

    @property
    def phases(self) -> list[str]:
        return [phase for phase in PHASES if any(phase in role.extra for role in self.roles)]

    def worst_phase(self) -> str:
        return max(self.phases, key=lambda phase: self.peak(phase).total)

    @cached_property
    def total(self) -> int:
        """Bytes at the peak."""
        return max(self.peak(phase).total for phase in self.phases)


@dataclass(frozen=True)
class Plan:
    """ranks: those that differ, each once. place: of every rank of the run, its number among them.

    capacity: bytes of one GPU, None where nothing limits them. cache_pages: of the key / value cache on one rank, None
    without sampling. costs: by (role, phase), empty without a GPU to predict for.
    """

    config: RunConfig
    command: str
    world_size: int
    workload: Workload
    roles: tuple[PlannedRole, ...]
    ranks: tuple[RankPlan, ...]
    place: tuple[int, ...]
    capacity: int | None
    cache_pages: int | None
    costs: dict[tuple[str, str], Cost]

    @cached_property
    def worst(self) -> RankPlan:
        return max(self.ranks, key=lambda rank: rank.total)

    def rank(self, rank: int) -> RankPlan:
        """What holds for a rank of the run."""
        return self.ranks[self.place[rank]]

    @property
    def faults(self) -> list[str]:
        """Why it does not fit; empty where it fits."""
        if self.capacity is None:
            return []
        worst, faults = self.worst, []
        if worst.total > self.capacity:
            phase = worst.worst_phase()
            faults.append(
                f"rank {worst.rank} needs {worst.total / GIB:.1f} GiB in {phase}, "
                f"{(worst.total - self.capacity) / GIB:.1f} GiB more than the {self.capacity / GIB:.1f} GiB of its GPU"
            )
        # Of every rank: the fullest one may not sample.
        caches = [role.cache for rank in self.ranks for role in rank.roles if role.cache is not None]
        least = max((cache.least for cache in caches), default=0)
        if self.cache_pages is not None and self.cache_pages < least:
            faults.append(
                f"the key / value cache has room for {max(0, self.cache_pages)} pages of "
                f"{self.config.sampling.page_size} tokens, but the longest request of each flight needs {least}"
            )
        return faults

    @property
    def seconds(self) -> float:
        """Of one iteration; loading, checkpoints and export come besides.

        Roles on the same rank take turns, those on other ranks work meanwhile: a phase takes as long as the rank with
        the most to do.
        """
        return sum(max(self._work(rank, phase) for rank in self.ranks) for phase in ITERATION)

    def _work(self, rank: RankPlan, phase: str) -> float:
        costs = (self.costs.get((memory.role.name, phase), Cost()) for memory in rank.roles)
        return sum(cost.seconds for cost in costs)

    @property
    def tokens_per_second(self) -> float:
        """Prompt and response tokens of an iteration, per second and GPU."""
        return self.workload.sequences * self.workload.mean / self.seconds / self.world_size


def make_plan(
    config: RunConfig,
    command: str,
    world_size: int,
    *,
    gpu: Gpu | None = None,
    capacity: int | None = None,
    device: str = "cuda",
    model: ModelShape | None = None,
    vocab_size: Callable[[], int] | None = None,
    prompt: int | None = None,
    response: int | None = None,
) -> Plan:
    """gpu: what to predict times for, and its memory where capacity is unset. device: "cpu" for a run without GPUs.

    model, vocab_size: see planned_roles. prompt, response: see make_workload. Raises ConfigError and CheckpointError as
    planned_roles does.
    """
    if capacity is None and gpu is not None:
        capacity = int(gpu.memory)
    workload = make_workload(config, command, prompt=prompt, response=response)
    roles = planned_roles(config, command, world_size, model=model, vocab_size=vocab_size)
    memories = {
        (role.name, stage): role_memory(role, stage, config, command, workload, device)
        for role in roles
        for stage in range(role.layout.pp)
    }
    keys = [
        tuple((role.name, role.layout.coordinates(rank)[1]) for role in roles if rank in role.layout.ranks)
        for rank in range(world_size)
    ]
    first = {key: keys.index(key) for key in dict.fromkeys(keys)}
    ranks = [RankPlan(rank, tuple(memories[one] for one in key)) for key, rank in first.items()]
    number = {key: i for i, key in enumerate(first)}
    place = tuple(number[key] for key in keys)
    pages = _cache_pages(ranks, config, capacity)
    if pages is not None:
        ranks = [replace(rank, roles=tuple(_with_cache(role, pages) for role in rank.roles)) for rank in ranks]
    plan = Plan(config, command, world_size, workload, tuple(roles), tuple(ranks), place, capacity, pages, {})
    return plan if gpu is None else replace(plan, costs=_costs(plan, gpu))


def check_fits(plan: Plan) -> None:
    """Raises DoesNotFitError with the numbers of a plan that does not fit."""
    if plan.faults:
        raise DoesNotFitError("\n".join(plan.faults))


def _with_cache(memory: RoleMemory, pages: int) -> RoleMemory:
    return memory if memory.cache is None else memory.with_cache(pages)


def _cache_pages(ranks: list[RankPlan], config: RunConfig, capacity: int | None) -> int | None:
    """Pages on each rank: what is wanted, as far as the budget of the rank with the least goes."""
    affordable, wanted = [], None
    for rank in ranks:
        for memory in rank.roles:
            if memory.cache is None:
                continue
            wanted = memory.cache.wanted
            budget = config.sampling.cache_gib * GIB
            if budget == 0 and capacity is not None:
                (sampling,) = [moment for moment in moments(rank.roles) if moment.phase == "rollout"]
                budget = CACHE_SHARE * (capacity - rank.kept(sampling).total)
            if budget != 0:
                affordable.append(int(budget // memory.cache.page))
    return wanted if wanted is None else max(0, min([wanted, *affordable]))


def _costs(plan: Plan, gpu: Gpu) -> dict[tuple[str, str], Cost]:
    config, workload = plan.config, plan.workload
    costs: dict[tuple[str, str], Cost] = {}
    memories = {memory.role.name: memory for rank in plan.ranks for memory in rank.roles}
    for role in plan.roles:
        memory = memories[role.name]
        costs[role.name, "load"] = load_cost(role, config, plan.world_size, gpu)
        if role.samples:
            assert memory.cache is not None
            assert plan.cache_pages is not None
            share = plan.cache_pages / memory.cache.wanted
            running = max(1, int(share * min(config.sampling.batch_size, -(-workload.sequences // role.layout.dp))))
            costs[role.name, "rollout"] = rollout_cost(role, config, workload, gpu, running=running)
        if "scoring" in memory.extra and not _skips_scoring(role, config, plan.command):
            costs[role.name, "scoring"] = scoring_cost(role, config, workload, gpu)
        if role.offload != "none":
            costs[role.name, "offload"] = offload_cost(role, config, workload, gpu)
        if role.trained:
            costs[role.name, "update"] = update_cost(role, config, workload, gpu)
            costs[role.name, "checkpoint"] = checkpoint_cost(role, config, gpu)
            costs[role.name, "export"] = export_cost(role, config, gpu)
    return costs


def _skips_scoring(role: PlannedRole, config: RunConfig, command: str) -> bool:
    """The policy's own log-probs may be the sampler's."""
    return role.samples and command in ("ppo", "critic") and config.ppo.old_logprobs == "rollout"
