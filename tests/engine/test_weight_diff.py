"""Weight differences as the models of "Secrets of RLHF" were released, against arithmetic on whole state dicts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from ppomax.engine import weight_diff
from ppomax.engine.errors import CheckpointError
from ppomax.engine.weight_diff import make_diff, merge_diff

SMALL: dict[str, Any] = {
    "vocab_size": 250,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA = transformers.LlamaConfig(**SMALL)
GROWN = transformers.LlamaConfig(**SMALL | {"vocab_size": 252})
"""As the released Chinese models: 32002 tokens where LLaMA has 32000."""
BUFFERS = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.rand(4) for layer in range(2)}


def save(folder: Path, config: transformers.PretrainedConfig, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """A folder with random weights, a multiple of 1/64 each: their sums and differences are exact in every type."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-64, 64, parameter.shape) / 64)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def edit(folder: Path, weights: dict[str, Tensor], **config: Any) -> None:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(content))


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert found[name].dtype == weight.dtype, name
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("step_bytes", [1, weight_diff.STEP_BYTES])
def test_raw_and_diff_give_back_the_tuned_model(
    dtype: torch.dtype, step_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_diff, "STEP_BYTES", step_bytes)
    raw, tuned = save(tmp_path / "raw", LLAMA, dtype, 1), save(tmp_path / "tuned", GROWN, dtype, 2)
    recovery = make_diff(str(tmp_path / "raw"), str(tmp_path / "tuned"), str(tmp_path / "diff"))
    assert recovery.largest == 0
    wanted = {name: x.float() - raw[name].float() if "layers" in name else x for name, x in tuned.items()}
    assert_same(load_file(tmp_path / "diff/model.safetensors"), wanted)
    merge_diff(str(tmp_path / "raw"), str(tmp_path / "diff"), str(tmp_path / "back"))
    assert_same(load_file(tmp_path / "back/model.safetensors"), tuned)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").config.vocab_size == 252


def test_a_diff_as_it_was_released_is_recovered(tmp_path: Path) -> None:
    """A reward model: differences of layers alone, reward_head.weight, an unused lm_head, inv_freq buffers."""
    raw = save(tmp_path / "raw", LLAMA, torch.float32, 1)
    tuned = save(tmp_path / "diff", GROWN, torch.float32, 2)
    head = torch.randn(1, 32)
    edit(tmp_path / "raw", raw | BUFFERS)
    released = {name: x - raw[name] if "layers" in name else x for name, x in tuned.items()}
    edit(tmp_path / "diff", released | BUFFERS | {"reward_head.weight": head}, architectures=["LlamaRewardModel"])
    merge_diff(str(tmp_path / "raw"), str(tmp_path / "diff"), str(tmp_path / "back"))
    del tuned["lm_head.weight"]
    assert_same(load_file(tmp_path / "back/model.safetensors"), tuned | {"score.weight": head})
    assert transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "back").config.num_labels == 1


def test_what_rounding_loses_is_reported(tmp_path: Path) -> None:
    """1 + 2^-30 - 1 is 2^-30, but 1 + 2^-30 is 1 in float32."""
    raw, tuned = save(tmp_path / "raw", LLAMA, torch.float32, 1), save(tmp_path / "tuned", LLAMA, torch.float32, 2)
    name = "model.layers.1.mlp.up_proj.weight"
    raw[name][3, 5], tuned[name][3, 5] = 1.0, 2.0**-30
    edit(tmp_path / "raw", raw)
    edit(tmp_path / "tuned", tuned)
    recovery = make_diff(str(tmp_path / "raw"), str(tmp_path / "tuned"), str(tmp_path / "diff"))
    assert recovery == weight_diff.Recovery(2.0**-30, name)
    merge_diff(str(tmp_path / "raw"), str(tmp_path / "diff"), str(tmp_path / "back"))
    lost = load_file(tmp_path / "back/model.safetensors")[name] - tuned[name]
    assert lost.abs().max() == 2.0**-30


def test_the_type_of_the_result_can_be_chosen(tmp_path: Path) -> None:
    save(tmp_path / "raw", LLAMA, torch.float32, 1)
    tuned = save(tmp_path / "tuned", LLAMA, torch.float32, 2)
    make_diff(str(tmp_path / "raw"), str(tmp_path / "tuned"), str(tmp_path / "diff"))
    merge_diff(str(tmp_path / "raw"), str(tmp_path / "diff"), str(tmp_path / "back"), dtype=torch.bfloat16)
    assert_same(load_file(tmp_path / "back/model.safetensors"), {name: x.bfloat16() for name, x in tuned.items()})


def test_a_diff_of_another_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "raw", transformers.LlamaConfig(**SMALL | {"intermediate_size": 64}), torch.float32, 1)
    save(tmp_path / "diff", LLAMA, torch.float32, 2)
    with pytest.raises(CheckpointError, match=r"is not the model that .* was made from: ffn_hidden_size is 64 and 48"):
        merge_diff(str(tmp_path / "raw"), str(tmp_path / "diff"), str(tmp_path / "back"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["diff", "raw"]
