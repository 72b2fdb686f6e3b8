"""What to change where a plan does not fit: changes that were tried on the plan and make it fit."""

from collections.abc import Callable, Iterator
from typing import Any

from ppomax.engine.config import RunConfig
from ppomax.engine.config_models import ROLES
from ppomax.engine.config_section import Section
from ppomax.engine.errors import ConfigError
from ppomax.engine.plan.plan import Plan

MOST = 4
"""Proposals that are listed."""
Replan = Callable[[RunConfig, int], Plan]


def with_values(config: Any, values: dict[str, Any]) -> Any:
    """A copy of a section with other values at dotted keys."""
    for key, value in values.items():
        name, _, rest = key.partition(".")
        inner = with_values(getattr(config, name), {rest: value}) if rest else value
        assert isinstance(config, Section)
        config = config.model_copy(update={name: inner})
    return config


def with_layout(size: str, value: Any) -> dict[str, Any]:
    """tp, pp, vpp or what else a role has, of all roles."""
    return {f"parallel.{role}.{size}": value for role in ROLES}


def proposals(plan: Plan, replan: Replan, *, largest_tp: int) -> list[str]:
    """Up to MOST changes, each of which makes the plan fit. replan: the plan of another configuration and number of
    ranks. largest_tp: GPUs of a node.
    """
    found = []
    for text, values, world_size in _changes(plan, largest_tp):
        try:
            changed = replan(with_values(plan.config, values), world_size)
        except ConfigError:  # a layout that splits neither ranks nor model
            continue
        if not changed.faults:
            found.append(f"{text}: {changed.worst.total / 2**30:.1f} GiB")
        if len(found) == MOST:
            break
    return found


def _changes(plan: Plan, largest_tp: int) -> Iterator[tuple[str, dict[str, Any], int]]:
    """(as the command line has it, values, ranks), small changes first."""
    config, world = plan.config, plan.world_size
    full: dict[str, Any] = {"model.recompute": "full"} if config.model.recompute != "full" else {}
    if full:
        yield "model.recompute=full", full, world
    for offload in ("optimizer", "all"):
        if any(role.offload != offload for role in plan.roles):
            yield f"parallel.offload={offload}", with_layout("offload", offload), world
            if full:
                values = with_layout("offload", offload) | full
                yield f"parallel.offload={offload} model.recompute=full", values, world
    tokens = config.train.tokens_per_microbatch
    while tokens // 2 >= config.data.max_length:
        tokens //= 2
        values = {"train.tokens_per_microbatch": tokens}
        yield f"train.tokens_per_microbatch={tokens}", values, world
        if full:
            yield f"train.tokens_per_microbatch={tokens} model.recompute=full", values | full, world
    if config.sampling.batch_size > 1:
        batch = max(1, config.sampling.batch_size // 4)
        yield f"sampling.batch_size={batch}", {"sampling.batch_size": batch}, world
    layout = plan.roles[0].layout
    for tp, pp in ((2, 1), (1, 2), (2, 2), (4, 1), (4, 2), (8, 1), (8, 2), (8, 4)):
        sizes = {"tp": layout.tp * tp, "pp": layout.pp * pp}
        if sizes["tp"] > largest_tp:
            continue
        values = with_layout("tp", sizes["tp"]) | with_layout("pp", sizes["pp"])
        text = f"parallel.tp={sizes['tp']} parallel.pp={sizes['pp']}"
        if sizes["tp"] > 1 and not config.parallel.sequence_parallel:
            values["parallel.sequence_parallel"] = True
            text += " parallel.sequence_parallel=true"
        ranks = max(world, sizes["tp"] * sizes["pp"])
        where = f" on {ranks} GPUs" if ranks > world else ""
        yield f"{text}{where}", values, ranks
        if full:
            yield f"{text} model.recompute=full{where}", values | full, ranks
    for factor in (2, 4, 8):
        yield f"the same on {world * factor} GPUs", {}, world * factor
        if full:
            yield f"model.recompute=full on {world * factor} GPUs", full, world * factor
