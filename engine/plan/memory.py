"""Bytes of one role on one rank, by phase and kind."""

import operator
from dataclasses import dataclass, field, fields, replace

from ppomax.engine.config import RunConfig
from ppomax.engine.plan.activations import logits_bytes, pass_bytes, saved_bytes
from ppomax.engine.plan.models import PlannedRole
from ppomax.engine.plan.weights import (
    ITEMSIZE,
    layer_matrices,
    num_layers,
    num_parameters,
    stage_parameters,
    state_bytes,
    vocabulary_matrix,
)
from ppomax.engine.plan.workload import Workload, microbatches
from ppomax.engine.rollout.pages import pages_for

PHASES = ("load", "rollout", "scoring", "update", "checkpoint")
GIB = 2**30
SAMPLING_COPIES = 3
"""fp32 logits of the tokens to draw, scaled and filtered ones, and what a draw over tp gathers."""


@dataclass(frozen=True)
class Bytes:
    """Of one rank."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    kv_cache: int = 0
    logits: int = 0
    buffers: int = 0

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(*map(operator.add, vars(self).values(), vars(other).values()))


KINDS = tuple(kind.name for kind in fields(Bytes))


@dataclass(frozen=True)
class Cache:
    """Pages of the key / value cache on one rank. page: bytes of one. wanted: for all requests that may run together;
    least: for the longest of each flight.
    """

    page: int
    wanted: int
    least: int


@dataclass(frozen=True)
class RoleMemory:
    """resident: as long as the role lives. extra: what it takes besides while it works in a phase, without the cache.
    cache: of the role that samples. host: host memory that a checkpoint takes on the first replica.
    """

    role: PlannedRole
    pp_rank: int
    resident: Bytes
    extra: dict[str, Bytes]
    cache: Cache | None = None
    host: int = 0
    numel: int = field(default=0)

    def with_cache(self, pages: int) -> "RoleMemory":
        """With a key / value cache of so many pages in the rollout."""
        assert self.cache is not None
        rollout = replace(self.extra["rollout"], kv_cache=pages * self.cache.page)
        return replace(self, extra={**self.extra, "rollout": rollout})


def role_memory(
    role: PlannedRole, pp_rank: int, config: RunConfig, command: str, workload: Workload, device: str
) -> RoleMemory:
    """device: "cuda" or "cpu"."""
    shape, layout = role.shape, role.layout
    itemsize = ITEMSIZE[config.model.dtype]
    chunks = stage_parameters(shape, layout, pp_rank, extra_scalar_head=role.extra_scalar_head)
    state = state_bytes(chunks, layout.dp, config.model.dtype, trained=role.trained)
    resident = Bytes(state.weights, state.gradients, state.optimizer)
    raw = num_parameters(chunks)
    is_last = pp_rank == layout.pp - 1
    discarded_head = itemsize * vocabulary_matrix(shape, layout.tp) if shape.scalar and is_last else 0
    largest = itemsize * max(
        vocabulary_matrix(shape, 1), layer_matrices(shape, 1)["linear_fc1"]
    )  # of a whole parameter, on its way to a folder or a sampler
    extra: dict[str, Bytes] = {"load": Bytes(buffers=discarded_head)}
    if role.trained:
        # While DDP moves the weights into its buffer there are two of them; while the optimizer is built, two copies of
        # the main weights.
        building = max(itemsize * raw - state.optimizer, 4 * state.numel // layout.dp if itemsize == 2 else 0)
        extra["load"] = Bytes(buffers=max(building, discarded_head))
        extra["update"] = _update(role, pp_rank, config, workload, device)
        # The first replica collects one buffer of states at a time.
        extra["checkpoint"] = Bytes(buffers=max(4 * state.numel, 3 * largest))
    cache = None
    if role.samples:
        cache = _cache(role, pp_rank, config, workload)
        extra["rollout"] = _rollout(role, raw, config, workload, device)
        if config.sampling.backend == "vllm":
            copied = itemsize * shape.num_parameters() // (layout.tp * layout.pp)
            extra["rollout"] = Bytes(weights=copied, buffers=3 * largest)
    if command not in ("sft", "reward") or not role.trained:
        extra["scoring"] = _scoring(role, pp_rank, config, workload, device)
    host = 24 * state.numel if role.trained else 0
    return RoleMemory(role, pp_rank, resident, extra, cache, host, state.numel)


def _update(role: PlannedRole, pp_rank: int, config: RunConfig, workload: Workload, device: str) -> Bytes:
    """Forward and backward over the longest sequences that may come."""
    shape, layout, itemsize = role.shape, role.layout, ITEMSIZE[config.model.dtype]
    sequences = workload.minibatch + (workload.ptx if role.name == "policy" else 0)
    packs = microbatches(layout, sequences, workload.longest, config.train.tokens_per_microbatch, unit=workload.unit)
    sequence_parallel = config.parallel.sequence_parallel and layout.tp > 1
    saved = saved_bytes(
        shape,
        layout,
        pp_rank,
        tokens=packs.tokens,
        num_microbatches=packs.number,
        itemsize=itemsize,
        sequence_parallel=sequence_parallel,
        recompute=config.model.recompute,
    )
    passing = pass_bytes(
        shape, layout.tp, tokens=packs.tokens, itemsize=itemsize, sequence_parallel=sequence_parallel, backward=True
    )
    logits = 0
    if pp_rank == layout.pp - 1:
        logits = logits_bytes(shape, layout.tp, rows=packs.tokens, device=device, backward=True)
    # The head has finished when the layers' backward passes begin: only one of both exists.
    head = Bytes(activations=saved + itemsize * packs.tokens * shape.hidden_size, logits=logits)
    layers = Bytes(activations=saved + passing)
    gathered = itemsize * packs.tokens * shape.hidden_size if sequence_parallel else 0
    return max(head, layers, key=lambda part: part.total) + Bytes(
        buffers=gathered + _pack_bytes(packs.tokens, role, workload)
    )


def _scoring(role: PlannedRole, pp_rank: int, config: RunConfig, workload: Workload, device: str) -> Bytes:
    shape, layout, itemsize = role.shape, role.layout, ITEMSIZE[config.model.dtype]
    packs = microbatches(layout, workload.sequences, workload.longest, config.train.tokens_per_microbatch)
    sequence_parallel = config.parallel.sequence_parallel and layout.tp > 1
    passing = pass_bytes(
        shape, layout.tp, tokens=packs.tokens, itemsize=itemsize, sequence_parallel=sequence_parallel, backward=False
    )
    logits = 0
    if pp_rank == layout.pp - 1:
        logits = logits_bytes(shape, layout.tp, rows=packs.tokens, device=device, backward=False)
    gathered = itemsize * packs.tokens * shape.hidden_size if sequence_parallel else 0
    return Bytes(activations=passing, logits=logits, buffers=gathered + _pack_bytes(packs.tokens, role, workload))


def _pack_bytes(tokens: int, role: PlannedRole, workload: Workload) -> int:
    """A pack (ids, positions, rotary factors) and the [B, T] tensors of the whole batch: a dozen of 4 bytes."""
    return tokens * (32 + 4 * role.shape.head_dim) + 48 * workload.sequences * workload.longest


def _rollout(role: PlannedRole, numel: int, config: RunConfig, workload: Workload, device: str) -> Bytes:
    """One step of generation, on the stage that draws. A CPU has the weights a second time, transposed."""
    shape, layout, itemsize = role.shape, role.layout, ITEMSIZE[config.model.dtype]
    requests = -(-workload.sampled // layout.dp)
    drawn = -(-min(config.sampling.batch_size, requests) // layout.pp)
    step = min(config.sampling.tokens_per_step, requests * workload.longest)
    columns = vocabulary_matrix(shape, layout.tp) // shape.hidden_size
    return Bytes(
        weights=itemsize * numel if device == "cpu" else 0,
        activations=pass_bytes(
            shape, layout.tp, tokens=step, itemsize=itemsize, sequence_parallel=False, backward=False
        ),
        logits=SAMPLING_COPIES * 4 * columns * drawn,
        buffers=_pack_bytes(step, role, workload),
    )


def _cache(role: PlannedRole, pp_rank: int, config: RunConfig, workload: Workload) -> Cache:
    """As rollout/generate.py makes it: one part for each flight, of as many as there are pipeline stages."""
    shape, layout, sampling = role.shape, role.layout, config.sampling
    requests = -(-workload.sampled // layout.dp)
    flights = min(layout.pp, requests)
    running = min(-(-sampling.batch_size // flights), -(-requests // flights))
    longest = pages_for(min(workload.longest, shape.max_position_embeddings), sampling.page_size)
    layers = num_layers(shape, layout, pp_rank) * layout.vpp
    groups = max(1, shape.num_query_groups // layout.tp)
    page = 2 * sampling.page_size * layers * groups * shape.head_dim * ITEMSIZE[config.model.dtype]
    return Cache(page, wanted=flights * running * longest, least=flights * longest)
