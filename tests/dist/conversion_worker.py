"""Run by test_conversion_layouts.py on several ranks: a converted checkpoint in the engine, by Megatron's loading."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from safetensors.torch import load_file
from torch import Tensor

from ppomax.engine.config_models import ModelConfig
from ppomax.engine.data.batches import Pack, Rows, balance, make_packs
from ppomax.engine.models.hf_config import read_shape
from ppomax.engine.models.hf_export import export_weights
from ppomax.engine.models.transformer import PackedModel, build_chunks
from ppomax.engine.parallel.device import start, stop
from ppomax.engine.parallel.groups import RoleGroups, make_groups
from ppomax.engine.parallel.layout import ParallelLayout
from ppomax.engine.parallel.pipeline import run_forward


def outputs_under(
    folders: Sequence[Path], splits: Sequence[tuple[int, int, int]], lengths: Sequence[int]
) -> list[Tensor]:
    """Logits or values [sum of lengths, width] of every folder under every (tp, pp, vpp), folders outermost.

    What the engine exports again must be bit by bit what was converted.

    lengths: of the sequences in `sequences`; they run together in packs of ragged sequences.
    """
    start(120)
    ranks = dist.get_world_size()
    layouts = {str(split): split for split in splits}
    groups = make_groups(
        {name: ParallelLayout(tp=tp, pp=pp, dp=ranks // (tp * pp), vpp=vpp) for name, (tp, pp, vpp) in layouts.items()}
    )
    found = []
    for folder in folders:
        for name in layouts:
            chunks = load(folder, groups[name])
            check_export(chunks, groups[name], folder)
            found.append(forward(chunks, groups[name], lengths))
    stop()
    return found


def sequences(lengths: Sequence[int], vocab_size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]


def load(folder: Path, groups: RoleGroups) -> list[PackedModel]:
    chunks = build_chunks(ModelConfig(), read_shape(str(folder)), groups, sequence_parallel=False)
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": groups.megatron.dp_cp}
    wanted = {}
    for number, chunk in enumerate(chunks):
        with torch.no_grad():
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))
        state = chunk.sharded_state_dict(metadata=metadata)
        wanted[str(number)] = {name: value for name, value in state.items() if not name.endswith("._extra_state")}
    loaded = dist_checkpointing.load({"model": wanted}, str(folder))["model"]
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[str(number)])
    return chunks


def check_export(chunks: list[PackedModel], groups: RoleGroups, folder: Path) -> None:
    """What the engine exports is bit by bit what was converted: the folder `folder`-hf."""
    exported = dict(export_weights(chunks, chunks[0].shape, groups, torch.float32, everywhere=False))
    if dist.get_rank() == 0:
        wanted = load_file(folder.with_name(f"{folder.name}-hf") / "model.safetensors")
        assert exported.keys() == wanted.keys()
        for name, weight in wanted.items():
            assert torch.equal(exported[name], weight), f"{folder.name} at {groups.layout}: {name} changed"


def forward(chunks: list[PackedModel], groups: RoleGroups, lengths: Sequence[int]) -> Tensor:
    model, tp = chunks[-1], groups.megatron.tp
    vocab_size = model.shape.vocab_size
    rows = [torch.arange(length) for length in lengths]
    index = list(torch.arange(sum(lengths)).split(list(lengths)))
    mine = balance(lengths, groups.layout.dp, 40, multiple_of=groups.layout.pp)[groups.dp_rank]
    packs = make_packs(sequences(lengths, vocab_size), Rows(rows, rows, index), mine, equal_lengths=True)

    def outputs(hidden: Tensor, pack: Pack) -> Tensor:
        if model.shape.scalar:
            return model.scalars(hidden)
        logits = (hidden @ model.vocabulary_weight().T).contiguous()
        parts = [torch.empty_like(logits) for _ in range(tp.size())]
        dist.all_gather(parts, logits, group=tp)
        return torch.cat(parts, dim=1)[:, :vocab_size]

    width = 1 if model.shape.scalar else vocab_size
    return run_forward(chunks, groups, packs, outputs, sum(lengths), width=width).reshape(sum(lengths), width)
