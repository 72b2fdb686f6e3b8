"""A plan in a few lines, for logs; the same beside what a run has measured."""

from collections.abc import Sequence

from ppomax.engine.plan.memory import GIB
from ppomax.engine.plan.plan import Plan


def summary_lines(plan: Plan) -> list[str]:
    """One line per role, and the fullest rank."""
    worst = plan.worst
    lines = []
    for memory in worst.roles:
        layout, state = memory.role.layout, memory.resident
        options = f" vpp {layout.vpp}" if layout.vpp > 1 else ""
        options += f" offload {memory.role.offload}" if memory.role.offload != "none" else ""
        extras = ", ".join(f"{phase} +{size(extra.total)}" for phase, extra in memory.extra.items())
        lines.append(
            f"plan {memory.role.name}: tp {layout.tp} pp {layout.pp} dp {layout.dp}{options}, per rank weights "
            f"{size(state.weights)}, "
            f"gradients {size(state.gradients)}, optimizer {size(state.optimizer)}; {extras}"
        )
    phase = worst.worst_phase()
    limit = "" if plan.capacity is None else f" of {size(plan.capacity)}"
    lines.append(f"plan total: rank {worst.rank} has the most, {size(worst.total)}{limit}, in {phase}")
    return lines


def measured_lines(plan: Plan, measured: Sequence[int], *, what: str) -> list[str]:
    """Of all ranks the one that took the most, beside the plan for it. measured: bytes by rank; what: was measured."""
    rank = max(range(len(measured)), key=measured.__getitem__)
    predicted = plan.rank(rank).total
    share = f", {100 * measured[rank] / predicted:.0f} % of it" if predicted else ""
    return [f"plan: rank {rank} took the most, {size(measured[rank])} ({what}); planned {size(predicted)}{share}"]


def plan_record(plan: Plan, measured: Sequence[int] | None, *, what: str) -> dict[str, object]:
    """What plan.json holds: bytes by rank and kind, planned; and measured, once the run has ended."""
    ranks = []
    for rank in range(plan.world_size):
        planned = plan.rank(rank)
        phases = {phase: vars(planned.peak(phase)) for phase in planned.phases}
        ranks.append({"rank": rank, "peak": planned.total, "in": planned.worst_phase(), "phases": phases})
        if measured is not None:
            ranks[-1]["measured"] = measured[rank]
    return {"unit": "bytes", "capacity": plan.capacity, "measured": what, "ranks": ranks}


def size(num_bytes: float) -> str:
    """GiB, or MiB of what is small."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.2f} MiB"
