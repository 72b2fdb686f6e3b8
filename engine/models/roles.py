"""The four roles of RLHF: built, loaded, frozen or trained."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from ppomax.engine.config import RunConfig
from ppomax.engine.config_models import ROLES, OptimConfig
from ppomax.engine.data.batches import Pack, Rows, balance, make_packs
from ppomax.engine.errors import CheckpointError, ConfigError
from ppomax.engine.models.hf_checkpoint import load_weights
from ppomax.engine.models.hf_config import read_shape
from ppomax.engine.models.hf_reader import RandomReader, SafetensorsReader, WeightReader
from ppomax.engine.models.offload import Kind, Offload, RoleMemory
from ppomax.engine.models.shape import ModelShape, shape_from_init
from ppomax.engine.models.transformer import PackedModel, build_chunks
from ppomax.engine.optim import FlatAdamW, make_optimizer, watch_optimizer_made
from ppomax.engine.parallel.device import this_device
from ppomax.engine.parallel.groups import RoleGroups, make_groups
from ppomax.engine.parallel.layout import make_layout


@dataclass
class Role:
    """One model on this rank. On a rank that is none of the role's: its name, shape and groups alone.

    chunks: this rank's parts of the model, in order: one, or as many as vpp. modules: what the schedules run: the
    chunks, each inside DistributedDataParallel where trained.
    optimizer: of all chunks; None for frozen roles, and where the role is not here. memory: what of all that is on the
    device.
    """

    name: str
    shape: ModelShape
    groups: RoleGroups
    chunks: list[PackedModel]
    modules: list[MegatronModule]
    optimizer: FlatAdamW | None
    memory: RoleMemory

    @property
    def is_here(self) -> bool:
        """Whether this rank is one of the role's."""
        return self.groups.is_here

    @property
    def stage(self) -> PackedModel:
        """The last chunk: on the last pipeline rank the one with the head."""
        return self.chunks[-1]

    @property
    def device(self) -> torch.device:
        return next(self.stage.parameters()).device if self.is_here else this_device()


