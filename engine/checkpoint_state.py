"""state.json of a training checkpoint: which roles it holds, the shapes of their models, where the run stood."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from ppomax.engine.errors import CheckpointError
from ppomax.engine.models.hf_config import FAMILIES
from ppomax.engine.models.shape import ModelShape, RopeScaling

FORMAT = 2
"""1 had no checksums and less state: its models are read (`ppomax convert`), no run goes on from it."""
STATE_FILE = "state.json"


def read_state(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's state.json; raises CheckpointError unless it has roles and state of our format."""
    try:
        content = json.loads((path / STATE_FILE).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"checkpoint {path}: state.json cannot be read ({error}); take another step_N folder"
        ) from error
    if not isinstance(content, dict) or content.get("format") not in (1, FORMAT):
        found = content.get("format") if isinstance(content, dict) else content
        raise CheckpointError(f"checkpoint {path}: format {found!r}, expected {FORMAT}")
    if (
        type(content.get("step", 0)) is not int
        or not isinstance(content.get("state"), dict)
        or not isinstance(content.get("roles"), dict)
    ):
        raise CheckpointError(
            f"checkpoint {path}: state.json lacks its step, roles or state; take another step_N folder"
        )
    outside = [role for role in content["roles"] if Path(role).name != role or role in ("", "..")]
    if outside:
        raise CheckpointError(f"checkpoint {path}: state.json has a role {outside[0]!r}, expected the name of a folder")
    return content


def shape_of_role(path: Path, role: str) -> ModelShape:
    """The shape of a role's model; raises CheckpointError where state.json does not describe one."""
    try:
        content = dict(read_state(path)["roles"][role])
        rope = RopeScaling(**content.pop("rope_scaling"))
        shape = ModelShape(**content, rope_scaling=rope)
        _check_types(rope)
        _check_types(shape)
        family = FAMILIES[shape.family]
        if (shape.qkv_bias, shape.qk_norm) != (family.qkv_bias, family.qk_norm):
            raise ValueError(f"a {shape.family} model has other biases and norms")
        if rope.kind not in ("default", "linear", "llama3") or shape.num_heads % shape.num_query_groups:
            raise ValueError(f"rope {rope.kind!r}, {shape.num_heads} heads in {shape.num_query_groups} groups")
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"checkpoint {path}: state.json does not describe the model of {role} ({error}); take another step_N folder"
        ) from error
    return shape


def _check_types(made: ModelShape | RopeScaling) -> None:
    for field in fields(made):
        value = getattr(made, field.name)
        if field.type in (int, float) and not (type(value) in (int, field.type) and value > 0):
            raise ValueError(f"{field.name} is {value!r}, expected a positive number")
        if field.type in (bool, str) and type(value) is not field.type:
            raise ValueError(f"{field.name} is {value!r}, expected {field.type}")
