"""The roles of a stage as they are planned: whose shape, which layout, trained or not. Reads config.json at most."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ppomax.engine.config import RunConfig
from ppomax.engine.errors import ConfigError
from ppomax.engine.models.hf_config import read_shape
from ppomax.engine.models.shape import ModelShape, check_split, shape_from_init
from ppomax.engine.parallel.layout import ParallelLayout, make_layout


@dataclass(frozen=True)
class PlannedRole:
    """source: where its shape comes from. samples: it generates responses. offload: what waits on the host while it is
    not needed.
    """

    name: str
    shape: ModelShape
    layout: ParallelLayout
    source: str
    trained: bool = False
    samples: bool = False
    extra_scalar_head: bool = False
    offload: Literal["none", "optimizer", "all"] = "none"


# Sizes as published: LLaMA (Touvron et al. 2023a) 7B and 13B, Llama 2 (2023b) 70B.
_LLAMA_7B = ModelShape(
    vocab_size=32000,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_query_groups=32,
    head_dim=128,
    ffn_hidden_size=11008,
    max_position_embeddings=4096,
    rope_theta=10000.0,
    norm_eps=1e-6,
    tie_embeddings=False,
)
MODELS = {
    "llama-7b": _LLAMA_7B,
    "llama-13b": replace(
        _LLAMA_7B, hidden_size=5120, num_layers=40, num_heads=40, num_query_groups=40, ffn_hidden_size=13824
    ),
    "llama-70b": replace(
        _LLAMA_7B, hidden_size=8192, num_layers=80, num_heads=64, num_query_groups=8, ffn_hidden_size=28672
    ),
}


def known_model(name: str) -> ModelShape:
    """The shape of a name of MODELS; raises ConfigError that names the nearest one."""
    shape = MODELS.get(name.lower())
    if shape is None:
        guess = difflib.get_close_matches(name.lower(), MODELS, n=1, cutoff=0.3)
        hint = f"did you mean {guess[0]}? " if guess else ""
        raise ConfigError(f"--model {name!r}: no shape of this name; {hint}Known: {', '.join(MODELS)}")
    return shape


def planned_roles(
    config: RunConfig,
    command: str,
    world_size: int,
    *,
    model: ModelShape | None = None,
    vocab_size: Callable[[], int] | None = None,
) -> list[PlannedRole]:
    """The roles of a stage in the order in which it loads them, over world_size ranks.

    model: the shape of all of them, whatever the folders say. vocab_size: the tokenizer's, asked where [model.init]
    has a shape without one. A folder that is not there is planned by [model.init]. Raises ConfigError where a layout
    splits neither the ranks nor the model, CheckpointError for a folder that the engine cannot run.
    """
    read = _Shapes(config, model, vocab_size)
    layouts = {
        name: make_layout(name, getattr(config.parallel, name), world_size)
        for name in ("policy", "critic", "reference", "reward")
    }
    folders = config.model
    has_reference = folders.reference not in ("", folders.policy)

    def role(name: str, folder: str, **options: bool) -> PlannedRole:
        place = "reward" if name == "process" else name
        scalar = name in ("critic", "reward", "process") and command != "reward"
        shape, source = read(folder, scalar=scalar)
        return PlannedRole(
            name, shape, layouts[place], source, offload=getattr(config.parallel, place).offload, **options
        )

    if command == "sft":
        roles = [role("policy", folders.policy, trained=True)]
    elif command == "reward":
        roles = [_reward_model(role("reward", folders.policy, trained=True), config)]
    else:
        roles = [role("policy", folders.policy, trained=command == "ppo", samples=True)]
        judges = [
            role(name, folder)
            for name, kind, folder in (("reward", "model", folders.reward), ("process", "process", folders.process))
            if config.has_reward(kind)
        ]
        critic_folder = folders.critic or (folders.policy if config.ppo.critic_init == "sft" else folders.reward)
        if command == "ppo":
            reference = role("reference", folders.reference or folders.policy)
            roles += [role("critic", critic_folder, trained=True), reference, *judges]
        elif command == "critic":
            roles += [role("reference", folders.reference)] if has_reference else []
            roles += [*judges, role("critic", critic_folder, trained=True)]
        else:
            roles += [role("reference", folders.reference)] if folders.reference else []
            roles += judges
    _check_splits(roles)
    return roles


def _reward_model(role: PlannedRole, config: RunConfig) -> PlannedRole:
    """The model of the stage `reward`: both heads where Eq. 2's second term trains the vocabulary head too."""
    if role.shape.scalar or config.reward.lm_coef == 0 or config.reward.labels == "steps":
        return replace(role, shape=_scalar(role.shape))
    return replace(role, extra_scalar_head=True)


def _check_splits(roles: Sequence[PlannedRole]) -> None:
    faults = []
    for role in roles:
        try:
            layout = role.layout
            check_split(
                role.shape,
                tp=layout.tp,
                pp=layout.pp,
                vpp=layout.vpp,
                first_stage_layers=layout.first_stage_layers,
                last_stage_layers=layout.last_stage_layers,
            )
        except ConfigError as error:
            faults.append(f"parallel.{role.name}: {error}")
    if faults:
        raise ConfigError("\n".join(faults))


def _scalar(shape: ModelShape) -> ModelShape:
    return replace(shape, scalar=True, tie_embeddings=False)


class _Shapes:
    """Shape and source of a folder, or of what stands for it."""

    def __init__(self, config: RunConfig, model: ModelShape | None, vocab_size: Callable[[], int] | None) -> None:
        self._config, self._model, self._vocab_size = config, model, vocab_size

    def __call__(self, folder: str, *, scalar: bool) -> tuple[ModelShape, str]:
        if self._model is not None:
            shape, source = self._model, "--model"
        elif folder and (Path(folder) / "config.json").is_file():
            shape, source = read_shape(folder), folder
        else:
            shape, source = self._init_shape(), "model.init"
        return (_scalar(shape) if scalar else shape), source

    def _init_shape(self) -> ModelShape:
        init = self._config.model.init
        if init.vocab_size is not None:
            return shape_from_init(init, init.vocab_size)
        if self._vocab_size is None:
            raise ConfigError(
                "no model folder with a config.json to plan by, and [model.init] has no vocab_size; "
                "set model.init.vocab_size, or name a folder, or plan with --model"
            )
        return shape_from_init(init, self._vocab_size())
