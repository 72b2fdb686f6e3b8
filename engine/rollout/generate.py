"""Responses sampled from the weights that are being trained: continuous batching over a paged key / value cache.

Each replica takes a share of the prompts. Its requests run in as many flights as there are pipeline stages, so that
every stage has one to work on; a flight takes one step at a time (flight.py), chunk by chunk where a stage has
several: every running request adds a token, and waiting prompts join in pieces while the step has room. A token depends
on what precedes it, its position and the seed of its request: neither the company in a step nor layouts, page sizes or
limits change it.
"""

import hashlib
import struct
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ppomax.engine.config import SamplingConfig
from ppomax.engine.errors import DataError, DoesNotFitError
from ppomax.engine.models.roles import Role, check_vocabulary
from ppomax.engine.parallel.device import torch_functions_as_they_are
from ppomax.engine.parallel.stages import sum_over_replicas
from ppomax.engine.ppo.types import Rollout
from ppomax.engine.rollout.batch import Batch, Begun
from ppomax.engine.rollout.draw import StopRule
from ppomax.engine.rollout.flight import Flight
from ppomax.engine.rollout.inference import InferenceStage
from ppomax.engine.rollout.paged_cache import local_groups
from ppomax.engine.rollout.pages import num_pages_for_budget, pages_for
from ppomax.engine.rollout.scheduler import Limits, Request
from ppomax.engine.rollout.watch import MakeWatch, Watch

CACHE_SHARE = 0.5
"""Of the GPU memory that is free when generation starts, what the cache may take where sampling.cache_gib is 0."""

DEFAULT_STEPS_AHEAD = 2
"""On a GPU: it works on one step while the host plans the next and reads the one before."""

GIB = 2**30


@torch.no_grad()  # not inference_mode: what is computed from a rollout enters autograd
def generate(
    role: Role,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    seeds: Tensor,
    eos_id: int,
    pad_id: int,
    max_length: int | None = None,
    samples: int = 1,
    limits: Sequence[int] | None = None,
    stop_sequences: Sequence[Sequence[int]] = (),
    on_token: Callable[[int, int], None] | None = None,
    begun: Sequence[Begun] | None = None,
    watch: MakeWatch | None = None,
) -> Rollout:
    """`samples` responses to each prompt of the global batch; every rank of the run must call it and gets all of them.

    prompts: sequences of token ids, the same on every rank; the rollout has B = len(prompts) * samples rows, those of
    one prompt side by side.
    seeds [B] int64: they fix the noise of each response (`request_seeds`).
    A response ends by eos_id (kept), by one of stop_sequences (kept), by limits[b] (unset: sampling.max_new_tokens)
    tokens, or where prompt and response fill the model's context or, if given, max_length tokens. pad_id fills the rows
    of the result. limits of 0 give empty responses.
    on_token: called with (row, token) for each token of this replica's responses as soon as the host has read it.
    begun: what is there already of each of the B responses; limits count it.
    watch: makes what looks on, and may end requests early, from the batch and the rows of this replica (watch.py), on
    the ranks of the role.
    Raises, before anything runs, DataError if a prompt is empty or leaves no room for a response, ConfigError if one
    has a token that the model does not know, DoesNotFitError if the cache cannot hold the longest request.
    """
    context = min(role.shape.max_position_embeddings, max_length or role.shape.max_position_embeddings)
    _check_prompts(prompts, context)
    check_vocabulary(role, max(max(prompt) for prompt in prompts))
    rows = [prompt for prompt in prompts for _ in range(samples)]
    wanted = limits or [sampling.max_new_tokens] * len(rows)
    max_lengths = [min(context, len(prompt) + limit) for prompt, limit in zip(rows, wanted, strict=True)]
    if begun is not None:
        ends = [(len(p) + len(start.tokens), start.finished) for p, start in zip(rows, begun, strict=True)]
        max_lengths = [
            end if is_over else max(end, most) for (end, is_over), most in zip(ends, max_lengths, strict=True)
        ]
    batch = Batch(rows, max_lengths, seeds, role.device, begun)
    if not role.is_here:
        _share_results(batch, [], role)
        return batch.rollout(pad_id)
    share = _share_of_replica(batch, samples, role)
    stop = StopRule(eos_id, tuple(map(tuple, stop_sequences)), sampling.min_new_tokens)
    default = DEFAULT_STEPS_AHEAD if role.device.type == "cuda" else 0
    steps_ahead = default if sampling.steps_ahead is None else sampling.steps_ahead
    with role.memory.resident("weights"):
        affordable = affordable_pages(role, sampling)
        fault = cache_fault(max(batch.max_lengths), affordable, role, sampling)
        if fault is not None:
            raise DoesNotFitError(fault)
        with torch_functions_as_they_are():
            is_watched = watch is not None
            flights = _flights(role, batch, share, samples, sampling, stop, on_token, affordable, is_watched)
        _run(flights, len(role.chunks), steps_ahead, None if watch is None else watch(batch, share, role))
    _share_results(batch, share, role)
    return batch.rollout(pad_id)