def role_groups(config: RunConfig) -> dict[str, RoleGroups]:
    """The process groups of all four roles. Every rank must call it once."""
    world_size = torch.distributed.get_world_size()
    layouts = {role: make_layout(role, getattr(config.parallel, role), world_size) for role in ROLES}
    return make_groups(layouts, timeout_seconds=config.parallel.timeout_seconds)


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

    scalar: a scalar head instead of the vocabulary head. extra_scalar_head: both. fresh_head: the scalar head is new
    (the folder holds a language model). trained: with gradient buffers and optimizer (Adam's eps).
    """
    if not folder:
        raise ConfigError(f"model.{name} is empty; set it to the Hugging Face folder of the {name} model")
    shape = read_shape(folder)
    if shape.scalar and not scalar:
        raise CheckpointError(
            f"model.{name} = {folder!r} is a reward model or critic: it has no vocabulary head; "
            "give the folder of a language model"
        )
    return make_role(
        name,
        as_scalar(shape) if scalar else shape,
        SafetensorsReader(folder),
        config,
        groups,
        source=folder,
        extra_scalar_head=extra_scalar_head,
        fresh_head=fresh_head,
        trained=trained,
        eps=eps,
    )


def load_policy(
    config: RunConfig,
    groups: RoleGroups,
    vocab_size: int,
    *,
    trained: bool,
    extra_scalar_head: bool = False,
    name: str = "policy",
) -> Role:
    """The language model of model.policy, or one of the shape in [model.init] with random weights where that is
    empty. name: of the role that it takes.
    """
    folder = config.model.policy
    options: dict[str, bool] = {
        "extra_scalar_head": extra_scalar_head,
        "fresh_head": extra_scalar_head,
        "trained": trained,
    }
    if folder:
        return load_role(name, folder, config, groups, eps=config.optim.eps, **options)
    shape = shape_from_init(config.model.init, vocab_size)
    reader = random_reader(shape, config)
    return make_role(name, shape, reader, config, groups, source="model.init", eps=config.optim.eps, **options)


def load_critic(config: RunConfig, groups: RoleGroups) -> Role:
    """A trained critic: model.critic, or as ppo.critic_init says the reward model, or the policy's body with a fresh
    head.
    """
    fresh = not config.model.critic and config.ppo.critic_init == "sft"
    folder = config.model.critic or (config.model.policy if fresh else config.model.reward)
    eps = config.optim.critic_eps
    return load_role("critic", folder, config, groups, scalar=True, fresh_head=fresh, trained=True, eps=eps)


def load_reward_models(config: RunConfig, groups: RoleGroups) -> tuple[Role | None, Role | None]:
    """Reward model and process model, each where ppo.rewards has it. groups: of the reward model, for both."""

    def load(name: str, kind: str, folder: str) -> Role | None:
        return load_role(name, folder, config, groups, scalar=True) if config.has_reward(kind) else None

    return load("reward", "model", config.model.reward), load("process", "process", config.model.process)


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
    if not groups.is_here:
        if trained:
            watch_optimizer_made()
        nothing: dict[Kind, list[Tensor]] = {"weights": [], "gradients": [], "optimizer": []}
        return Role(name, shape, groups, [], [], None, RoleMemory(nothing, "none", this_device()))
    chunks = build_chunks(
        config.model,
        shape,
        groups,
        sequence_parallel=config.parallel.sequence_parallel,
        extra_scalar_head=extra_scalar_head,
    )
    for chunk in chunks:
        if torch.cuda.is_available():
            chunk.cuda()  # norms and scalar heads are made on the host
        load_weights(chunk, reader, source, head="fresh" if fresh_head else "load", seed=config.train.seed)
        if not trained:
            chunk.requires_grad_(False)
    offload = getattr(config.parallel, "reward" if name == "process" else name).offload
    if not trained:
        return Role(name, shape, groups, chunks, list(chunks), None, _memory(chunks, None, offload))
    modules, optimizer = _trainable(chunks, groups, config.optim, eps=eps)
    return Role(name, shape, groups, chunks, list(modules), optimizer, _memory(chunks, optimizer, offload))


def random_reader(shape: ModelShape, config: RunConfig) -> WeightReader:
    """Random weights that depend on the seed and the names alone, not on the layout."""
    return RandomReader(shape, seed=config.train.seed, std=config.model.init.init_std)


def _trainable(
    chunks: list[PackedModel], groups: RoleGroups, config: OptimConfig, *, eps: float
) -> tuple[list[DistributedDataParallel], FlatAdamW]:
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=True, grad_reduce_in_fp32=True, check_for_nan_in_grad=False
    )
    modules = [
        DistributedDataParallel(chunk.config, settings, chunk, pg_collection=groups.megatron) for chunk in chunks
    ]
    return modules, make_optimizer(modules, groups, config, eps=eps, bf16=chunks[0].config.bf16)


def _memory(chunks: list[PackedModel], optimizer: FlatAdamW | None, offload: Offload) -> RoleMemory:
    """The memory of a new role, of which nothing is in use yet."""
    weights = [parameter for chunk in chunks for parameter in chunk.parameters()]
    tensors: dict[Kind, list[Tensor]] = {"weights": weights, "gradients": [], "optimizer": []}
    if optimizer is not None:
        tensors["gradients"] = [shard.grads for shard in optimizer.shards]
        tensors["optimizer"] = optimizer.state_tensors()
    memory = RoleMemory(tensors, offload, weights[0].device)
    memory.release()
    return memory


def role_packs(
    role: Role, sequences: Sequence[Tensor], rows: Rows, tokens_per_microbatch: int, *, multiple_of: int = 1
) -> list[Pack]:
    """The packs of this rank's replica for a global list of sequences; the same split on every rank of the replica.

    multiple_of: what their number is to be a multiple of.
    """
    units = [(i,) for i in range(len(sequences))]
    return grouped_packs(role, sequences, rows, units, tokens_per_microbatch, multiple_of=multiple_of)


def grouped_packs(
    role: Role,
    sequences: Sequence[Tensor],
    rows: Rows,
    units: Sequence[tuple[int, ...]],
    tokens_per_microbatch: int,
    *,
    multiple_of: int = 1,
) -> list[Pack]:
    """As role_packs, where the sequences of one unit (the two of a preference pair) stay in one pack, in order."""
    check_vocabulary(role, max((int(sequence.max()) for sequence in sequences), default=0))
    layout, config = role.groups.layout, role.stage.config
    lengths = [sum(sequences[i].numel() for i in unit) for unit in units]
    # The interleaved schedule takes micro-batches in groups of as many as there are stages.
    group_size = layout.pp if layout.vpp > 1 else 1
    whole = math.lcm(group_size, multiple_of)
    mine = balance(lengths, layout.dp, tokens_per_microbatch, multiple_of=whole)[role.groups.dp_rank]
    return make_packs(
        sequences,
        rows,
        [[i for unit in members for i in units[unit]] for members in mine],
        multiple_of=layout.tp if config.sequence_parallel else 1,
        equal_lengths=layout.pp > 1,
    )


def check_vocabulary(role: Role, largest_id: int) -> None:
    """Raises ConfigError where a role has no embedding for a token: under tp > 1 Megatron would take zeros for it."""
    if largest_id >= role.shape.vocab_size:
        raise ConfigError(
            f"token id {largest_id} is outside the vocabulary of the {role.name} model, "
            f"{role.shape.vocab_size} tokens: it belongs to another tokenizer; "
            "check model.tokenizer and the model folders"
        )
