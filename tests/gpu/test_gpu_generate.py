"""Generation on CUDA in float32 draws the tokens that the CPU draws from the logits of transformers, with no cache."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from ppomax.engine.config import RunConfig, SamplingConfig
from ppomax.engine.models.roles import Role, load_role, role_groups
from ppomax.engine.parallel.device import start, stop
from ppomax.engine.rollout.generate import generate, request_seeds
from ppomax.engine.rollout.graphs import DecodeGraphs
from ppomax.kernels.sampling import sample_with_margins

pytestmark = pytest.mark.gpu

NO_EOS = -1
LENGTHS = (7, 1, 30, 12, 12, 3, 25)
SETTINGS = {
    "greedy": SamplingConfig(temperature=0, top_p=1, repetition_penalty=1, max_new_tokens=12),
    "paper": SamplingConfig(temperature=0.8, top_p=0.9, repetition_penalty=1.3, max_new_tokens=12, batch_size=3),
    "top_k": SamplingConfig(temperature=1.5, top_p=1, top_k=20, repetition_penalty=1, max_new_tokens=12),
}


@pytest.fixture
def role(tiny: Any, device: torch.device) -> Iterator[Role]:
    start(60)
    config = RunConfig()
    yield load_role("policy", tiny.model("policy"), config, role_groups(config)["policy"])
    stop()


@torch.no_grad()
def respond_on_cpu(
    model: torch.nn.Module, prompt: list[int], sampling: SamplingConfig, seed: Tensor
) -> tuple[list[int], list[float]]:
    """Tokens and margins of one response, every token from a forward pass over all that precede it."""
    new: list[int] = []
    margins = []
    for _ in range(sampling.max_new_tokens):
        logits = model(torch.tensor([prompt + new])).logits[:, -1]
        seen = torch.zeros(logits.shape, dtype=torch.bool)
        seen[0, new] = True
        draw = sample_with_margins(
            logits,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
            seen=seen,
            seeds=seed[None],
            positions=torch.tensor([len(prompt) + len(new)]),
        )
        new.append(int(draw.tokens))
        margins.append(float(draw.margins))
    return new, margins


@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS)
def test_responses_are_those_of_the_cpu(role: Role, tiny: Any, device: torch.device, sampling: SamplingConfig) -> None:
    assert role.device == device
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(270, (length,), generator=generator).tolist() for length in LENGTHS]
    seeds = request_seeds(1, 2, len(prompts))
    rollout = generate(role, prompts, sampling, seeds=seeds, eos_id=NO_EOS, pad_id=0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.model("policy"), dtype=torch.float32).eval()
    num_compared = 0
    for tokens, prompt, seed in zip(rollout.tokens.tolist(), prompts, seeds, strict=True):
        expected, margins = respond_on_cpu(model, prompt, sampling, seed)
        # From a near tie on, another order of summation may go another way.
        clear = next((i for i, margin in enumerate(margins) if margin < 1e-4), len(margins))
        assert tokens[len(prompt) : len(prompt) + clear] == expected[:clear]
        num_compared += clear
    assert num_compared > 0.8 * len(prompts) * sampling.max_new_tokens


@pytest.mark.parametrize("name", ["greedy", "paper"])
def test_cuda_graphs_change_nothing(role: Role, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[1 + i] * (1 + 5 * i % 23) for i in range(37)]
    limits = [1 + 7 * i % 60 for i in range(37)]
    recorded = []
    record = DecodeGraphs._record

    def counted(self: DecodeGraphs, *arguments: Any) -> Any:
        recorded.append(arguments[1].requests)
        return record(self, *arguments)

    monkeypatch.setattr(DecodeGraphs, "_record", counted)

    def respond(**settings: Any) -> Tensor:
        sampling = SETTINGS[name].model_copy(update={"batch_size": 24, "max_new_tokens": 60, **settings})
        seeds = request_seeds(0, 0, len(prompts))
        return generate(role, prompts, sampling, seeds=seeds, eos_id=NO_EOS, pad_id=0, limits=limits).tokens

    expected = respond(cuda_graphs=False, steps_ahead=0)
    assert not recorded
    assert torch.equal(respond(), expected)
    assert len(recorded) > 1
