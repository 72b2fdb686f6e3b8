"""What is on the device at each moment of an iteration: all of every role, less what `parallel.ROLE.offload` keeps on
the host until it is needed (models/offload.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ppomax.engine.plan.memory import Bytes, RoleMemory

OFFLOADED: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "optimizer": ("optimizer",),
    "all": ("weights", "gradients", "optimizer"),
}
SCORING_ORDER = ("reward", "process", "reference", "critic", "policy")
WEIGHTS: tuple[str, ...] = ("weights",)
TRAINING: tuple[str, ...] = ("weights", "gradients")


@dataclass(frozen=True)
class Moment:
    """role: at work, in a pass or, for an update, a step. needs: kinds that must be there, by role; what is wanted next
    is on its way already. extra: what the work takes besides.
    """

    phase: str
    role: str
    needs: Mapping[str, tuple[str, ...]]
    extra: Bytes


def moments(roles: Sequence[RoleMemory]) -> Iterator[Moment]:
    """Of the roles of one rank, in the order in which they are loaded; without loading."""
    by_name = {memory.role.name: memory for memory in roles}
    for memory in roles:
        if "rollout" in memory.extra:
            yield Moment("rollout", memory.role.name, {memory.role.name: WEIGHTS}, memory.extra["rollout"])
    scoring = [name for name in SCORING_ORDER if name in by_name and "scoring" in by_name[name].extra]
    for i, name in enumerate(scoring):
        yield Moment("scoring", name, dict.fromkeys(scoring[i : i + 2], WEIGHTS), by_name[name].extra["scoring"])
    trained = [memory.role.name for memory in roles if memory.role.trained]
    for i, name in enumerate(trained):
        # The first role's state comes while the last one computes, the next one's while one makes its step.
        early = {trained[0]: (*TRAINING, "optimizer")} if i == len(trained) - 1 > 0 else {}
        yield Moment("update", name, dict.fromkeys(trained, TRAINING) | early, by_name[name].extra["update"])
    for i, name in enumerate(trained):
        stepping = dict.fromkeys(trained[i : i + 2], (*TRAINING, "optimizer"))
        yield Moment("update", name, dict.fromkeys(trained, TRAINING) | stepping, Bytes())
    for name in trained:
        needs = {sampler: WEIGHTS for sampler, memory in by_name.items() if memory.role.samples}
        yield Moment("checkpoint", name, needs | {name: ("weights", "optimizer")}, by_name[name].extra["checkpoint"])


def waiting(memory: RoleMemory) -> int:
    """Bytes of host memory for what a role offloads; gradients are dropped, not kept."""
    kinds = [kind for kind in OFFLOADED[memory.role.offload] if kind != "gradients"]
    return sum(getattr(memory.resident, kind) for kind in kinds)


def held(memory: RoleMemory, needs: Sequence[str]) -> Bytes:
    """What a role has on the device while these kinds are needed."""
    away = [kind for kind in OFFLOADED[memory.role.offload] if kind not in needs]
    kinds = ("weights", "gradients", "optimizer")
    return Bytes(**{kind: getattr(memory.resident, kind) for kind in kinds if kind not in away})
