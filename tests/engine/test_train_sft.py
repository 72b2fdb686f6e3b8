"""SFT from its command line to its exported folder, against a plain loop over transformers and torch's AdamW."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from ppomax.engine import cli
from ppomax.engine.config import RunConfig
from ppomax.engine.config_help import toml_value
from ppomax.engine.data.chat import make_template
from ppomax.engine.data.datasets import load_dialogues
from ppomax.engine.data.tokenizer import load_tokenizer

LOSS_RTOL = {"fp32": 1e-4, "bf16": 1e-2}
NORM_RTOL = {"fp32": 1e-3, "bf16": 5e-2}
WEIGHT_RTOL = {"fp32": 1e-3, "bf16": 1e-2}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the engine computes: it takes CUDA where there is a device. The loop of transformers stays on the CPU."""
    if (request.param == "cuda") != torch.cuda.is_available():
        pytest.skip("the engine computes on the other device here; `make test-gpu` needs one with CUDA")
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield request.param
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sft_takes_the_steps_of_transformers(tiny: Any, tmp_path: Path, device: str, dtype: str) -> None:
    sections = tiny.config("sft", tmp_path / "run")
    sections["model"]["dtype"] = dtype
    given = [f"{name}.{key}={toml_value(x)}" for name, section in sections.items() for key, x in section.items()]
    assert cli.main(["sft", *given]) == 0
    config = RunConfig.model_validate(sections)
    losses, norms, weights = sft_by_transformers(config)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "sft"]
    assert [step["loss"] for step in steps] == pytest.approx(losses, rel=LOSS_RTOL[dtype])
    assert [step["grad_norm"] for step in steps] == pytest.approx(norms, rel=NORM_RTOL[dtype])
    assert max(norms) > config.optim.grad_clip > 0  # the clip was at work
    for name, ours in load_file(tmp_path / "run/hf/model.safetensors").items():
        # Adam makes a full step of what little noise a vanishing gradient has: compared as a whole.
        difference = (ours.float() - weights[name]).norm() / weights[name].norm()
        assert difference < WEIGHT_RTOL[dtype], name


def sft_by_transformers(config: RunConfig) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, gradient norms and final weights of the same steps in float32 on the CPU, one dialogue at a time."""
    template = make_template(config.data, load_tokenizer(config.model.policy))
    dataset = load_dialogues(config.data, config.data.train, template)
    order, size, optim = dataset.order(config.train.seed), config.train.batch_size, config.optim
    model = transformers.AutoModelForCausalLM.from_pretrained(config.model.policy, dtype=torch.float32)
    adam = torch.optim.AdamW(model.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=0.0)
    losses, norms = [], []
    for step in range(config.train.steps):
        rows = dataset.take(order, step * size, size)
        count = sum(sum(row.loss_mask[1:]) for row in rows)
        adam.zero_grad()
        total = 0.0
        for row in rows:
            tokens = torch.tensor(row.tokens)
            logprobs = model(tokens[None]).logits[0, :-1].log_softmax(-1)
            picked = logprobs.gather(1, tokens[1:, None])[:, 0][torch.tensor(row.loss_mask[1:])]
            loss = -picked.sum() / count
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)))
        adam.step()
    return losses, norms, {name: x.detach() for name, x in model.state_dict().items()}
