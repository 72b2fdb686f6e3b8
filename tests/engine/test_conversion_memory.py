"""A conversion holds a few tensors at a time, never a model or a stack of layers."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ppomax.engine.models.hf_config import config_json
from ppomax.engine.models.hf_names import weight_sizes
from ppomax.engine.models.shape import ModelShape

MIB = 2**20
CODE_MIB = 64  # what Python and torch still import and set aside once they start
WORKER = Path(__file__).with_name("conversion_memory_worker.py")
# Largest tensor: the embedding, 16 MiB of bf16; 350 MiB in all, 160 MiB of them the stack of linear_fc1.
SHAPE = ModelShape(
    vocab_size=16384,
    hidden_size=512,
    num_layers=40,
    num_heads=8,
    num_query_groups=8,
    head_dim=64,
    ffn_hidden_size=2048,
    max_position_embeddings=4096,
    rope_theta=10000.0,
    norm_eps=1e-6,
    tie_embeddings=False,
)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A folder that does not outlive its test: it grows to gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def write_sparse_folder(folder: Path, shape: ModelShape) -> tuple[int, int]:
    """A model of zeros that takes no room on the disk; bytes of its largest tensor, and of all."""
    folder.mkdir()
    header, end, largest = {}, 0, 0
    for name, size in weight_sizes(shape).items():
        num_bytes = 2 * torch.Size(size).numel()
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [end, end + num_bytes]}
        end, largest = end + num_bytes, max(largest, num_bytes)
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    config = config_json(shape, dtype="bfloat16", bos_id=1, eos_id=2, pad_id=0)
    (folder / "config.json").write_text(json.dumps(config))
    return largest, end


def peaks(root: Path, tp: int) -> list[float]:
    """MiB: before, after hf-to-megatron, after megatron-to-hf, after a comparison."""
    process = subprocess.run(
        [sys.executable, "-P", str(WORKER), str(root), str(tp)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return [float(line) for line in process.stdout.split()]


def test_a_conversion_adds_less_than_three_times_the_largest_tensor(root: Path) -> None:
    largest, _ = write_sparse_folder(root / "hf", SHAPE)
    stack = SHAPE.num_layers * 2 * SHAPE.ffn_hidden_size * SHAPE.hidden_size * 2
    before, *after = peaks(root, tp=1)
    assert max(after) - before < 3 * largest / MIB + CODE_MIB < stack / MIB


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 4])
def test_a_large_model_needs_three_times_its_largest_tensor_and_a_gigabyte(root: Path, tp: int) -> None:
    """5.2 GB; the largest tensor has 128 MiB, a stack of linear_fc1 2.3 GiB."""
    shape = replace(SHAPE, vocab_size=32768, hidden_size=2048, ffn_hidden_size=8192, num_layers=40)
    shape = replace(shape, num_heads=16, num_query_groups=4, head_dim=128)
    largest, total = write_sparse_folder(root / "hf", shape)
    assert total > 4e9
    assert max(peaks(root, tp)) < 3 * largest / MIB + 1024


@pytest.mark.slow
def test_a_model_whose_projections_are_its_largest_tensors_needs_no_more(root: Path) -> None:
    """Query, key and value lie in one tensor of Megatron's: three times the largest."""
    shape = replace(SHAPE, hidden_size=8192, ffn_hidden_size=1024, num_layers=2)
    largest, _ = write_sparse_folder(
        root / "hf", replace(shape, vocab_size=64, num_heads=64, num_query_groups=64, head_dim=128)
    )
    assert largest == 2 * 8192 * 8192
    assert max(peaks(root, tp=1)) < 3 * largest / MIB + 1024
