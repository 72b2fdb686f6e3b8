"""Predicted seconds and bytes sent of each role and phase: arithmetic over data-sheet rates (gpus.py) with stated
efficiencies. A model to compare layouts by, not a measurement: docs/planning.md has the formulas and what they leave
out.
"""

from dataclasses import dataclass, fields

from ppomax.engine.config import RunConfig
from ppomax.engine.models.shape import ModelShape
from ppomax.engine.parallel.layout import ParallelLayout
from ppomax.engine.plan.gpus import (
    COMPUTE_EFFICIENCY,
    LINK_EFFICIENCY,
    MEMORY_EFFICIENCY,
    STORAGE_BYTES,
    Gpu,
)
from ppomax.engine.plan.models import PlannedRole
from ppomax.engine.plan.weights import ITEMSIZE, layer_matrices, num_layers, vocabulary_matrix
from ppomax.engine.plan.workload import Workload, microbatches

OPTIMIZER_BYTES = {"fp32": 28, "bf16": 30}
"""Read and written for each number by one step (kernels/adamw.py)."""


@dataclass(frozen=True)
class Cost:
    """Of one iteration. tp, pp, dp: bytes that one rank sends over groups of that kind. storage: bytes of all ranks
    from or to disk. host: bytes between one GPU and its host.
    """

    seconds: float = 0.0
    tp: float = 0.0
    pp: float = 0.0
    dp: float = 0.0
    storage: float = 0.0
    host: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, name.name) + getattr(other, name.name) for name in fields(self)))

    def times(self, factor: float) -> "Cost":
        return Cost(*(getattr(self, name.name) * factor for name in fields(self)))


def forward_flops(shape: ModelShape, context: float) -> float:
    """Of all layers for one token of a sequence of `context` tokens: two for each weight, and causal attention."""
    weights = sum(layer_matrices(shape, 1).values())
    return shape.num_layers * (2 * weights + 2 * shape.num_heads * shape.head_dim * context)


def scoring_cost(role: PlannedRole, config: RunConfig, workload: Workload, gpu: Gpu) -> Cost:
    """One forward pass over the sequences of an iteration."""
    rows = workload.response if not role.shape.scalar else 0
    return _passes(role, config, gpu, sequences=workload.sequences, length=workload.mean, rows=rows, backward=False)


def update_cost(role: PlannedRole, config: RunConfig, workload: Workload, gpu: Gpu) -> Cost:
    """Forward and backward of every optimizer step, reduction of gradients, the step, and the weights' way back."""
    sequences = workload.minibatch + (workload.ptx if role.name == "policy" else 0)
    rows = workload.response if not role.shape.scalar else 0
    passes = _passes(
        role, config, gpu, sequences=sequences, length=workload.mean, rows=rows, backward=True, unit=workload.unit
    )
    return (passes + _step(role, config, gpu)).times(workload.steps)


