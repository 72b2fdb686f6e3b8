"""Checkpoints of a running stage: models and optimizers through Megatron's distributed checkpoints, the rest as JSON.

A checkpoint is a folder `step_N` with one distributed checkpoint per trained role and `state.json`. It is written
beside its final name and renamed when it is whole, so a folder with that name is always complete. Any layout can load
what another one saved.
"""

import json
import os
import queue
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from torch.distributed.checkpoint.api import CheckpointException

from ppomax.engine.checkpoint_state import FORMAT, read_state
from ppomax.engine.errors import CheckpointError
from ppomax.engine.models.pickled_records import read_metadata_pickle
from ppomax.engine.models.roles import Role
from ppomax.engine.parallel.collectives import raise_on_all


def save_checkpoint(folder: str, step: int, roles: Mapping[str, Role], state: Mapping[str, Any], *, keep: int) -> Path:
    """Writes `folder`/step_N and removes all but the newest `keep`. Collective over all ranks.

    roles: the trained ones. state: what JSON can hold, the same on every rank. Returns the checkpoint's path.
    """
    final = Path(folder) / f"step_{step:08d}"
    partial = final.with_name(f".{final.name}.partial")
    with raise_on_all(CheckpointError, f"cannot write the checkpoint {final}"):
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            for name in roles:
                (partial / name).mkdir(parents=True)
    # Megatron would start a server for this queue, a process per rank that outlives a rank that is killed and keeps its
    # output open: only asynchronous saves share the queue with another process.
    filesystem_async._results_queue = queue.Queue()
    for name, role in roles.items():
        with role.memory.resident("weights", "optimizer"):
            state_dict = _sharded_state(role, loading=False)
            # What is not split, rank 0 writes: also where the role is not on it.
            _, common = extract_sharded_base(state_dict)
            common = role.groups.give_object_to_all(common)
            dist_checkpointing.save(
                state_dict if role.is_here else common,
                str(partial / name),
                content_metadata={"distrib_optim_sharding_type": "fully_reshardable"},
            )
    with raise_on_all(CheckpointError, f"cannot write the checkpoint {final}"):
        if dist.get_rank() == 0:
            shapes = {name: asdict(role.shape) for name, role in sorted(roles.items())}
            content = {"format": FORMAT, "step": step, "roles": shapes, "state": dict(state)}
            (partial / "state.json").write_text(json.dumps(content, indent=1))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            for old in list_checkpoints(folder)[:-keep]:
                shutil.rmtree(old)
    return final


def load_checkpoint(path: str | Path, roles: Mapping[str, Role]) -> dict[str, Any]:
    """Fills the roles' weights and optimizers from a checkpoint of any layout; returns its state. Collective over all
    ranks.
    """
    path = Path(path)
    with raise_on_all(CheckpointError, f"cannot load the checkpoint {path}"):
        content = read_state(path)
        missing = sorted(set(roles) - set(content["roles"]))
        if missing:
            raise CheckpointError(
                f"checkpoint {path} holds {', '.join(content['roles'])} but this stage trains {', '.join(roles)}: "
                f"{', '.join(missing)} missing; resume with the stage that wrote it"
            )
        for name, role in roles.items():
            _check_shape(path / name, content["roles"][name], asdict(role.shape))
            read_metadata_pickle(path / name / ".metadata")
    for name, role in roles.items():
        with role.memory.resident("weights", "optimizer"):
            _load_role(path / name, role)
    return content["state"]


def _load_role(path: Path, role: Role) -> None:
    with raise_on_all(CheckpointError, f"cannot load the checkpoint {path}"):
        # Damage shows as errors of a dozen types; torch's own is not an Exception.
        try:
            loaded = dist_checkpointing.load(_sharded_state(role, loading=True), str(path))
        except (Exception, CheckpointException) as error:
            raise CheckpointError(
                f"checkpoint {path} cannot be loaded ({_cause(error)}); take another step_N folder"
            ) from error
    if not role.is_here:
        return
    for number, chunk in enumerate(role.chunks):
        chunk.load_state_dict(loaded["model"][str(number)])
    assert role.optimizer is not None
    with torch.no_grad():
        role.optimizer.load_state_dict(loaded["optimizer"])


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Complete checkpoints of a folder, oldest first."""
    found = [path for path in Path(folder).glob("step_*") if re.fullmatch(r"step_\d{8}", path.name)]
    return sorted(path for path in found if (path / "state.json").is_file())


def find_checkpoint(resume: str, folder: str) -> Path | None:
    """What `train.resume` names: "never" and "auto" without a checkpoint give None, a path must exist."""
    if resume == "never":
        return None
    if resume == "auto":
        found = list_checkpoints(folder)
        return found[-1] if found else None
    path = Path(resume)
    if not (path / "state.json").is_file():
        raise CheckpointError(f"train.resume = {resume!r}: no state.json there; give a step_N folder, auto or never")
    return path


def _sharded_state(role: Role, *, loading: bool) -> dict[str, Any]:
    """What Megatron saves and loads of a role; nothing on the ranks that are not the role's."""
    if not role.is_here:
        return {}
    # Megatron's default sharding of the optimizer cannot be saved in 0.16; this one loads under any layout.
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": role.groups.megatron.dp_cp}
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
    optimizer = role.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    return {"model": model, "optimizer": optimizer}


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
