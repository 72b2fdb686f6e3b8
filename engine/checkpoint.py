"""What a checkpoint of a running stage holds of its roles: saved, and loaded under any layout.

A checkpoint is a folder `step_N` with one distributed checkpoint of Megatron per trained role, `state.json` and
`manifest.json`. `checkpoint_saver.py` writes it, `checkpoint_folders.py` publishes it, `checkpoint_verify.py` finds and
verifies the one to go on from.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from torch.distributed.checkpoint.api import CheckpointException

from ppomax.engine.checkpoint_state import FORMAT, read_state
from ppomax.engine.checkpoint_verify import VerifiedCheckpoint
from ppomax.engine.errors import CheckpointError
from ppomax.engine.models.pickled_records import read_metadata_pickle
from ppomax.engine.models.roles import Role
from ppomax.engine.models.save_plan import SavePlanOfRole, plan_save
from ppomax.engine.parallel.collectives import raise_on_all

ADAM_SETTINGS = ("betas", "eps", "weight_decay")
"""What the configuration decides, not the checkpoint. The learning rate is set in every step."""
SHARDING = "fully_reshardable"
"""Megatron's default sharding of the optimizer cannot be saved in 0.16; this one loads under any layout."""


def plan_role(role: Role, folder: Path, before: SavePlanOfRole | None = None) -> SavePlanOfRole:
    """What each rank writes of a role. Its weights and optimizer state must be held. Collective over all ranks.

    before: this role's plan of an earlier save of the run, on all ranks or none. Weights and state stay where they are
    for the life of a role, so all but the optimizer's step counts and settings is still true, and a new plan would
    take as long as a copy of half a gigabyte (docs/log.md).
    """
    if before is not None:
        optimizer = role.groups.give_object_to_all(_optimizer_settings(role) if role.is_here else {})
        return before.again(folder, {"optimizer": optimizer})
    state = _sharded_state(role, loading=False)
    # What is not split, rank 0 writes: also where the role is not on it.
    _, common = extract_sharded_base(state)
    common = role.groups.give_object_to_all(common)
    content_metadata = {"distrib_optim_sharding_type": SHARDING}
    return plan_save(state if role.is_here else common, folder, content_metadata)


def load_checkpoint(checkpoint: VerifiedCheckpoint, roles: Mapping[str, Role]) -> tuple[dict[str, Any], list[str]]:
    """Fills the roles' weights and optimizers from a checkpoint of any layout; returns the content of its state.json,
    and a text for each of Adam's settings that the configuration has changed since. Collective over all ranks.
    """
    path = checkpoint.path
    with raise_on_all(CheckpointError, f"cannot load the checkpoint {path}"):
        content = read_state(path)
        if content["format"] != FORMAT:
            raise CheckpointError(
                f"checkpoint {path}: format {content['format']}, expected {FORMAT}: an earlier version of ppomax wrote "
                "it; resume it with that version, or start from its weights (ppomax convert megatron-to-hf)"
            )
        missing = sorted(set(roles) - set(content["roles"]))
        if missing:
            raise CheckpointError(
                f"checkpoint {path} holds {', '.join(content['roles'])} but this stage trains {', '.join(roles)}: "
                f"{', '.join(missing)} missing; resume with the stage that wrote it"
            )
        for name, role in roles.items():
            _check_shape(path / name, content["roles"][name], asdict(role.shape))
            read_metadata_pickle(path / name / ".metadata")
    changes = []
    for name, role in roles.items():
        with role.memory.resident("weights", "optimizer"):
            changes += _load_role(path / name, role)
    return content, changes


def _load_role(path: Path, role: Role) -> list[str]:
    with raise_on_all(CheckpointError, f"cannot load the checkpoint {path}"):
        # Damage shows as errors of a dozen types; torch's own is not an Exception.
        try:
            loaded = dist_checkpointing.load(_sharded_state(role, loading=True), str(path))
        except (Exception, CheckpointException) as error:
            raise CheckpointError(
                f"checkpoint {path} cannot be loaded ({_cause(error)}); take another step_N folder"
            ) from error
    if not role.is_here:
        return []
    for number, chunk in enumerate(role.chunks):
        chunk.load_state_dict(loaded["model"][str(number)])
    assert role.optimizer is not None
    configured = [{key: group[key] for key in ADAM_SETTINGS} for group in role.optimizer.param_groups]
    with torch.no_grad():
        role.optimizer.load_state_dict(loaded["optimizer"])
    changes: dict[str, str] = {}
    for group, settings in zip(role.optimizer.param_groups, configured, strict=True):
        for key, value in settings.items():
            before, now = _plain(group[key]), _plain(value)
            if before != now:
                changes[key] = (
                    f"{role.name}: Adam's {key} is {now} from now on; the checkpoint was trained with {before}"
                )
        group.update(settings)
    return list(changes.values())


def _sharded_state(role: Role, *, loading: bool) -> dict[str, Any]:
    """What Megatron saves and loads of a role; nothing on the ranks that are not the role's."""
    if not role.is_here:
        return {}
    metadata = {"distrib_optim_sharding_type": SHARDING, "dp_cp_group": role.groups.megatron.dp_cp}
    model = {
        str(number): {
            name: value
            for name, value in chunk.sharded_state_dict(metadata=metadata).items()
            # Megatron's empty places for TransformerEngine's state: stored as pickles, which torch runs when it loads
            # them.
            if not name.endswith("._extra_state")
        }
        for number, chunk in enumerate(role.chunks)
    }
    assert role.optimizer is not None
    if loading:
        optimizer = role.optimizer.sharded_state_dict(model, is_loading=True, metadata=metadata)
    else:
        optimizer = {**_optimizer_settings(role), "param_state": role.optimizer.state_to_save(model)}
    return {"model": model, "optimizer": optimizer}


def _optimizer_settings(role: Role) -> dict[str, Any]:
    """What a checkpoint holds of the optimizer that is not split: settings and step counts."""
    assert role.optimizer is not None
    return role.optimizer.state_dict() | {"param_state_sharding_type": SHARDING}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_shape(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Megatron lets the vocabulary differ, because its padding may: the rows left over would keep random weights."""
    differing = [name for name, size in wanted.items() if saved.get(name) != size]
    if differing:
        faults = ", ".join(f"{name} is {saved.get(name)}, not {wanted[name]}" for name in differing)
        raise CheckpointError(f"checkpoint {path} does not fit this model: {faults}; resume with the model that it had")


def _cause(error: BaseException) -> str:
    """What went wrong, in a line. torch's exception holds that of each rank."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return (str(error).splitlines() or [type(error).__name__])[0]
