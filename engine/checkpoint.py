"""Checkpoints of a running stage: models and optimizers through Megatron's distributed checkpoints, the rest as JSON.

A checkpoint is a folder `step_N` with one distributed checkpoint per trained role and `state.json`. It is written
beside its final name and renamed when it is whole, so a folder with that name is always complete. Any layout can load
what another one saved.
"""

import json
import os
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException

from ppomax.engine.errors import CheckpointError
from ppomax.engine.models.roles import Role
from ppomax.engine.parallel.collectives import raise_on_all

FORMAT = 1


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
    for name, role in roles.items():
        dist_checkpointing.save(
            _sharded_state(role, loading=False),
            str(partial / name),
            content_metadata={"distrib_optim_sharding_type": "fully_reshardable"},
        )
    with raise_on_all(CheckpointError, f"cannot write the checkpoint {final}"):
        if dist.get_rank() == 0:
            content = {"format": FORMAT, "step": step, "roles": sorted(roles), "state": dict(state)}
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
        content = _read_state(path)
        missing = sorted(set(roles) - set(content["roles"]))
        if missing:
            raise CheckpointError(
                f"checkpoint {path} holds {', '.join(content['roles'])} but this stage trains {', '.join(roles)}: "
                f"{', '.join(missing)} missing; resume with the stage that wrote it"
            )
        for name in roles:
            check_metadata(path / name / ".metadata")
    for name, role in roles.items():
        with raise_on_all(CheckpointError, f"cannot load the checkpoint {path / name}"):
            try:
                loaded = dist_checkpointing.load(_sharded_state(role, loading=True), str(path / name))
            except CheckpointingException as error:
                raise CheckpointError(f"checkpoint {path / name} does not fit this model: {error}") from error
        role.stage.load_state_dict(loaded["model"])
        assert role.optimizer is not None
        with torch.no_grad():
            role.optimizer.load_state_dict(loaded["optimizer"])
    return content["state"]


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Complete checkpoints of a folder, oldest first."""
    found = [path for path in Path(folder).glob("step_*") if re.fullmatch(r"step_\d{8}", path.name)]
    return sorted(path for path in found if (path / "state.json").is_file())


def find_checkpoint(resume: str, folder: str) -> Path | None:
    """What `checkpoint.resume` names: "never" and "auto" without a checkpoint give None, a path must exist."""
    if resume == "never":
        return None
    if resume == "auto":
        found = list_checkpoints(folder)
        return found[-1] if found else None
    path = Path(resume)
    if not (path / "state.json").is_file():
        raise CheckpointError(
            f"checkpoint.resume = {resume!r}: no state.json there; give a step_N folder, auto or never"
        )
    return path


def _sharded_state(role: Role, *, loading: bool) -> dict[str, Any]:
    # Megatron's default sharding of the optimizer cannot be saved in 0.16; this one loads under any layout.
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": role.groups.megatron.dp_cp}
    model = role.stage.sharded_state_dict(metadata=metadata)
    assert role.optimizer is not None
    optimizer = role.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    return {"model": model, "optimizer": optimizer}


def _read_state(path: Path) -> dict[str, Any]:
    try:
        content = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {path}: state.json cannot be read ({error}); take another step_N folder"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {path}: format {content.get('format')!r}, expected {FORMAT}")
    return content


class _MetadataUnpickler(pickle.Unpickler):
    """Reads torch's distributed-checkpoint metadata, which is a pickle, and refuses everything else that a pickle can
    do.
    """

    ALLOWED = re.compile(
        r"(torch\.distributed\.checkpoint\.(metadata|planner|filesystem)\.\w+"
        r"|torch\.(Size|device|float32|float64|bfloat16|float16|int64|int32|uint8|bool|strided|contiguous_format)"
        r"|torch\.serialization\._get_layout"
        r"|collections\.OrderedDict|builtins\.(set|frozenset|list|dict|tuple|int|str|bytes|bytearray|slice)"
        r"|pathlib\.(Posix|Windows|Pure)?\w*Path|_codecs\.encode"
        r"|megatron\.core\.dist_checkpointing\.\w+(\.\w+)*)"
    )

    def find_class(self, module: str, name: str) -> Any:
        if not self.ALLOWED.fullmatch(f"{module}.{name}"):
            raise CheckpointError(f"refused: it names {module}.{name}, which no checkpoint metadata contains")
        return super().find_class(module, name)


def check_metadata(path: Path) -> None:
    """Raises CheckpointError unless the pickle at `path` holds checkpoint metadata and nothing else."""
    try:
        with path.open("rb") as file:
            _MetadataUnpickler(file).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:
        raise CheckpointError(f"{path}: not a readable checkpoint metadata file ({error})") from error
