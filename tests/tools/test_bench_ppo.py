"""The benchmark of whole iterations: its workload ends as told, and one short run leaves a report."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ppomax.engine.models.shape import ModelShape
from ppomax.tools.bench_ppo import CASES
from ppomax.tools.bench_products import Pass, Products, passes
from ppomax.tools.bench_workload import EOS, PAD, make_files

SHAPE: ModelShape = replace(CASES["eos"].shape, num_layers=2)


@pytest.mark.parametrize("mean", [None, 32.0])
def test_eos_has_the_chance_that_was_asked_for(tmp_path: Path, mean: float | None) -> None:
    transformers = pytest.importorskip("transformers")
    make_files(replace(CASES["eos"], shape=SHAPE, mean_new_tokens=mean), tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    tokens = torch.randint(3, SHAPE.vocab_size, (4, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        chances = model(tokens).logits.float().softmax(-1)
    low, high = (0.0, 1e-7) if mean is None else (0.9 / mean, 1.1 / mean)
    assert low < float(chances[..., EOS].mean()) < high
    assert float(chances[..., PAD].max()) < 1e-8


def test_prompts_have_the_length_that_was_asked_for(tmp_path: Path) -> None:
    from ppomax.engine.config import DataConfig
    from ppomax.engine.data.chat import Turn, make_template
    from ppomax.engine.data.tokenizer import load_tokenizer

    work = replace(CASES["exact"], shape=SHAPE)
    make_files(work, tmp_path)
    template = make_template(DataConfig(), load_tokenizer(str(tmp_path / "policy")))
    rows = [json.loads(line)["prompt"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert {len(template.encode_prompt([Turn("human", text)])) for text in rows} == {work.prompt_tokens}


def test_products_are_those_of_the_iteration() -> None:
    """Counted by hand: 2 FLOPs per weight and row, three products in a backward pass's turn."""
    weights = sum(rows * columns for rows, columns in ((256, 128), (128, 128), (768, 128), (128, 384))) * 4
    head, tokens, sampled = 1024 * 128, 64 * 80, 64 * 48
    phases = passes(64, 32, 48, 2, recomputes=False)

    def multiplications(phase: str) -> int:
        return sum((p.rows * weights + p.head_rows * head) * p.times * (3 if p.backward else 1) for p in phases[phase])

    assert multiplications("rollout") == (64 * 32 + 47 * 64) * weights + 48 * 64 * head
    assert multiplications("scoring") == 3 * tokens * weights + sampled * head
    assert multiplications("update") == 3 * (2 * tokens * weights + sampled * head)
    Products(SHAPE, torch.float32, torch.device("cpu")).run(Pass(8, 4, times=2, backward=True))


@pytest.mark.slow
def test_a_short_run_leaves_a_report(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ppomax.tools.bench_ppo", "--case", "exact", "--iterations", "1", "--threads", "1"]
    subprocess.run([*command, "--overhead", "--output", str(tmp_path)], check=True, timeout=500)
    content = json.loads((tmp_path / "results.json").read_text())
    (result,) = content["results"]
    assert result["response_length"] == 48
    assert {"rollout", "scoring", "update", "other"} <= result["phases"].keys()
    assert result["seconds / products"] > 0.5
    assert {"prefill", "decoding", "reward scores", "policy gradients", "optimizer", "iteration"} <= result[
        "parts"
    ].keys()
    assert sum(part["share"] for name, part in result["parts"].items() if name != "iteration") == pytest.approx(
        1, abs=0.1
    )
    assert result["padding_of_packs"] == 0
    assert result["ceilings"]["flops_per_second"] > 1e8
    assert (tmp_path / "timeline.png").stat().st_size > 1000
    assert (tmp_path / "phases.png").stat().st_size > 1000
    assert content["overhead"]["syncs are constant"]
    assert 0 < content["overhead"]["own / step, CPU time"] < 0.5
    assert "## The engine's own time" in (tmp_path / "README.md").read_text()
