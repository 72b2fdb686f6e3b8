"""Run by test_generate_layouts.py on four ranks: generates the same responses under many layouts.

`main` writes the rollouts of every rank to a file, for test_generate_layouts.py to compare.
"""

from dataclasses import replace
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from ppomax.engine.config import RunConfig, SamplingConfig
from ppomax.engine.config_models import ArchitectureConfig, ModelConfig, ParallelConfig
from ppomax.engine.models.roles import make_role, random_reader
from ppomax.engine.models.shape import ModelShape
from ppomax.engine.parallel.device import start, stop
from ppomax.engine.parallel.groups import make_groups
from ppomax.engine.parallel.layout import ParallelLayout
from ppomax.engine.ppo.types import Rollout
from ppomax.engine.rollout import flight
from ppomax.engine.rollout.generate import generate, request_seeds
from ppomax.engine.rollout.graphs import DecodeGraphs, Recording
from ppomax.engine.rollout.step_inputs import StepSizes

# 97 tokens: padded at tp 2. Four layers: pp 4 has middle stages.
SHAPE = ModelShape(
    vocab_size=97,
    hidden_size=64,
    num_layers=4,
    num_heads=4,
    num_query_groups=2,
    head_dim=16,
    ffn_hidden_size=96,
    max_position_embeddings=64,
    rope_theta=10000.0,
    norm_eps=1e-6,
    tie_embeddings=False,
)
TIED = replace(SHAPE, tie_embeddings=True)
ONE_GROUP = replace(SHAPE, num_query_groups=1)  # at tp 2 both ranks hold the same keys and values
# The first word names the model; its case of one process is what the others are compared with.
CASES = {
    "grouped one_process": (SHAPE, ParallelLayout(tp=1, pp=1, dp=1)),
    "grouped tp2": (SHAPE, ParallelLayout(tp=2, pp=1, dp=2)),
    "grouped pp2": (SHAPE, ParallelLayout(tp=1, pp=2, dp=2)),
    "grouped tp2_pp2": (SHAPE, ParallelLayout(tp=2, pp=2, dp=1)),
    "grouped pp2_vpp2": (SHAPE, ParallelLayout(tp=1, pp=2, dp=2, vpp=2)),
    "grouped pp2_vpp2_graphs": (SHAPE, ParallelLayout(tp=1, pp=2, dp=2, vpp=2)),
    "grouped dp4": (SHAPE, ParallelLayout(tp=1, pp=1, dp=4)),
    "grouped tp2_sequence_parallel": (SHAPE, ParallelLayout(tp=2, pp=1, dp=2)),
    "tied one_process": (TIED, ParallelLayout(tp=1, pp=1, dp=1)),
    "tied pp4": (TIED, ParallelLayout(tp=1, pp=4, dp=1)),
    "tied tp2_pp2_sequence_parallel": (TIED, ParallelLayout(tp=2, pp=2, dp=1)),
    "tied tp2_pp2_vpp2_sequence_parallel": (TIED, ParallelLayout(tp=2, pp=2, dp=1, vpp=2)),
    "one_group one_process": (ONE_GROUP, ParallelLayout(tp=1, pp=1, dp=1)),
    "one_group tp2": (ONE_GROUP, ParallelLayout(tp=2, pp=1, dp=2)),
}
EOS = 11
# Three slots: odd numbers of tokens under sequence parallelism, and requests that wait.
PAPER = SamplingConfig(temperature=0.8, top_p=0.9, repetition_penalty=1.1, max_new_tokens=16, batch_size=3)
GREEDY = SamplingConfig(temperature=0, top_p=1, repetition_penalty=1, max_new_tokens=8)
LENGTHS = (7, 1, 30, 12, 12, 3, 25, 18, 2)


def case(name: str) -> dict[str, Rollout]:
    """What this rank gets, also from outside of the layout. Every rank must call it."""
    shape, layout = CASES[name]
    groups = make_groups({"policy": layout})["policy"]
    config = RunConfig(
        model=ModelConfig(init=ArchitectureConfig(init_std=0.15)),
        parallel=ParallelConfig(sequence_parallel="sequence_parallel" in name),
    )
    role = make_role("policy", shape, random_reader(shape, config), config, groups, source="random")
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(shape.vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]
    seeds = request_seeds(1, 2, len(prompts))
    with (
        patch.object(flight, "uses_graphs", lambda *_: "graphs" in name),
        patch.object(DecodeGraphs, "_record", record),
    ):
        return {
            "paper": generate(role, prompts, PAPER, seeds=seeds, eos_id=EOS, pad_id=0),
            "greedy": generate(role, prompts, GREEDY, seeds=seeds, eos_id=EOS, pad_id=0),
            "one_prompt": generate(role, prompts[2:3], PAPER, seeds=seeds[2:3], eos_id=EOS, pad_id=0),
        }


def record(self: DecodeGraphs, vector: Tensor, sizes: StepSizes, received: Tensor | None) -> Recording:
    """What a CUDA graph is on a CPU: the same function of the same memory."""

    def compute() -> Tensor:
        return self._compute(vector, sizes, None if received is None else received.clone())

    output = compute()
    return Recording(vector, received, output, lambda: output.copy_(compute()))


def main(path: str) -> None:
    torch.set_num_threads(1)
    start(60)
    results: dict[str, list[dict[str, Rollout]]] = {}
    for name in CASES:
        results[name] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(results[name], case(name))
    if dist.get_rank() == 0:
        torch.save(results, path)
    stop()
