"""Run by test_conversion_layouts.py on several ranks: a converted checkpoint in the engine, by Megatron's own loading."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch import Tensor

from ppomax.engine.config import ModelConfig
from ppomax.engine.data.batches import Pack, Rows, balance, make_packs
from ppomax.engine.models.hf_config import read_shape
from ppomax.engine.models.transformer import PackedModel, build_model
from ppomax.engine.parallel.device import start, stop
from ppomax.engine.parallel.groups import RoleGroups, make_groups
from ppomax.engine.parallel.layout import ParallelLayout
from ppomax.engine.parallel.pipeline import run_forward


def outputs_under(folders: Sequence[Path], splits: Sequence[tuple[int, int]], lengths: Sequence[int]) -> list[Tensor]:
    """Logits or values [sum of lengths, width] of every folder under every (tp, pp), folders outermost.

    lengths: of the sequences in `sequences`; they run together in packs of ragged sequences.
    """
    start(120)
    ranks = dist.get_world_size()
    groups = make_groups({f"{tp} {pp}": ParallelLayout(tp=tp, pp=pp, dp=ranks // (tp * pp)) for tp, pp in splits})
    found = [forward(load(folder, groups[f"{tp} {pp}"]), groups[f"{tp} {pp}"], lengths) for folder in folders for tp, pp in splits]
    stop()
    return found


def sequences(lengths: Sequence[int], vocab_size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]


def load(folder: Path, groups: RoleGroups) -> PackedModel:
    model = build_model(ModelConfig(), read_shape(str(folder)), groups, sequence_parallel=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": groups.megatron.dp_cp}
    wanted = model.sharded_state_dict(metadata=metadata)
    wanted = {name: value for name, value in wanted.items() if not name.endswith("._extra_state")}
    model.load_state_dict(dist_checkpointing.load({"model": wanted}, str(folder))["model"])
    return model


def forward(model: PackedModel, groups: RoleGroups, lengths: Sequence[int]) -> Tensor:
    vocab_size, tp = model.shape.vocab_size, groups.megatron.tp
    rows = [torch.arange(length) for length in lengths]
    index = list(torch.arange(sum(lengths)).split(list(lengths)))
    mine = balance(lengths, groups.layout.dp, 40)[groups.dp_rank]
    packs = make_packs(sequences(lengths, vocab_size), Rows(rows, rows, index), mine, equal_lengths=True)

    def outputs(hidden: Tensor, pack: Pack) -> Tensor:
        if model.shape.scalar:
            return model.scalars(hidden)
        logits = (hidden @ model.vocabulary_weight().T).contiguous()
        parts = [torch.empty_like(logits) for _ in range(tp.size())]
        dist.all_gather(parts, logits, group=tp)
        return torch.cat(parts, dim=1)[:, :vocab_size]

    width = 1 if model.shape.scalar else vocab_size
    return run_forward(model, groups, packs, outputs, sum(lengths), width=width).reshape(sum(lengths), width)
