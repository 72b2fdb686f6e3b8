"""Converted checkpoints in the engine: Megatron loads them under every layout, and they compute what transformers does.

`conversion_worker.py` runs on the ranks.
"""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from ppomax.engine.conversion import hf_to_megatron
from ppomax.engine.models.megatron_names import Split

pytestmark = pytest.mark.dist
OnRanks = Callable[..., list[Any]]

# 250 tokens are padded at tp 4; two key / value heads: at tp 4 one spans two ranks; at pp 4 there are middle stages.
SMALL: dict[str, Any] = {
    "vocab_size": 250,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "num_labels": 1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TIED = {"tie_word_embeddings": True}
CASES: dict[str, transformers.PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**SMALL),
    "llama-tied-llama3-rope": transformers.LlamaConfig(**SMALL | TIED | {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": transformers.LlamaConfig(
        **SMALL | {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}
    ),
    "mistral-one-head-for-each": transformers.MistralConfig(
        **SMALL | {"sliding_window": None, "num_key_value_heads": 4}
    ),
    "qwen2": transformers.Qwen2Config(**SMALL),
    "qwen2-tied": transformers.Qwen2Config(**SMALL | TIED),
    "qwen3-head-dim-32": transformers.Qwen3Config(**SMALL | {"head_dim": 32}),
    "qwen3-tied": transformers.Qwen3Config(**SMALL | TIED | {"head_dim": 16}),
}
QUICK = ["llama-tied-llama3-rope", "qwen2", "qwen3-head-dim-32-scalar"]
EVERY = [f"{name}{head}" for name in CASES for head in ("", "-scalar")]
# tp, pp, vpp
FOUR_RANKS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (4, 1, 1), (2, 2, 1), (1, 4, 1), (1, 2, 2), (2, 2, 2)]
MANY_RANKS = [(4, 2, 1), (2, 4, 1), (4, 2, 2)], [(4, 4, 1)]
LENGTHS = (7, 1, 40, 12, 20)  # 40 is beyond the 16 positions that LLAMA3_ROPE scales from
TOLERANCE = 2e-5


def by_path(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_by_path_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = by_path("conversion_worker")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Tensor]]:
    """Of a case: the converted folder, and what transformers computes for every token of the sequences."""
    root = tmp_path_factory.mktemp("converted")
    done: dict[str, tuple[Path, Tensor]] = {}

    def convert(case: str) -> tuple[Path, Tensor]:
        if case not in done:
            name = case.removesuffix("-scalar")
            kind: Any = (
                transformers.AutoModelForCausalLM if case == name else transformers.AutoModelForSequenceClassification
            )
            model = kind.from_config(CASES[name], dtype=torch.float32, attn_implementation="eager").eval()
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter_name, parameter in model.named_parameters():
                    draw = torch.empty(parameter.shape).normal_(std=0.1, generator=generator)
                    parameter.copy_(draw + 1 if "norm" in parameter_name else draw)
                head = model.lm_head if case == name else model.score
                prompts = worker.sequences(LENGTHS, SMALL["vocab_size"])
                expected = torch.cat([head(model.model(tokens[None]).last_hidden_state[0]) for tokens in prompts])
            model.save_pretrained(root / f"{case}-hf")
            # Cut for other layouts than those that load it.
            split = Split(tp=2, pp=4) if "tied" in case else Split()
            hf_to_megatron(str(root / f"{case}-hf"), str(root / case), split=split)
            done[case] = root / case, expected
        return done[case]

    return convert


def check(run: OnRanks, num_ranks: int, cases: list[tuple[Path, Tensor]], splits: list[tuple[int, int, int]]) -> None:
    folders = [folder for folder, _ in cases]
    found = run(num_ranks, worker.outputs_under, folders, splits, LENGTHS, timeout=400)[0]
    wanted = [(folder.name, split, expected) for folder, expected in cases for split in splits]
    for outputs, (name, split, expected) in zip(found, wanted, strict=True):
        worst = (outputs - expected).abs().max().item()
        assert worst < TOLERANCE, f"{name} at tp, pp, vpp {split}: differs by {worst} from transformers"


def test_the_engine_computes_what_transformers_does_from_a_converted_checkpoint(
    on_ranks: OnRanks, converted: Callable[[str], tuple[Path, Tensor]]
) -> None:
    check(on_ranks, 4, [converted(case) for case in QUICK], FOUR_RANKS)


@pytest.mark.slow
def test_every_family_and_head_at_every_layout_of_four_ranks(
    on_ranks: OnRanks, converted: Callable[[str], tuple[Path, Tensor]]
) -> None:
    check(on_ranks, 4, [converted(case) for case in EVERY], FOUR_RANKS)


@pytest.fixture(scope="module")
def on_many_ranks() -> Iterator[OnRanks]:
    """As on_ranks, with up to 16."""
    module = by_path("pool")
    module.NUM_WORKERS = 16  # type: ignore[attr-defined]
    pool = module.Pool()
    yield pool.run
    pool.close()


@pytest.mark.slow
@pytest.mark.parametrize("splits", MANY_RANKS, ids=["8 ranks", "16 ranks"])
def test_every_family_and_head_at_layouts_of_more_ranks(
    on_many_ranks: OnRanks, converted: Callable[[str], tuple[Path, Tensor]], splits: list[tuple[int, int, int]]
) -> None:
    num_ranks = splits[0][0] * splits[0][1]
    check(on_many_ranks, num_ranks, [converted(case) for case in EVERY], splits)
