"""Decoding through fixed memory for fixed numbers of requests, as CUDA graphs do it; here a replay computes anew."""

import gc
import weakref
from collections import Counter

import pytest
import torch
from torch import Tensor

from ppomax.engine.config import RunConfig, SamplingConfig
from ppomax.engine.config_models import ArchitectureConfig, ModelConfig
from ppomax.engine.models.roles import make_role, random_reader
from ppomax.engine.models.shape import shape_from_init
from ppomax.engine.parallel.device import start
from ppomax.engine.parallel.groups import make_groups
from ppomax.engine.parallel.layout import ParallelLayout
from ppomax.engine.rollout import flight, graphs
from ppomax.engine.rollout.generate import generate, request_seeds
from ppomax.engine.rollout.graphs import DecodeGraphs, Recording, graph_size
from ppomax.engine.rollout.paged_cache import PagedCache
from ppomax.engine.rollout.step_inputs import StepNumbers, StepSizes, split_inputs

REPLAYS: Counter[int] = Counter()


def record(self: DecodeGraphs, vector: Tensor, sizes: StepSizes, received: Tensor | None) -> Recording:
    """What a CUDA graph is on a CPU: the same function of the same memory."""

    def compute() -> Tensor:
        return self._compute(vector, sizes, None if received is None else received.clone())

    output = compute()

    def replay() -> None:
        REPLAYS[sizes.requests] += 1
        output.copy_(compute())

    return Recording(vector, received, output, replay)


@pytest.mark.parametrize("steps_ahead", [0, 2])
@pytest.mark.parametrize("sampling", [SamplingConfig(temperature=0), SamplingConfig()], ids=["greedy", "paper"])
def test_responses_are_those_without_graphs(monkeypatch: pytest.MonkeyPatch, sampling, steps_ahead: int) -> None:
    start(60)
    init = ArchitectureConfig(hidden_size=64, num_layers=2, ffn_hidden_size=96, init_std=0.15, vocab_size=97)
    config = RunConfig(model=ModelConfig(init=init))
    shape = shape_from_init(init, 97)
    groups = make_groups({"policy": ParallelLayout(1, 1, 1)})["policy"]
    role = make_role("policy", shape, random_reader(shape, config), config, groups, source="random")
    prompts = [[1 + i] * (1 + 5 * i % 23) for i in range(37)]
    limits = [1 + 7 * i % 40 for i in range(37)]
    settings = sampling.model_copy(update={"max_new_tokens": 40, "batch_size": 20, "steps_ahead": steps_ahead})

    def respond():
        seeds = request_seeds(0, 0, 37)
        return generate(role, prompts, settings, seeds=seeds, eos_id=5, pad_id=0, limits=limits)

    expected = respond()
    monkeypatch.setattr(flight, "uses_graphs", lambda sampling, device: True)
    monkeypatch.setattr(graphs.DecodeGraphs, "_record", record)
    REPLAYS.clear()
    result = respond()
    assert torch.equal(result.tokens, expected.tokens)
    torch.testing.assert_close(result.sampling_logprobs, expected.sampling_logprobs, atol=2e-6, rtol=0)
    assert set(REPLAYS) <= {1, 2, 4, 8, 16, 32}
    assert sum(REPLAYS.values()) > 20  # most steps were replays


def test_cache_is_freed_when_generation_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it is half of the free memory, which training needs at once, and graphs must not outlive NCCL."""
    start(60)
    init = ArchitectureConfig(hidden_size=64, num_layers=2, ffn_hidden_size=96, vocab_size=97)
    config = RunConfig(model=ModelConfig(init=init))
    shape = shape_from_init(init, 97)
    groups = make_groups({"policy": ParallelLayout(1, 1, 1)})["policy"]
    role = make_role("policy", shape, random_reader(shape, config), config, groups, source="random")
    caches = []

    def new_cache(*args, **options) -> PagedCache:
        cache = PagedCache(*args, **options)
        caches.append(weakref.ref(cache))
        return cache

    def record_once(self: DecodeGraphs, vector: Tensor, sizes: StepSizes, received: Tensor | None) -> Recording:
        return Recording(vector, received, self._compute(vector, sizes, received), lambda: None)

    monkeypatch.setattr(flight, "PagedCache", new_cache)
    monkeypatch.setattr(flight, "uses_graphs", lambda sampling, device: True)
    monkeypatch.setattr(graphs.DecodeGraphs, "_record", record_once)
    gc.disable()
    try:
        settings = SamplingConfig(max_new_tokens=8)
        generate(role, [[1, 2, 3]] * 4, settings, seeds=request_seeds(0, 0, 4), eos_id=-1, pad_id=0)
    finally:
        gc.enable()
    assert [cache() for cache in caches] == [None]


def test_sizes_of_graphs() -> None:
    assert [graph_size(n) for n in (1, 2, 3, 5, 9, 16, 17, 33, 64, 65)] == [1, 2, 4, 8, 16, 16, 32, 48, 64, 80]


def test_parts_of_a_step_lie_at_multiples_of_16_bytes() -> None:
    """Triton compiles anew for each set of pointers that do not; what is between belongs to no part."""
    sizes = StepSizes(tokens=5, requests=3, drawn=2, max_query=3, width=2)
    counts = {"index": 5, "positions": 5, "slots": 5, "contexts": 3, "cu_queries": 4, "page_tables": 6}
    parts = {name: torch.arange(1, n + 1, dtype=torch.int32) for name, n in counts.items()}
    parts |= {name: torch.arange(7, 9, dtype=torch.int32) for name in ("rows", "drawn_index", "drawn_positions")}
    parts["page_tables"] = parts["page_tables"].view(3, 2)
    vector = torch.from_numpy(StepNumbers(**{name: part.numpy() for name, part in parts.items()}).packed())
    for name, part in vars(split_inputs(vector, sizes)).items():
        assert torch.equal(part, parts[name])
        assert part.storage_offset() % 4 == 0
