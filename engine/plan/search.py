"""The layouts of a cluster that fit, fastest first by predicted time; of those alike, the plainest.

Roles take turns on all ranks, or policy and reference have some ranks and critic and reward model the others: times and
bytes of roles on the same ranks add up, and of two sets of ranks the slower one counts in each phase. So each role's
layouts are planned once, the combinations are ranked by these sums, and the best of them are planned whole.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ppomax.engine.config import RunConfig
from ppomax.engine.errors import ConfigError
from ppomax.engine.models.shape import check_split
from ppomax.engine.parallel.layout import ParallelLayout
from ppomax.engine.plan.advice import with_layout, with_values
from ppomax.engine.plan.gpus import Gpu
from ppomax.engine.plan.memory import role_memory
from ppomax.engine.plan.models import PlannedRole
from ppomax.engine.plan.moments import TRAINING, held
from ppomax.engine.plan.plan import Plan
from ppomax.engine.plan.timing import Cost, rollout_cost, scoring_cost, update_cost
from ppomax.engine.plan.workload import Workload

WHOLE_PLANS = 60
"""Combinations of a kind, colocated or split, the best by their sums, that are planned whole."""
BEST_OF_A_SET = 40
"""Combinations of one set of ranks, the fastest, that are tried with those of the other set. At most WHOLE_PLANS, since
no more of any set are kept.
"""
LARGEST_PP = 16
SPLIT = (("policy", "reference"), ("critic", "reward"))
SHARES = (1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)
"""Of the ranks, for the first set."""
PHASES = ("rollout", "scoring", "update")
ALIKE = 0.02
"""Predicted times that differ by this fraction say nothing about which layout is faster."""


@dataclass(frozen=True)
class Candidate:
    """A layout of roles that have the same. seconds: by phase. state: bytes that stay on its fullest rank. extra: the
    most of any phase beside them.
    """

    layout: ParallelLayout
    seconds: dict[str, float]
    state: int
    extra: int

    @cached_property
    def total(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Choice:
    """Layouts of roles, by name, and the seconds of each phase."""

    layouts: dict[str, ParallelLayout]
    seconds: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def beside(self, other: "Choice") -> "Choice":
        """With another one on other ranks."""
        seconds = {phase: max(self.seconds[phase], other.seconds[phase]) for phase in self.seconds}
        return Choice(self.layouts | other.layouts, seconds)


@dataclass(frozen=True)
class Found:
    """A layout that fits, and the values that set it. was_uneven: stages of the one before had layers of their own.
    was_placed: so had roles ranks.
    """

    plan: Plan
    values: dict[str, Any]
    was_uneven: bool
    was_placed: bool

    def overrides(self) -> list[str]:
        """As the command line has it; what is equal in all roles once."""
        lines = []
        for size in ("tp", "pp", "vpp"):
            own = {key: value for key, value in self.values.items() if key.endswith(f".{size}")}
            if len(set(own.values())) == 1:
                value = next(iter(own.values()))
                lines += [f"parallel.{size}={value}"] if value > 1 or size != "vpp" else []
            else:
                lines += [f"{key}={value}" for key, value in own.items()]
        placed = {key: value for key, value in self.values.items() if key.endswith((".first_rank", ".num_ranks"))}
        shown = placed if self.was_placed else {key: value for key, value in placed.items() if value}
        lines += [f"{key}={'none' if value is None else value}" for key, value in shown.items()]
        if self.plan.config.parallel.sequence_parallel and any(role.layout.tp > 1 for role in self.plan.roles):
            lines.append("parallel.sequence_parallel=true")
        if any(key.endswith(".offload") for key in self.values):
            lines.append("parallel.offload=all")
        if self.was_uneven:
            lines += ["parallel.first_stage_layers=none", "parallel.last_stage_layers=none"]
        return [*lines, f"model.recompute={self.plan.config.model.recompute}"]


def search(plan: Plan, gpu: Gpu, replan: Callable[[RunConfig, int], Plan], *, most: int = 5) -> list[Found]:
    """Up to `most` combinations of layouts of the roles of `plan`, with and without recomputation, that fit; where none
    does, with everything offloaded.
    """
    found = _search(plan, gpu, replan, {})
    if not found:
        found = _search(plan, gpu, replan, with_layout("offload", "all"))
    found.sort(key=lambda one: _rank(one.plan.seconds, [role.layout for role in one.plan.roles]))
    return found[:most]


def _search(
    plan: Plan, gpu: Gpu, replan: Callable[[RunConfig, int], Plan], values_of_all: dict[str, Any]
) -> list[Found]:
    found: list[Found] = []
    is_uneven = any(role.layout.first_stage_layers or role.layout.last_stage_layers for role in plan.roles)
    is_placed = any(role.layout.num_ranks < plan.world_size for role in plan.roles)
    for recompute in ("none", "full"):
        base: dict[str, Any] = {"model.recompute": recompute, "parallel.sequence_parallel": True}
        base |= values_of_all | with_layout("first_stage_layers", None) | with_layout("last_stage_layers", None)
        config = with_values(plan.config, base)
        # Apart: sums say too often of one kind that it fits, and it would keep the other one from being planned.
        for choices in (_colocated(plan, config, gpu), list(_split(plan, config, gpu))):
            choices.sort(key=lambda one: _rank(one.total, list(one.layouts.values())))
            for choice in choices[:WHOLE_PLANS]:
                values = base | _layout_values(plan, choice.layouts)
                whole = replan(with_values(plan.config, values), plan.world_size)
                if not whole.faults:
                    found.append(Found(whole, values, is_uneven, is_placed))
    return found


def _rank(seconds: float, layouts: Sequence[ParallelLayout]) -> tuple[int, int, int, float]:
    """Of what is equally fast as far as the model can tell, the plainest first: few layouts, few chunks."""
    return _alike(seconds), len(set(layouts)), sum(layout.vpp for layout in layouts), seconds


def _alike(seconds: float) -> int:
    """Equal for times that say nothing about which layout is faster."""
    return round(math.log(seconds) / math.log(1 + ALIKE))


def _colocated(plan: Plan, config: RunConfig, gpu: Gpu) -> list[Choice]:
    """All roles on all ranks. Frozen roles that only score share a layout."""
    groups: list[list[PlannedRole]] = [[role] for role in plan.roles if role.trained or role.samples]
    groups += [frozen] if (frozen := [role for role in plan.roles if not (role.trained or role.samples)]) else []
    return _choices(groups, range(plan.world_size), plan, config, gpu)


def _split(plan: Plan, config: RunConfig, gpu: Gpu) -> Iterator[Choice]:
    """The roles of PPO on two sets of ranks, of several sizes."""
    by_name = {role.name: role for role in plan.roles}
    # Both score, or sample, on all ranks (check_layout).
    is_refused = config.ppo.overlap_scoring > 0 or config.sampling.backend == "vllm"
    if is_refused or not all(name in by_name for names in SPLIT for name in names):
        return
    for share in SHARES:
        first = int(plan.world_size * share)
        if first < 1 or first != plan.world_size * share:
            continue
        both = [
            _choices([[by_name[name]] for name in names], ranks, plan, config, gpu)
            for names, ranks in zip(SPLIT, (range(first), range(first, plan.world_size)), strict=True)
        ]
        best = [sorted(choices, key=lambda one: one.total)[:BEST_OF_A_SET] for choices in both]
        for one, other in itertools.product(*best):
            yield one.beside(other)


def _choices(
    groups: Sequence[Sequence[PlannedRole]], ranks: range, plan: Plan, config: RunConfig, gpu: Gpu
) -> list[Choice]:
    """Combinations of layouts of these roles on these ranks that may fit, with all of the first WHOLE_PLANS."""
    options = [_candidates(group, ranks, plan, config, gpu) for group in groups]
    fitting = []
    for chosen in itertools.product(*options):
        size = sum(candidate.state for candidate in chosen) + max(candidate.extra for candidate in chosen)
        if size <= gpu.memory:
            fitting.append((sum(candidate.total for candidate in chosen), chosen))
    fastest = heapq.nsmallest(WHOLE_PLANS, (total for total, _ in fitting))
    found = []
    for total, chosen in fitting:
        if _alike(total) <= _alike(fastest[-1]):
            layouts = {role.name: one.layout for group, one in zip(groups, chosen, strict=True) for role in group}
            seconds = {phase: sum(one.seconds[phase] for one in chosen) for phase in PHASES}
            found.append(Choice(layouts, seconds))
    return found


def _candidates(group: Sequence[PlannedRole], ranks: range, plan: Plan, config: RunConfig, gpu: Gpu) -> list[Candidate]:
    found = []
    for layout in _layouts(ranks, gpu.per_node):
        try:
            for role in group:
                check_split(role.shape, tp=layout.tp, pp=layout.pp, vpp=layout.vpp)
        except ConfigError:
            continue
        found.append(_candidate(group, layout, plan, config, gpu))
    return found


def _candidate(
    group: Sequence[PlannedRole], layout: ParallelLayout, plan: Plan, config: RunConfig, gpu: Gpu
) -> Candidate:
    seconds, state, extra = dict.fromkeys(PHASES, 0.0), 0, 0
    for role in group:
        placed = replace(role, layout=layout, offload=getattr(config.parallel, role.name).offload)
        stages = [
            role_memory(placed, stage, config, plan.command, plan.workload, "cuda")
            for stage in sorted({0, layout.pp // 2, layout.pp - 1})
        ]
        state += max(held(stage, TRAINING if role.trained else ()).total for stage in stages)
        extra = max(
            extra,
            *(part.total for stage in stages for phase, part in stage.extra.items() if phase != "load"),
            *(stage.resident.optimizer for stage in stages if placed.offload != "none"),
        )
        for phase, cost in _costs(placed, config, plan.workload, gpu).items():
            seconds[phase] += cost.seconds
    return Candidate(layout, seconds, state, extra)


def _costs(role: PlannedRole, config: RunConfig, workload: Workload, gpu: Gpu) -> dict[str, Cost]:
    costs = {"scoring": scoring_cost(role, config, workload, gpu)}
    if role.trained:
        costs["update"] = update_cost(role, config, workload, gpu)
    if role.samples:
        costs["rollout"] = rollout_cost(role, config, workload, gpu, running=config.sampling.batch_size)
    return costs


def _layouts(ranks: range, per_node: int) -> Iterator[ParallelLayout]:
    """tp within a node, pp up to LARGEST_PP, one, two or four chunks a stage."""
    for tp in _divisors(len(ranks), per_node):
        for pp in _divisors(len(ranks) // tp, LARGEST_PP):
            for vpp in (1,) if pp == 1 else (1, 2, 4):
                yield ParallelLayout(tp=tp, pp=pp, dp=len(ranks) // (tp * pp), vpp=vpp, first_rank=ranks.start)


def _divisors(number: int, largest: int) -> list[int]:
    return [size for size in range(1, min(number, largest) + 1) if number % size == 0]


def _layout_values(plan: Plan, layouts: dict[str, ParallelLayout]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for role in plan.roles:
        layout = layouts[role.name]
        for size in ("tp", "pp", "vpp"):
            values[f"parallel.{role.name}.{size}"] = getattr(layout, size)
        ends_before = layout.ranks.stop < plan.world_size
        values[f"parallel.{role.name}.first_rank"] = layout.first_rank
        values[f"parallel.{role.name}.num_ranks"] = layout.num_ranks if ends_before else None
    return values