def rollout_cost(role: PlannedRole, config: RunConfig, workload: Workload, gpu: Gpu, *, running: int) -> Cost:
    """Prompts, then tokens one by one; running: responses that one replica decodes at the same time."""
    shape, layout, itemsize = role.shape, role.layout, ITEMSIZE[config.model.dtype]
    requests = -(-workload.sequences // layout.dp)
    model_ranks = layout.tp * layout.pp
    speed = gpu.flops * COMPUTE_EFFICIENCY
    prefill = requests * workload.prompt * forward_flops(shape, workload.prompt) / (model_ranks * speed)
    running = max(1, min(running, requests))
    flights = min(layout.pp, running)
    in_flight = running / flights
    context = workload.prompt + workload.response / 2
    layers = shape.num_layers / layout.pp
    weights = itemsize * layers * sum(layer_matrices(shape, layout.tp).values())
    head = itemsize * vocabulary_matrix(shape, layout.tp)
    groups = max(1, shape.num_query_groups // layout.tp)
    cached = 2 * itemsize * layers * groups * shape.head_dim * context * in_flight
    memory = gpu.bandwidth * MEMORY_EFFICIENCY
    flops = in_flight * forward_flops(shape, context) / model_ranks
    stage = max((weights + cached) / memory, flops / speed, layers * gpu.decode_layer_seconds) + head / memory
    message = itemsize * in_flight * shape.hidden_size
    sums = _all_reduce(message, layout.tp, gpu, _tp_link(layout, gpu)).times(2 * layers)
    hop = _send(message, layout, gpu)
    step = Cost(stage) + sums + hop
    # Each flight takes its turn on every stage: one token of all flights takes as many turns as there are stages.
    tokens = workload.response * requests / running
    return Cost(prefill) + step.times(tokens * layout.pp)


def load_cost(role: PlannedRole, config: RunConfig, world_size: int, gpu: Gpu) -> Cost:
    """Every replica reads the folder; a node's storage serves its ranks."""
    size = float(ITEMSIZE[config.model.dtype] * role.shape.num_parameters()) * role.layout.dp
    return _storage(size, world_size, gpu)


def offload_cost(role: PlannedRole, config: RunConfig, workload: Workload, gpu: Gpu) -> Cost:
    """What parallel.ROLE.offload moves, as if none of it were hidden behind work: weights for each phase that needs
    them, and back after an update; the optimizer's state there and back for each step.
    """
    numel = role.shape.num_parameters() / (role.layout.tp * role.layout.pp)
    weights = ITEMSIZE[config.model.dtype] * numel
    state = (12 if config.model.dtype == "bf16" else 8) * numel / role.layout.dp
    moved = 2 * state * workload.steps if role.trained else 0.0
    if role.offload == "all":
        moved += weights * (1 + role.samples + 2 * role.trained)
    return Cost(moved / (gpu.host * LINK_EFFICIENCY), host=moved)


def checkpoint_cost(role: PlannedRole, config: RunConfig, gpu: Gpu) -> Cost:
    """Weights, main weights and moments, written by the first replica, whose ranks collect the parts of the others."""
    numel = role.shape.num_parameters()
    size = float(numel * (ITEMSIZE[config.model.dtype] + 12))
    layout = role.layout
    gathered = 12 * numel / (layout.tp * layout.pp) * (layout.dp - 1) / layout.dp
    collect = (
        Cost(gathered / (_dp_link(layout, gpu) * LINK_EFFICIENCY), dp=gathered / layout.dp) if gathered else Cost()
    )
    return _storage(size, layout.tp * layout.pp, gpu) + collect


def export_cost(role: PlannedRole, config: RunConfig, gpu: Gpu) -> Cost:
    """The first replica gathers the whole model on its first rank, which writes it."""
    size = float(ITEMSIZE[config.model.dtype] * role.shape.num_parameters())
    layout = role.layout
    sent = size / (layout.tp * layout.pp)
    link = gpu.link if layout.tp * layout.pp <= gpu.per_node else gpu.network
    moved = (size - sent) / (link * LINK_EFFICIENCY)
    return Cost(
        moved + size / STORAGE_BYTES, tp=sent if layout.tp > 1 else 0, pp=sent if layout.pp > 1 else 0, storage=size
    )


def _passes(
    role: PlannedRole,
    config: RunConfig,
    gpu: Gpu,
    *,
    sequences: int,
    length: int,
    rows: int,
    backward: bool,
    unit: int = 1,
) -> Cost:
    """The micro-batches of one pass over `sequences`, of `rows` rows each at the head, through all stages."""
    shape, layout, itemsize = role.shape, role.layout, ITEMSIZE[config.model.dtype]
    packs = microbatches(layout, sequences, length, config.train.tokens_per_microbatch, unit=unit)
    speed = gpu.flops * COMPUTE_EFFICIENCY
    passes = 1
    if backward:
        passes = 4 if config.model.recompute == "full" else 3
    message = itemsize * packs.tokens * shape.hidden_size
    # Two sums a layer forward, two backward; sequence parallelism gathers the inputs of two matrices once more.
    num_sums = 2 * passes if passes < 3 else 2 * (passes - 1) + (1 if config.parallel.sequence_parallel else 0)
    sums = _all_reduce(message, layout.tp, gpu, _tp_link(layout, gpu)).times(num_sums)
    sequence_share = layout.tp if config.parallel.sequence_parallel else 1
    hops = _send(message / sequence_share, layout, gpu).times((2 if backward else 1) * layout.vpp)
    flops = passes * packs.tokens * forward_flops(shape, length) / shape.num_layers
    if backward and config.model.recompute == "selective":
        flops += packs.tokens * 2 * shape.num_heads * shape.head_dim * length
    layer = Cost(max(flops / layout.tp / speed, passes * gpu.layer_seconds)) + sums
    head_flops = (6 if backward else 2) * packs.tokens * rows / length * vocabulary_matrix(shape, layout.tp)
    stages = []
    for stage in range(layout.pp):
        head = Cost(head_flops / speed) if stage == layout.pp - 1 else Cost()
        stages.append(layer.times(num_layers(shape, layout, stage) * layout.vpp) + head + hops)
    microbatch = max(stages, key=lambda stage: stage.seconds)  # the others wait for it
    bubble = (layout.pp - 1) / layout.vpp * microbatch.seconds
    return microbatch.times(packs.number) + Cost(bubble)


def _step(role: PlannedRole, config: RunConfig, gpu: Gpu) -> Cost:
    layout, itemsize = role.layout, ITEMSIZE[config.model.dtype]
    numel = role.shape.num_parameters() / (layout.tp * layout.pp)
    memory = gpu.bandwidth * MEMORY_EFFICIENCY
    # Zeroed, and read for the norm, once each.
    seconds = (OPTIMIZER_BYTES[config.model.dtype] + 4) * numel / layout.dp / memory + 4 * numel / memory
    if layout.dp == 1:
        return Cost(seconds)
    sent = (4 + itemsize) * numel * (layout.dp - 1) / layout.dp
    link = _dp_link(layout, gpu) * LINK_EFFICIENCY
    latency = 2 * layout.vpp * (gpu.collective_seconds + (layout.dp - 1) * gpu.hop_seconds)
    return Cost(seconds + sent / link + latency, dp=sent)


def _all_reduce(size: float, ranks: int, gpu: Gpu, link: float) -> Cost:
    """A ring of `ranks` neighbours, or the reduce-scatter and all-gather that together are one."""
    if ranks == 1:
        return Cost()
    sent = 2 * size * (ranks - 1) / ranks
    return Cost(gpu.collective_seconds + sent / (link * LINK_EFFICIENCY), tp=sent)


def _send(size: float, layout: ParallelLayout, gpu: Gpu) -> Cost:
    """To the next pipeline stage; over the network where a replica takes more than a node."""
    if layout.pp == 1:
        return Cost()
    link = gpu.link if layout.tp * layout.pp <= gpu.per_node else gpu.network
    return Cost(gpu.collective_seconds + size / (link * LINK_EFFICIENCY), pp=size)


def _tp_link(layout: ParallelLayout, gpu: Gpu) -> float:
    return gpu.link if layout.tp <= gpu.per_node else gpu.network


def _dp_link(layout: ParallelLayout, gpu: Gpu) -> float:
    """A ring over replicas enters a node once and leaves it once, with the network of its members there."""
    if layout.num_ranks <= gpu.per_node:
        return gpu.link
    members = max(1, gpu.per_node // (layout.tp * layout.pp))
    return min(gpu.link, gpu.network * members)


def _storage(size: float, ranks: int, gpu: Gpu) -> Cost:
    nodes = -(-ranks // gpu.per_node)
    return Cost(size / (STORAGE_BYTES * nodes), storage=size)
