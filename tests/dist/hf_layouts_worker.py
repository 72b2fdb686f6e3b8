"""Run by test_hf_layouts.py on four ranks: loads and exports folders under every layout of them.

Each layout must compute what four replicas compute, and export bitwise what it loaded. `main` takes a folder for files.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from ppomax.engine.config_models import ModelConfig
from ppomax.engine.data.batches import Pack, Rows, balance, make_packs
from ppomax.engine.errors import CheckpointError, PeerFailedError
from ppomax.engine.models import hf_writer
from ppomax.engine.models.hf_checkpoint import load_weights, save_hf
from ppomax.engine.models.hf_config import config_json, read_shape
from ppomax.engine.models.hf_export import export_weights
from ppomax.engine.models.hf_names import weight_sizes
from ppomax.engine.models.hf_reader import RandomReader, SafetensorsReader, WeightReader
from ppomax.engine.models.shape import ModelShape
from ppomax.engine.models.transformer import PackedModel, build_chunks
from ppomax.engine.parallel.device import start, stop
from ppomax.engine.parallel.groups import RoleGroups, make_groups
from ppomax.engine.parallel.layout import ParallelLayout
from ppomax.engine.parallel.pipeline import run_forward

# Two key / value heads: at tp 4 one spans two ranks. 250 tokens: padded at tp 4. Four layers: pp 4 has middle stages,
# and at pp 2 two chunks of a rank do not follow each other.
SHAPE = ModelShape(
    vocab_size=250,
    hidden_size=64,
    num_layers=4,
    num_heads=4,
    num_query_groups=2,
    head_dim=16,
    ffn_hidden_size=96,
    max_position_embeddings=64,
    rope_theta=10000.0,
    norm_eps=1e-6,
    tie_embeddings=False,
)
SHAPES = {
    "llama": SHAPE,
    "qwen2-tied": replace(SHAPE, family="qwen2", qkv_bias=True, tie_embeddings=True),
    "qwen3": replace(SHAPE, family="qwen3", qk_norm=True),
    "scalar": replace(SHAPE, scalar=True),
}
LAYOUTS = {
    f"tp{tp}pp{pp}vpp{vpp}dp{dp}": ParallelLayout(tp=tp, pp=pp, dp=dp, vpp=vpp)
    for tp, pp, vpp, dp in [
        *((1, 1, 1, 4), (2, 1, 1, 2), (1, 2, 1, 2), (2, 2, 1, 1), (4, 1, 1, 1), (1, 4, 1, 1)),
        *((1, 2, 2, 2), (2, 2, 2, 1)),
    ]
}
LENGTHS = (7, 1, 33, 12, 20)
TOLERANCE = 2e-5


def main(root: Path) -> None:
    start(60)
    groups = make_groups(LAYOUTS)
    for name, shape in SHAPES.items():
        if dist.get_rank() == 0:
            write_folder(root / name, shape)
    dist.barrier()
    for name in SHAPES:
        check_folder(root / name, groups)
    check_random_weights(root, groups)
    check_both_heads(root, groups)
    check_failures(root, groups["tp2pp2vpp2dp1"])
    stop()


def write_folder(folder: Path, shape: ModelShape) -> None:
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: torch.empty(size).normal_(std=0.1, generator=generator) + ("norm" in name)
        for name, size in weight_sizes(shape).items()
    }
    save_file(weights, folder / "model.safetensors")
    config = config_json(shape, dtype="float32", bos_id=1, eos_id=2, pad_id=0)
    (folder / "config.json").write_text(json.dumps(config))


def check_folder(folder: Path, groups: dict[str, RoleGroups]) -> None:
    shape, reader = read_shape(str(folder)), SafetensorsReader(str(folder))
    expected = None
    for name, role_groups in groups.items():
        chunks = load(shape, reader, role_groups)
        outputs = forward(chunks, role_groups)
        expected = outputs if expected is None else expected
        worst = (outputs - expected).abs().max().item()
        assert worst < TOLERANCE, f"{folder.name} {name}: differs by {worst} from four replicas"
        target = folder.with_name(f"{folder.name}-{name}")
        save_hf(chunks, shape, role_groups, str(target), dtype=torch.float32, max_file_bytes=100_000)
        if dist.get_rank() == 0:
            assert_same(contents(target), contents(folder), f"{folder.name} {name}")
        streamed = dict(export_weights(chunks, shape, role_groups, torch.float32, everywhere=True))
        assert_same(streamed, contents(folder), f"{folder.name} {name}, on every rank")


def check_random_weights(root: Path, groups: dict[str, RoleGroups]) -> None:
    reader = RandomReader(SHAPE, seed=3, std=0.1)
    wanted = {name: reader.read(name).bfloat16() for name in reader.sizes}
    for name, role_groups in groups.items():
        chunks = load(SHAPE, reader, role_groups)
        save_hf(chunks, SHAPE, role_groups, str(root / "random"), dtype=torch.bfloat16)
        if dist.get_rank() == 0:
            assert_same(contents(root / "random"), wanted, f"random {name}")


def check_both_heads(root: Path, groups: dict[str, RoleGroups]) -> None:
    """The scalar head is drawn alike for every layout and replaces the vocabulary head in the export."""
    folder = root / "qwen2-tied"
    shape = read_shape(str(folder))
    heads = []
    for name, role_groups in groups.items():
        chunks = build(shape, role_groups, extra_scalar_head=True)
        for chunk in chunks:
            load_weights(chunk, SafetensorsReader(str(folder)), str(folder), head="fresh", seed=4)
        scalar_shape = replace(shape, scalar=True)
        save_hf(chunks, scalar_shape, role_groups, str(root / f"both-{name}"), dtype=torch.float32)
        dist.barrier()
        found = contents(root / f"both-{name}")
        heads.append(found.pop("score.weight"))
        assert_same(found, contents(folder), f"trunk of both heads {name}")
    assert all(torch.equal(head, heads[0]) for head in heads)


def check_failures(root: Path, groups: RoleGroups) -> None:
    """What goes wrong on rank 0 ends every rank, leaves nothing behind, and a later export works."""
    chunks = load(SHAPE, RandomReader(SHAPE, seed=3, std=0.1), groups)

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    def save(folder: Path) -> None:
        save_hf(chunks, SHAPE, groups, str(folder), dtype=torch.float32, max_file_bytes=100_000)

    assert_raises("is not the work of an earlier export", lambda: save(root / "llama"))
    working = hf_writer.SafetensorsWriter
    hf_writer.SafetensorsWriter = full_disk
    assert_raises("No space left on device", lambda: save(root / "failed"))
    hf_writer.SafetensorsWriter = working
    if dist.get_rank() == 0:
        assert not list(root.glob("failed*"))
    save(root / "failed")


def assert_raises(message: str, action: Callable[[], None]) -> None:
    """On rank 0 with the message, on the others as the failure of a peer."""
    error, message = (CheckpointError, message) if dist.get_rank() == 0 else (PeerFailedError, "another rank")
    with pytest.raises(error, match=message):
        action()


def build(shape: ModelShape, groups: RoleGroups, *, extra_scalar_head: bool = False) -> list[PackedModel]:
    return build_chunks(ModelConfig(), shape, groups, sequence_parallel=False, extra_scalar_head=extra_scalar_head)


def load(shape: ModelShape, reader: WeightReader, groups: RoleGroups) -> list[PackedModel]:
    chunks = build(shape, groups)
    for chunk in chunks:
        with torch.no_grad():
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))
        load_weights(chunk, reader, "the reader")
    return chunks


def forward(chunks: list[PackedModel], groups: RoleGroups) -> Tensor:
    """Logits or values of every token of the ragged sequences."""
    generator = torch.Generator().manual_seed(2)
    sequences = [torch.randint(SHAPE.vocab_size, (length,), generator=generator) for length in LENGTHS]
    rows = [torch.arange(length) for length in LENGTHS]
    index = list(torch.arange(sum(LENGTHS)).split(LENGTHS))
    replicas = balance(LENGTHS, groups.layout.dp, 40, multiple_of=groups.layout.pp)
    packs = make_packs(sequences, Rows(rows, rows, index), replicas[groups.dp_rank], equal_lengths=True)
    tp, head = groups.megatron.tp, chunks[-1]

    def outputs(hidden: Tensor, pack: Pack) -> Tensor:
        if head.shape.scalar:
            return head.scalars(hidden)
        logits = (hidden @ head.vocabulary_weight().T).contiguous()
        parts = [torch.empty_like(logits) for _ in range(tp.size())]
        dist.all_gather(parts, logits, group=tp)
        assert not torch.cat(parts, dim=1)[:, SHAPE.vocab_size :].any(), "vocabulary padding is not zero"
        return torch.cat(parts, dim=1)[:, : SHAPE.vocab_size]

    width = 1 if head.shape.scalar else SHAPE.vocab_size
    return run_forward(chunks, groups, packs, outputs, sum(LENGTHS), width=width)


def contents(folder: Path) -> dict[str, Tensor]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    assert found.keys() == wanted.keys(), f"{what}: {found.keys() ^ wanted.keys()}"
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight), f"{what}: {name} changed"
