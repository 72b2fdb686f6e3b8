"""`ppomax convert inspect` on a folder made by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ppomax.engine.errors import CheckpointError
from ppomax.engine.models.hf_config import config_json
from ppomax.engine.models.hf_names import weight_sizes
from ppomax.engine.models.shape import ModelShape, RopeScaling
from ppomax.tools.convert import main

SHAPE = ModelShape(
    vocab_size=250,
    hidden_size=8,
    num_layers=2,
    num_heads=4,
    num_query_groups=2,
    head_dim=2,
    ffn_hidden_size=12,
    max_position_embeddings=64,
    rope_theta=500000.0,
    norm_eps=1e-6,
    tie_embeddings=True,
    qkv_bias=True,
    family="qwen2",
    rope_scaling=RopeScaling("linear", 4.0),
)


def write_folder(folder: Path, shape: ModelShape) -> None:
    config = config_json(shape, dtype="bfloat16", bos_id=1, eos_id=2, pad_id=0)
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: torch.zeros(size, dtype=torch.bfloat16) for name, size in weight_sizes(shape).items()}
    save_file(weights, folder / "model.safetensors")


def test_inspect_prints_what_a_folder_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path, SHAPE)
    main(["inspect", str(tmp_path)])
    assert capsys.readouterr().out.splitlines() == [
        "family      qwen2",
        "head        vocabulary, tied to the embedding",
        # 250 * 8 + 8 + 2 * (192 attention + 16 bias + 288 feed-forward + 16 norms)
        "parameters  3,032",
        "tensors     26 BF16",
        "vocabulary  250",
        "layers      2, hidden 8, feed-forward 12",
        "attention   4 query heads, 2 key / value heads, head_dim 2, q, k, v biases",
        "context     64 tokens, rope_theta 500000, scaling linear by 4",
    ]


def test_inspect_names_the_head_of_a_reward_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path, replace(SHAPE, scalar=True))
    main(["inspect", str(tmp_path)])
    assert "head        scalar" in capsys.readouterr().out


def test_inspect_refuses_what_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*config.json"):
        main(["inspect", str(tmp_path)])