def request_seeds(run_seed: int, step: int, num: int, *, sample: int = 0) -> Tensor:
    """Seeds [num] int64 of the responses to `num` prompts, different for every (run_seed, step, prompt, sample).

    sample: number of the response, where a prompt gets several.
    """
    digests = [
        hashlib.blake2b(struct.pack("<4q", run_seed, step, prompt, sample), digest_size=8).digest()
        for prompt in range(num)
    ]
    return torch.tensor([int.from_bytes(digest, "little") >> 1 for digest in digests], dtype=torch.int64)


def _check_prompts(prompts: Sequence[Sequence[int]], context: int) -> None:
    if not prompts:
        raise DataError("no prompts to respond to; give at least one")
    for b, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise DataError(f"prompt {b} is empty; a response needs at least one token to start from")
        if len(prompt) >= context:
            raise DataError(
                f"prompt {b} has {len(prompt)} tokens, which leaves no room for a response in a context of {context}; "
                "shorten it, or raise data.max_length (up to the model's max_position_embeddings)"
            )


def _share_of_replica(batch: Batch, samples: int, role: Role) -> list[int]:
    """The requests of this replica, the costliest prompts first; responses to one prompt stay together.

    Dealt by cost, the tokens of prompt and longest response, each to the replica with the least so far: all ranks
    agree.
    """
    costs = {first: sum(batch.max_lengths[first : first + samples]) for first in range(0, len(batch.prompts), samples)}
    loads = [0] * role.groups.layout.dp
    shares: list[list[int]] = [[] for _ in loads]
    for first in sorted(costs, key=lambda first: (-costs[first], first)):
        replica = loads.index(min(loads))
        loads[replica] += costs[first]
        shares[replica] += range(first, first + samples)
    return shares[role.groups.dp_rank]


