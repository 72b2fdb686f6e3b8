"""The four roles of RLHF: built, loaded, frozen or trained."""

from dataclasses import dataclass, replace

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.module import MegatronModule

from ppomax.engine.config import ROLES, OptimConfig, RunConfig
from ppomax.engine.models.hf_checkpoint import load_weights
from ppomax.engine.models.hf_config import read_shape
from ppomax.engine.models.hf_reader import RandomReader, SafetensorsReader, WeightReader
from ppomax.engine.models.shape import ModelShape
from ppomax.engine.models.transformer import PackedModel, build_model
from ppomax.engine.optim import make_optimizer
from ppomax.engine.parallel.groups import RoleGroups, make_groups
from ppomax.engine.parallel.layout import make_layout


@dataclass
class Role:
    """One model on this rank.

    stage: this rank's pipeline stage. module: what the schedules run: the stage, inside DistributedDataParallel where trained.
    optimizer: None for frozen roles.
    """

    name: str
    shape: ModelShape
    groups: RoleGroups
    stage: PackedModel
    module: MegatronModule
    optimizer: DistributedOptimizer | None

    @property
    def device(self) -> torch.device:
        return next(self.stage.parameters()).device


def role_groups(config: RunConfig) -> dict[str, RoleGroups]:
    """The process groups of all four roles. Every rank must call it once."""
    world_size = torch.distributed.get_world_size()
    return make_groups({role: make_layout(role, getattr(config.parallel, role), world_size) for role in ROLES})


def load_role(
    name: str,
    folder: str,
    config: RunConfig,
    groups: RoleGroups,
    *,
    scalar: bool = False,
    extra_scalar_head: bool = False,
    fresh_head: bool = False,
    trained: bool = False,
    eps: float = 1e-8,
) -> Role:
    """A role with the weights of a Hugging Face folder.

    scalar: a scalar head instead of the vocabulary head. extra_scalar_head: both. fresh_head: the scalar head is new (the folder holds
    a language model). trained: with gradient buffers and optimizer (Adam's eps).
    """
    shape = read_shape(folder)
    if scalar != shape.scalar:
        shape = as_scalar(shape) if scalar else shape
    return make_role(
        name,
        shape,
        SafetensorsReader(folder),
        config,
        groups,
        source=folder,
        extra_scalar_head=extra_scalar_head,
        fresh_head=fresh_head,
        trained=trained,
        eps=eps,
    )


def as_scalar(shape: ModelShape) -> ModelShape:
    """The same body with a scalar head."""
    return replace(shape, scalar=True, tie_embeddings=False)


def make_role(
    name: str,
    shape: ModelShape,
    reader: WeightReader,
    config: RunConfig,
    groups: RoleGroups,
    *,
    source: str,
    extra_scalar_head: bool = False,
    fresh_head: bool = False,
    trained: bool = False,
    eps: float = 1e-8,
) -> Role:
    stage = build_model(
        config.model,
        shape,
        groups,
        sequence_parallel=config.parallel.sequence_parallel,
        extra_scalar_head=extra_scalar_head,
    )
    load_weights(stage, reader, source, head="fresh" if fresh_head else "load", seed=config.train.seed)
    if not trained:
        stage.requires_grad_(False)
        return Role(name, shape, groups, stage, stage, None)
    module, optimizer = _trainable(stage, groups, config.optim, eps=eps)
    return Role(name, shape, groups, stage, module, optimizer)


def random_reader(shape: ModelShape, config: RunConfig) -> WeightReader:
    """Random weights that depend on the seed and the names alone, not on the layout."""
    return RandomReader(shape, seed=config.train.seed, std=config.model.init.init_std)


def _trainable(
    stage: PackedModel, groups: RoleGroups, config: OptimConfig, *, eps: float
) -> tuple[DistributedDataParallel, DistributedOptimizer]:
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=True, grad_reduce_in_fp32=True, check_for_nan_in_grad=False
    )
    module = DistributedDataParallel(stage.config, settings, stage, pg_collection=groups.megatron)
    optimizer = make_optimizer(module, groups, config, eps=eps, bf16=stage.config.bf16)
    return module, optimizer
