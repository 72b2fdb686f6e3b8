"""The layouts of a cluster that fit, fastest first by predicted time; of those alike, the plainest.

Times of roles add up, and so do their bytes, as long as they take turns: so each role's layouts are planned once, the
combinations are ranked by sums, and the best of them are planned whole.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
from ppomax.engine.plan.timing import rollout_cost, scoring_cost, update_cost
from ppomax.engine.plan.workload import Workload

WHOLE_PLANS = 60
"""Combinations, the best by their sums, that are planned whole."""
LARGEST_PP = 16
ALIKE = 0.02
"""Predicted times that differ by this fraction say nothing about which layout is faster."""


@dataclass(frozen=True)
class Candidate:
    """A layout of one role. state: bytes that stay on its fullest rank. extra: the most of any phase beside them."""

    layout: ParallelLayout
    seconds: float
    state: int
    extra: int


@dataclass(frozen=True)
class Found:
    """A layout that fits, and the values that set it. was_uneven: stages of the one before had layers of their own."""

    plan: Plan
    values: dict[str, Any]
    was_uneven: bool

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
        if self.plan.config.parallel.sequence_parallel and any(role.layout.tp > 1 for role in self.plan.roles):
            lines.append("parallel.sequence_parallel=true")
        if any(key.endswith(".offload") for key in self.values):
            lines.append("parallel.offload=all")
        if self.was_uneven:
            lines.append("parallel.first_stage_layers=none parallel.last_stage_layers=none")
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
    for recompute in ("none", "full"):
        base: dict[str, Any] = {"model.recompute": recompute, "parallel.sequence_parallel": True}
        base |= values_of_all | with_layout("first_stage_layers", None) | with_layout("last_stage_layers", None)
        config = with_values(plan.config, base)
        ranked = _combinations(plan, config, gpu)
        for combination in itertools.islice(ranked, WHOLE_PLANS):
            values = base | _layout_values(plan.roles, combination)
            whole = replan(with_values(plan.config, values), plan.world_size)
            if not whole.faults:
                found.append(Found(whole, values, is_uneven))
    return found


def _rank(seconds: float, layouts: Sequence[ParallelLayout]) -> tuple[int, int, int, float]:
    """Of what is equally fast as far as the model can tell, the plainest first: few layouts, few chunks."""
    alike = round(math.log(seconds) / math.log(1 + ALIKE))
    return alike, len(set(layouts)), sum(layout.vpp for layout in layouts), seconds


def _combinations(plan: Plan, config: RunConfig, gpu: Gpu) -> Iterator[tuple[ParallelLayout, ...]]:
    """A layout for each role, those that may fit, fastest first. Frozen roles that only score share one."""
    groups: list[list[PlannedRole]] = [[role] for role in plan.roles if role.trained or role.samples]
    groups += [frozen] if (frozen := [role for role in plan.roles if not (role.trained or role.samples)]) else []
    options = [_candidates(group, plan, config, gpu) for group in groups]
    capacity = gpu.memory
    fitting = []
    for choice in itertools.product(*options):
        size = sum(candidate.state for candidate in choice) + max(candidate.extra for candidate in choice)
        if size <= capacity:
            fitting.append((sum(candidate.seconds for candidate in choice), choice))
    fitting.sort(key=lambda item: _rank(item[0], [candidate.layout for candidate in item[1]]))
    for _, choice in fitting:
        of_role = {role.name: one.layout for group, one in zip(groups, choice, strict=True) for role in group}
        yield tuple(of_role[role.name] for role in plan.roles)


def _candidates(group: Sequence[PlannedRole], plan: Plan, config: RunConfig, gpu: Gpu) -> list[Candidate]:
    found = []
    for layout in _layouts(plan.world_size, gpu.per_node):
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
    seconds, state, extra = 0.0, 0, 0
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
        seconds += _seconds(placed, config, plan.workload, gpu)
    return Candidate(layout, seconds, state, extra)


def _seconds(role: PlannedRole, config: RunConfig, workload: Workload, gpu: Gpu) -> float:
    seconds = scoring_cost(role, config, workload, gpu).seconds
    if role.trained:
        seconds += update_cost(role, config, workload, gpu).seconds
    if role.samples:
        seconds += rollout_cost(role, config, workload, gpu, running=config.sampling.batch_size).seconds
    return seconds


def _layouts(world_size: int, per_node: int) -> Iterator[ParallelLayout]:
    """tp within a node, pp up to LARGEST_PP, one, two or four chunks a stage."""
    for tp in _divisors(world_size, per_node):
        for pp in _divisors(world_size // tp, LARGEST_PP):
            for vpp in (1,) if pp == 1 else (1, 2, 4):
                yield ParallelLayout(tp=tp, pp=pp, dp=world_size // (tp * pp), vpp=vpp)


def _divisors(number: int, largest: int) -> list[int]:
    return [size for size in range(1, min(number, largest) + 1) if number % size == 0]


def _layout_values(roles: Sequence[PlannedRole], layouts: Sequence[ParallelLayout]) -> dict[str, int]:
    values = {}
    for role, layout in zip(roles, layouts, strict=True):
        for size in ("tp", "pp", "vpp"):
            values[f"parallel.{role.name}.{size}"] = getattr(layout, size)
    return values
