"""The Hugging Face tensors of a model that is split over ranks, one after the other: for a folder, for a sampler.

One parameter at a time is whole on a rank, the model never is.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ppomax.engine.models.hf_names import Recipe, merge_shares, parameter_names, recipe_of, weight_sizes
from ppomax.engine.models.shape import ModelShape, layers_per_stage, stage_of_layer
from ppomax.engine.models.transformer import PackedModel
from ppomax.engine.parallel.groups import RoleGroups
from ppomax.engine.parallel.layout import ParallelLayout


@torch.no_grad()
def export_weights(
    chunks: Sequence[PackedModel], shape: ModelShape, groups: RoleGroups, dtype: torch.dtype, *, everywhere: bool
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every Hugging Face tensor of the model, in the order of `parameter_names`.

    chunks: this rank's. everywhere: every rank gets them, each replica from its own ranks; otherwise rank 0 of the
    first replica alone.
    shape: the model's; or, of a model with both heads, that with scalar=True: the scalar head instead of the vocabulary
    head. dtype: of the tensors, which are copies.
    Every rank must iterate to the end (without `everywhere`, those of the other replicas have nothing to do, nor have
    ranks that are not the role's).
    """
    if not groups.is_here or (groups.dp_rank != 0 and not everywhere):
        return
    parameters = {
        global_name(chunk, name): parameter.detach() for chunk in chunks for name, parameter in chunk.named_parameters()
    }
    device = next(iter(parameters.values())).device
    sizes = weight_sizes(shape)
    for name in parameter_names(shape):
        recipe, stage = recipe_of(name, shape, groups.layout.tp), _stage_of(name, shape, groups.layout)
        tensors: dict[str, Tensor] = {}
        if groups.pp_rank == stage:
            if name == "output_layer.weight" and shape.scalar and not chunks[0].shape.scalar:
                name = "scalar_head.weight"
            shares = _gather_shares(parameters[name].to(dtype), recipe, groups, everywhere=everywhere)
            if everywhere or groups.tp_rank == 0:
                tensors = merge_shares(recipe, shares)
        if everywhere and groups.layout.pp > 1:
            for source in recipe.sources:
                if groups.pp_rank != stage:
                    tensors[source] = torch.empty(sizes[source], dtype=dtype, device=device)
                dist.broadcast(tensors[source], group=groups.megatron.pp, group_src=stage)
        elif groups.tp_rank == 0 and stage != 0:
            for source in recipe.sources:
                if groups.pp_rank == stage:
                    dist.send(tensors[source], group=groups.megatron.pp, group_dst=0)
                elif groups.pp_rank == 0:
                    tensors[source] = torch.empty(sizes[source], dtype=dtype, device=device)
                    dist.recv(tensors[source], group=groups.megatron.pp, group_src=stage)
        if everywhere or groups.pp_rank == 0:
            yield from tensors.items()


def global_name(chunk: PackedModel, name: str) -> str:
    """A parameter's name with its layer counted over the whole model."""
    if not name.startswith("decoder.layers."):
        return name
    number, rest = name.removeprefix("decoder.layers.").split(".", 1)
    return f"decoder.layers.{chunk.decoder.layers[int(number)].layer_number - 1}.{rest}"


def _stage_of(name: str, shape: ModelShape, layout: ParallelLayout) -> int:
    """The pipeline stage that holds a parameter (the first one of tied embeddings)."""
    if name.startswith("decoder.layers."):
        stages = layers_per_stage(
            shape.num_layers, pp=layout.pp, first=layout.first_stage_layers, last=layout.last_stage_layers
        )
        return stage_of_layer(int(name.split(".")[2]), stages, layout.vpp)
    return 0 if name.startswith("embedding.") else layout.pp - 1


def _gather_shares(share: Tensor, recipe: Recipe, groups: RoleGroups, *, everywhere: bool) -> list[Tensor]:
    """All shares of a parameter, on every rank of the tp group or on its first; all of them must call it."""
    if recipe.split == "none" or groups.layout.tp == 1:
        return [share]
    share = share.contiguous()
    shares = [torch.empty_like(share) for _ in range(groups.layout.tp)] if everywhere or groups.tp_rank == 0 else None
    if everywhere:
        dist.all_gather(shares, share, group=groups.megatron.tp)
    else:
        dist.gather(share, shares, group=groups.megatron.tp, group_dst=0)
    return shares or []
