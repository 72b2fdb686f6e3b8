"""Whole stages on CUDA. An SFT run against a plain loop of transformers is in tests/engine/test_train_sft.py."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ppomax.engine import cli
from ppomax.engine.config import RunConfig
from ppomax.engine.config_help import toml_value
from ppomax.engine.data.batches import unpad
from ppomax.engine.models.roles import load_role, role_groups
from ppomax.engine.parallel.device import start, stop
from ppomax.engine.ppo.scoring import token_logprobs
from ppomax.engine.ppo.types import Rollout, response_mask
from ppomax.tools.verify_export import max_logit_difference

pytestmark = pytest.mark.gpu

DTYPES = pytest.mark.parametrize("dtype", ["fp32", "bf16"])
LOGPROB_ATOL = {"fp32": 1e-4, "bf16": 0.15}


def run(tiny: Any, stage: str, output: Path, dtype: str, **overrides: dict[str, Any]) -> None:
    """Runs a stage by its command line."""
    sections = tiny.config(stage, output, **overrides)
    sections["model"]["dtype"] = dtype
    given = [f"{name}.{key}={toml_value(x)}" for name, section in sections.items() for key, x in section.items()]
    assert cli.main([stage, "ppo.preset=none", *given]) == 0


def records(output: Path, kind: str) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


@DTYPES
@pytest.mark.parametrize("stage", ["sft", "reward", "critic", "ppo"])
def test_every_stage_runs_on_cuda(tiny: Any, tmp_path: Path, device: torch.device, stage: str, dtype: str) -> None:
    torch.cuda.reset_peak_memory_stats()
    run(tiny, stage, tmp_path / "run", dtype, checkpoint={"every": 1})
    assert torch.cuda.max_memory_allocated() > 0
    steps = records(tmp_path / "run", stage)
    assert steps
    for step in steps:
        assert all(math.isfinite(value) for value in step.values() if isinstance(value, float))
        assert step["skipped_steps"] == 0
    assert (tmp_path / "run/hf/model.safetensors").is_file()


@DTYPES
def test_offloading_changes_no_number_on_cuda(tiny: Any, tmp_path: Path, device: torch.device, dtype: str) -> None:
    for offload in ("none", "all"):
        run(tiny, "ppo", tmp_path / offload, dtype, parallel={"offload": offload}, checkpoint={"every": 1})
    names = ("policy_objective", "value_loss", "grad_norm", "reward", "kl")
    # The second iteration starts from weights that were on the host; sums of the backward pass may round differently.
    found, expected = (records(tmp_path / offload, "ppo") for offload in ("all", "none"))
    for ours, theirs in zip(found, expected, strict=True):
        assert [ours[name] for name in names] == pytest.approx([theirs[name] for name in names], rel=1e-2, abs=1e-4)


@pytest.mark.parametrize(("dtype", "mean"), [("fp32", 1e-5), ("bf16", 0.05)])
def test_trainer_and_sampler_agree_on_logprobs(
    tiny: Any, tmp_path: Path, device: torch.device, dtype: str, mean: float
) -> None:
    run(tiny, "ppo", tmp_path / "run", dtype)
    assert all(step["sampler_mismatch_mean"] < mean for step in records(tmp_path / "run", "ppo"))


def test_logits_are_those_of_transformers(tiny: Any, device: torch.device) -> None:
    assert max_logit_difference(tiny.model("policy")) < 1e-4


@DTYPES
def test_logprobs_are_those_of_transformers_on_the_cpu(tiny: Any, device: torch.device, dtype: str) -> None:
    generator = torch.Generator().manual_seed(3)
    lengths, prompt_lengths = torch.tensor([60, 9, 33, 2]), torch.tensor([20, 8, 1, 1])
    tokens = torch.randint(270, (4, 60), generator=generator)
    start(60)
    try:
        config = RunConfig.model_validate({"model": {"dtype": dtype}})
        role = load_role("policy", tiny.model("policy"), config, role_groups(config)["policy"])
        mask = response_mask(prompt_lengths, lengths, 59)
        nothing = torch.zeros(mask.shape)
        rollout = Rollout(tokens, prompt_lengths, lengths, mask, torch.ones(4, dtype=torch.bool), nothing)
        moved = Rollout(**{name: x.to(device) for name, x in vars(rollout).items() if x is not None})
        logprobs, entropy = (x.cpu() for x in token_logprobs(role, moved, tokens_per_microbatch=70))
    finally:
        stop()
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.model("policy"), dtype=torch.float32).eval()
    for b, sequence in enumerate(unpad(tokens, lengths)):
        with torch.no_grad():
            expected = model(sequence[None]).logits[0, :-1].log_softmax(-1)
        kept = mask[b, : len(sequence) - 1]
        picked = expected.gather(1, sequence[1:, None])[:, 0]
        row = logprobs[b, : len(sequence) - 1]
        torch.testing.assert_close(row[kept], picked[kept], rtol=0, atol=LOGPROB_ATOL[dtype])
        entropies = -(expected.exp() * expected).sum(-1)
        row = entropy[b, : len(sequence) - 1]
        torch.testing.assert_close(row[kept], entropies[kept], rtol=0, atol=LOGPROB_ATOL[dtype])