def _flights(
    role: Role,
    batch: Batch,
    share: list[int],
    samples: int,
    sampling: SamplingConfig,
    stop: StopRule,
    on_token: Callable[[int, int], None] | None,
    affordable: int | None,
    is_watched: bool,
) -> list[Flight]:
    """One for each pipeline stage, as far as the requests go, with equal parts of cache and places."""
    requests = [
        Request(
            index=b,
            prompt=batch.known[b],
            max_new_tokens=batch.max_lengths[b] - len(batch.known[b]),
            parent=_first_alike(batch, b, samples),
        )
        for b in share
        if batch.max_lengths[b] > len(batch.known[b])
    ]
    if not requests:
        return []
    prompts = list(dict.fromkeys(request.index // samples for request in requests))
    num_flights = min(role.groups.layout.pp, len(prompts))
    max_running = -(-sampling.batch_size // num_flights)
    members = [set(prompts[flight::num_flights]) for flight in range(num_flights)]
    parts = [[request for request in requests if request.index // samples in own] for own in members]
    num_pages = _num_pages(parts, max_running, sampling, affordable)
    limits = Limits(
        max_running=max_running,
        tokens_per_step=max(sampling.tokens_per_step, max_running),
        max_context=max(batch.max_lengths),
        page_size=sampling.page_size,
        num_pages=num_pages,
    )
    stage = InferenceStage(role, max(batch.max_lengths), sampling.page_size)
    fixed = (limits, sampling, stop, on_token)
    return [Flight(role, stage, batch, part, *fixed, is_watched=is_watched) for part in parts]


def _first_alike(batch: Batch, b: int, samples: int) -> int:
    """The first of the samples of b's prompt with the same known tokens: they differ where responses have begun."""
    first = b // samples * samples
    return next(other for other in range(first, b + 1) if batch.known[other] == batch.known[b])


def affordable_pages(role: Role, sampling: SamplingConfig) -> int | None:
    """Pages of one flight that the memory budget allows, the same on every rank, which must all call it; None where
    nothing limits them.
    """
    budget = sampling.cache_gib * GIB
    if budget == 0 and role.device.type == "cuda":
        budget = CACHE_SHARE * _free_memory(role.device)
    if budget == 0:
        return None
    pages = num_pages_for_budget(
        int(budget / role.groups.layout.pp),
        page_size=sampling.page_size,
        num_layers=sum(len(chunk.decoder.layers) for chunk in role.chunks),
        num_groups=local_groups(role.stage),
        head_dim=role.shape.head_dim,
        itemsize=next(role.stage.parameters()).element_size(),
    )
    # Stages may differ in layers and GPUs in free memory.
    fewest = torch.tensor(pages, device=role.device)
    dist.all_reduce(fewest, op=dist.ReduceOp.MIN, group=role.groups.megatron.intra_dist_opt)
    return int(fewest)


def cache_fault(length: int, affordable: int | None, role: Role, sampling: SamplingConfig) -> str | None:
    """Why a request of `length` tokens, prompt and response, cannot run in so many pages, or None."""
    needed = pages_for(length, sampling.page_size)
    if affordable is None or needed <= affordable:
        return None
    limit = f"{sampling.cache_gib:.3g} GiB hold" if sampling.cache_gib else "half of the free memory holds"
    return (
        f"a request of {length} tokens needs {needed} pages of {sampling.page_size} tokens in the key / value cache, "
        f"but {limit} {affordable} (for each of {role.groups.layout.pp} pipeline stages in flight); raise "
        "sampling.cache_gib, or lower sampling.max_new_tokens or data.max_length"
    )


def _free_memory(device: torch.device) -> int:
    """Bytes of the GPU that a tensor can get: those of the driver, and those that torch keeps after tensors are gone,
    nearly all of the memory after a step of training.
    """
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def _num_pages(parts: list[list[Request]], max_running: int, sampling: SamplingConfig, affordable: int | None) -> int:
    """Pages of each flight: for the longest requests that may run together, as far as they are affordable."""
    needed = 0
    for part in parts:
        longest = sorted((len(request.prompt) + request.max_new_tokens for request in part), reverse=True)[:max_running]
        needed = max(needed, sum(pages_for(length, sampling.page_size) for length in longest))
    return needed if affordable is None else min(needed, affordable)


def _run(flights: list[Flight], num_chunks: int, steps_ahead: int, watch: Watch | None) -> None:
    """Takes turns with the flights until all requests have ended, and the watch needs this replica no longer.

    num_chunks: of a stage. All flights pass a chunk before the first of them passes the next one: no stage waits.
    """
    turn = 0
    while flights or (watch is not None and watch.goes_on):
        with torch_functions_as_they_are():
            for flight in flights:
                flight.collect(leave=steps_ahead)
                if not flight.launch():
                    flight.collect(leave=0)
            for number in range(1, num_chunks):
                for flight in flights:
                    flight.run_chunk(number)
        if watch is not None and turn % watch.every == 0:
            watch.look(flights)
        flights = [flight for flight in flights if not flight.is_done]


def _share_results(batch: Batch, share: list[int], role: Role) -> None:
    """Gives every rank the responses of all replicas."""
    is_own = torch.zeros(len(batch.prompts), dtype=torch.bool)
    is_own[share] = True
    ends = torch.tensor([batch.lengths, batch.finished], device=role.device).T
    is_own = is_own.to(role.device)
    for result in (batch.tokens, batch.logprobs, batch.drawn_logprobs, batch.margins, ends):
        result[~is_own] = 0
        if role.is_here:
            sum_over_replicas(result, role.groups)
        role.groups.give_to_all(result)
    batch.lengths, batch.finished = ends.T.tolist()
