"""Run by test_vllm_backend.py under torchrun with two processes: vLLM and the policy in the same processes.

Writes what both engines make of the same requests, for three layouts of the policy. Arguments: a folder for files.
"""

import json
import sys
import unittest.mock
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from ppomax.engine.config import RunConfig, SamplingConfig, TrainConfig
from ppomax.engine.config_models import ArchitectureConfig, ModelConfig
from ppomax.engine.models.hf_checkpoint import load_weights
from ppomax.engine.models.hf_config import config_json
from ppomax.engine.models.hf_export import export_weights
from ppomax.engine.models.roles import Role, make_role, random_reader
from ppomax.engine.models.shape import ModelShape
from ppomax.engine.parallel.device import start, stop
from ppomax.engine.parallel.groups import RoleGroups, make_groups
from ppomax.engine.parallel.layout import ParallelLayout
from ppomax.engine.ppo.scoring import token_logprobs
from ppomax.engine.rollout.backend import Completion, RolloutBackend, RolloutRequest, as_rollout
from ppomax.engine.rollout.embedded import EmbeddedBackend
from ppomax.engine.rollout.vllm_backend import VllmBackend

EOS, NO_EOS = 7, -1
# 277 tokens: padded at tp 2.
SHAPE = ModelShape(
    vocab_size=277,
    hidden_size=64,
    num_layers=4,
    num_heads=4,
    num_query_groups=2,
    head_dim=32,
    ffn_hidden_size=96,
    max_position_embeddings=128,
    rope_theta=10000.0,
    norm_eps=1e-6,
    tie_embeddings=False,
)
LAYOUTS = {"tp2": ParallelLayout(2, 1, 1), "pp2": ParallelLayout(1, 2, 1), "dp2": ParallelLayout(1, 1, 2)}
GREEDY = SamplingConfig(temperature=0, top_p=1, repetition_penalty=1, batch_size=6)
PENALISED = GREEDY.model_copy(update={"repetition_penalty": 1.5})
SAMPLED = SamplingConfig(temperature=0.8, top_p=0.9, repetition_penalty=1.1, batch_size=6)
NEW_TOKENS = 12


def main(root: Path) -> None:
    start(120)
    groups = make_groups(LAYOUTS)
    if dist.get_rank() == 0:
        config = config_json(SHAPE, dtype="float32", bos_id=1, eos_id=EOS, pad_id=0)
        (root / "config.json").write_text(json.dumps(config))
        save_file({"unused": torch.zeros(1)}, root / "model.safetensors")
    dist.barrier()
    for name, layout_groups in groups.items():
        results: list = [None, None]
        dist.all_gather_object(results, compare(str(root), layout_groups))
        if dist.get_rank() == 0:
            torch.save(results, root / f"{name}.pt")
    stop()


def compare(folder: str, groups: RoleGroups) -> dict[str, list[dict]]:
    """{case: completions of vLLM, those of the embedded engine} of one layout, as dictionaries."""
    role = make_role("policy", SHAPE, random_reader(SHAPE, seeded(1)), seeded(1), groups, source="random")
    vllm = VllmBackend(folder, groups, dtype="fp32", sampling=GREEDY, eos_id=EOS, max_length=100)
    embedded = EmbeddedBackend(role, eos_id=EOS, max_length=100)
    vllm.setup()
    results = {}

    def run(case: str, requests: list[RolloutRequest]) -> None:
        results[case] = [as_dicts(engine.generate(requests)) for engine in (vllm, embedded)]

    load(vllm, embedded, role, 1)
    greedy = requests_with(GREEDY)
    run("greedy", greedy)
    run("penalised", requests_with(PENALISED))
    run("sampled", requests_with(SAMPLED))
    run("sampled again", requests_with(SAMPLED))
    stops = tuple(tuple(c["tokens"][3:5]) for c in results["greedy"][1][2:4])
    run("stop", [replace(request, stop_sequences=stops) for request in greedy])
    run("at least", requests_with(PENALISED.model_copy(update={"min_new_tokens": NEW_TOKENS})))
    long = (9,) * 97
    bad = [(), (9,) * 100, (277,), (5, -1)]
    run("bad", [*greedy, *(replace(greedy[0], id=90 + i, prompt=prompt) for i, prompt in enumerate([*bad, long]))])
    run("nothing", [replace(request, max_new_tokens=0) for request in greedy])
    for engine in (vllm, embedded):
        engine.abort([1, 4])
    run("aborted", greedy)
    run("after the abort", greedy)
    results["aborted while running"] = [abort_at_step(vllm, 6, [0, 5], greedy), results["greedy"][1]]
    results["scored by the trainer"] = [results["sampled"][0], scored(role, requests_with(SAMPLED), vllm)]
    load_weights(role.stage, random_reader(SHAPE, seeded(2)), "random")
    run("stale", greedy)
    load(vllm, embedded, role, 2)
    run("changed", greedy)
    for level in (1, 2):
        vllm.sleep(level)
        vllm.wake()
        load(vllm, embedded, role, 2 + level)
        run(f"slept {level}", greedy)
    vllm.close()
    # The trainer's groups are still there, and vLLM can start again.
    dist.barrier()
    return results


def abort_at_step(vllm: VllmBackend, step: int, ids: list[int], requests: list[RolloutRequest]) -> list[dict]:
    """The completions where requests are aborted before vLLM's step of that number."""
    engine = vllm._llm.llm_engine
    take_step, steps = engine.step, iter(range(1, 1000))

    def counted() -> list:
        if next(steps) == step - 1:
            vllm.abort(ids)
        return take_step()

    with unittest.mock.patch.object(engine, "step", counted):
        return as_dicts(vllm.generate(requests))


def scored(role: Role, requests: list[RolloutRequest], vllm: VllmBackend) -> list[dict]:
    """What vLLM samples, with the log-probs of the trainer's forward pass."""
    completions = vllm.generate(requests)
    rollout = as_rollout(requests, completions, pad_id=0, device=role.device)
    logprobs, _ = token_logprobs(role, rollout, tokens_per_microbatch=4096)
    rows = [row[mask].tolist() for row, mask in zip(logprobs, rollout.response_mask, strict=True)]
    return [vars(replace(c, logprobs=tuple(row))) for c, row in zip(completions, rows, strict=True)]


def seeded(seed: int) -> RunConfig:
    """Weights far larger than those that training starts from: logits differ clearly, so no draw is close to a tie."""
    init = ArchitectureConfig(init_std=0.15)
    return RunConfig(model=ModelConfig(init=init), train=TrainConfig(seed=seed))


def requests_with(sampling: SamplingConfig) -> list[RolloutRequest]:
    """Ragged prompts; more of them than run at once."""
    generator = torch.Generator().manual_seed(5)
    prompts = [
        torch.randint(8, SHAPE.vocab_size, (length,), generator=generator).tolist()
        for length in (7, 1, 30, 12, 12, 3, 25, 18, 60)
    ]
    return [RolloutRequest(i, tuple(prompt), sampling, 100 + i, NEW_TOKENS) for i, prompt in enumerate(prompts)]


def load(vllm: RolloutBackend, embedded: RolloutBackend, role: Role, version: int) -> None:
    vllm.load(export_weights(role.chunks, SHAPE, role.groups, torch.float32, everywhere=True), version)
    embedded.load(iter(()), version)


def as_dicts(completions: list[Completion]) -> list[dict]:
    return [vars(completion) for completion in completions]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
