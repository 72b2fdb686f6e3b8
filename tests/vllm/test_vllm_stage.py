"""A whole PPO run that samples in vLLM, against the same run with the embedded engine."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from ppomax.engine.config_help import toml_value

SECONDS = 400
SAME = ("reward", "kl", "response_length", "perplexity", "value_loss", "policy_loss", "grad_norm")

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed here: make test-vllm"),
]


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """The tiny world with heads of 32: vLLM's attention on CPU takes none smaller."""
    functions = type(tiny).model.__globals__
    shape = functions["SHAPE"]
    functions["SHAPE"] = replace(shape, head_dim=32)
    folder = tmp_path_factory.mktemp("world")
    world = type(tiny)(folder)
    for model in ("policy", "reward", "critic"):
        world.model(model)
    functions["SHAPE"] = shape
    return world


def run(world, output, backend, num_ranks):
    """The metrics of each step and of each evaluation."""
    sections = world.config(
        "ppo",
        output,
        sampling={"backend": backend, "temperature": 0, "repetition_penalty": 1.3, "batch_size": 5},
        data={"eval": world.path("prompts.jsonl")},
        monitor={"eval_every": 1, "eval_size": 6},
        parallel={"tp": num_ranks},
    )
    given = [f"{name}.{key}={toml_value(x)}" for name, section in sections.items() for key, x in section.items()]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if num_ranks == 2 else []
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "ppomax.engine.cli", "ppo", "ppo.preset=none", *given],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ppo_with_vllm_takes_the_steps_of_ppo_with_the_embedded_engine(world, tmp_path, num_ranks):
    ours = run(world, tmp_path / "vllm", "vllm", num_ranks)
    theirs = run(world, tmp_path / "embedded", "embedded", num_ranks)
    assert [row["kind"] for row in ours] == [row["kind"] for row in theirs]
    for row, other in zip(ours, theirs, strict=True):
        for name in set(SAME) & row.keys():
            assert row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
    steps = [row for row in ours if row["kind"] == "ppo"]
    assert len(steps) == 2
    for step in steps:
        assert step["sampler_mismatch_max"] < 5e-5
