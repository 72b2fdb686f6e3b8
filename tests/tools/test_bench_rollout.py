"""The benchmark of generation runs, agrees with its peers, and writes its report; here with a tiny model."""

import json

import pytest
import torch

from ppomax.engine.parallel.device import start
from ppomax.tools import bench_rollout
from ppomax.tools.bench_rollout import PatternReader, Work, llama, make_model, respond, step_times

TINY = llama(64, 32, 2, 2, 1, 48, 160)


@pytest.mark.slow
def test_report_beside_transformers(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_rollout, "SMALL", {"tiny": TINY})
    monkeypatch.setattr(bench_rollout, "NUM_PROMPTS", 6)
    monkeypatch.setattr(bench_rollout, "NEW_TOKENS", (2, 9))
    monkeypatch.setattr(bench_rollout, "PROMPT_TOKENS", (1, 12))
    monkeypatch.setattr(bench_rollout, "LONG_CONTEXT", 96)
    bench_rollout.main(["--repeats", "1", "--threads", "1", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    compared = [row for row in results["rows"] if "equal to ours" in row]
    assert [row["what"] for row in compared] == [
        "ours",
        "transformers generate",
        "transformers continuous batching",
    ]
    assert all(row["equal to ours"] == 6 for row in compared)
    assert "| tiny | 1 | ours |" in (tmp_path / "README.md").read_text()


def test_models_with_repeated_rows_can_be_timed() -> None:
    start(60)
    role = make_model(TINY, PatternReader(TINY, seed=0, std=0.02), "bf16")
    weight = role.stage.vocabulary_weight()
    assert weight.dtype == torch.bfloat16
    work = Work([[1, 2, 3], [4]], [12, 3])
    sampling = bench_rollout.GREEDY
    assert [len(tokens) for tokens in respond(role, work, sampling)] == [12, 3]
    assert len(step_times(role, work, sampling)) == 12 - 5
