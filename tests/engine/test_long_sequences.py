"""Long sequences without context parallelism: recomputation and packing keep memory linear in the tokens of a pack."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import NamedTuple

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from ppomax.engine.models.hf_config import config_json
from ppomax.engine.models.hf_reader import RandomReader
from ppomax.engine.models.shape import ModelShape

SHAPE = ModelShape(
    vocab_size=277,
    hidden_size=64,
    num_layers=4,
    num_heads=2,
    num_query_groups=1,
    head_dim=32,
    ffn_hidden_size=192,
    max_position_embeddings=32768,
    rope_theta=10000.0,
    norm_eps=1e-6,
    tie_embeddings=False,
)
STD = 0.1
SHORT = (300, 40, 700)

# Prints loss, gradient norm and how far the process's peak memory rises over the gradients of one batch, in bytes.
SCRIPT = """
import json, re, sys
import torch
from ppomax.engine.config import RunConfig
from ppomax.engine.data.datasets import DialogueRow
from ppomax.engine.models.hf_reader import RandomReader
from ppomax.engine.models.roles import make_role, role_groups
from ppomax.engine.models.shape import ModelShape
from ppomax.engine.parallel.device import start
from ppomax.engine.steps import StepCounter, apply_gradients, language_model_gradients

def row(length):
    tokens = torch.arange(length).mul(7919).remainder(277).tolist()
    return DialogueRow(tuple(tokens), (True,) * length, (), 0, 0)

def peak():
    # Not ru_maxrss, which begins with that of the process that started this one.
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

shape, std, lengths, recompute = json.loads(sys.argv[1])
del shape["rope_scaling"]
shape = ModelShape(**shape)
torch.set_num_threads(1)
start(60)
config = RunConfig.model_validate({"model": {"recompute": recompute}})
groups = role_groups(config)["policy"]
role = make_role("policy", shape, RandomReader(shape, seed=1, std=std), config, groups, source="random", trained=True)
language_model_gradients(role, [row(64)], 1024)
before = peak()
loss = language_model_gradients(role, [row(length) for length in lengths], 1024)
growth = peak() - before
stats = apply_gradients([(role, 1e-3)], {"loss": loss}, config.optim, StepCounter(0, 10, 0))
print(json.dumps([loss, stats["grad_norm"], growth]))
"""


class Trained(NamedTuple):
    """One optimizer step. peak: bytes that its gradients took beyond weights and gradient buffers."""

    loss: float
    grad_norm: float
    peak: int


def train(lengths: list[int], recompute: str) -> Trained:
    """On a process of its own, so that its peak is that of this step."""
    arguments = json.dumps([asdict(SHAPE), STD, lengths, recompute])
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return Trained(*json.loads(result.stdout.splitlines()[-1]))


@torch.no_grad()
def loss_by_transformers(lengths: list[int]) -> float:
    """Mean negative log-likelihood per token, one sequence after the other."""
    reader = RandomReader(SHAPE, seed=1, std=STD)
    content = config_json(SHAPE, dtype="float32", bos_id=0, eos_id=1, pad_id=2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**content))
    model.load_state_dict({name: reader.read(name) for name in reader.sizes})
    total = 0.0
    for length in lengths:
        tokens = torch.arange(length).mul(7919).remainder(277)
        logits = model(tokens[None]).logits[0, :-1]
        total += float(cross_entropy(logits.double(), tokens[1:], reduction="sum"))
    return total / sum(length - 1 for length in lengths)


@pytest.mark.slow
def test_8k_tokens_train_with_recomputation_and_packing_in_linear_memory() -> None:
    lengths = [8192, *SHORT]
    found, plain = train(lengths, "full"), train(lengths, "none")
    assert found.loss == pytest.approx(loss_by_transformers(lengths), rel=1e-5)
    assert (found.loss, found.grad_norm) == (plain.loss, plain.grad_norm)
    one_head = 8192 * 8192 * 4  # the attention matrix of one head, 256 MiB
    assert found.peak < one_head / 2
    assert found.peak < 0.6 * plain.peak


@pytest.mark.slow
def test_32k_tokens_take_four_times_the_memory_of_8k() -> None:
    lengths = [32768, *SHORT]
    found, quarter = train(lengths, "full"), train([8192], "full")
    assert found.loss == pytest.approx(loss_by_transformers(lengths), rel=1e-5)
    assert found.peak < 4.4 * quarter.peak
