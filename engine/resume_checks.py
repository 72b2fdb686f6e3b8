"""What a resumed run must have in common with the run that wrote its checkpoint, and what has changed since.

The frozen models are no part of a checkpoint: it pins them by a checksum of their weights. So a reference model is
never another one than before, above all not the policy that was trained since.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ppomax.engine.checkpoint_state import read_state
from ppomax.engine.checkpoint_verify import VerifiedCheckpoint
from ppomax.engine.config import RunConfig
from ppomax.engine.errors import CheckpointError
from ppomax.engine.models.identity import ModelIdentity, identify
from ppomax.engine.parallel.collectives import raise_on_all

UNTOLD = ("train.output", "train.resume")
"""Fields whose changes need no word: a resume changes them."""


def frozen_models(config: RunConfig, command: str) -> dict[str, ModelIdentity]:
    """The models of a stage that stay as they are while it trains. Collective over all ranks."""
    if command not in ("critic", "ppo"):
        return {}
    model = config.model
    folders = {
        "reference": model.reference or model.policy,
        "reward": model.reward if config.has_reward("model") else "",
        "process": model.process if config.has_reward("process") else "",
    }
    if command == "critic":
        folders["policy"] = model.policy
    found = {folder: identify(folder) for folder in dict.fromkeys(folders.values()) if folder}
    return {role: found[folder] for role, folder in folders.items() if folder}


def pinned(config: RunConfig, frozen: Mapping[str, ModelIdentity]) -> dict[str, Any]:
    """What state.json holds for `check_resume`."""
    models = {role: asdict(identity) for role, identity in frozen.items()}
    return {"frozen": models, "config": config.model_dump(mode="json")}


def check_resume(checkpoint: VerifiedCheckpoint, config: RunConfig, frozen: Mapping[str, ModelIdentity]) -> list[str]:
    """A text for each thing that the user has to know. Collective over all ranks, which all raise the same
    CheckpointError where a frozen model is not the one that the checkpoint was trained with.
    """
    with raise_on_all(CheckpointError, f"cannot read the checkpoint {checkpoint}"):
        content = read_state(checkpoint.path)
        saved = content.get("frozen", {})
        notes = []
        for role, identity in frozen.items():
            if role in saved:
                _compare(checkpoint, role, saved[role], identity, config)
            else:
                notes.append(f"WARNING: {checkpoint} does not say which {role} model it had: not compared")
        before, now = _fields(content.get("config", {})), _fields(config.model_dump(mode="json"))
    if before:
        names = sorted({*before, *now} - {*UNTOLD})
        notes += [
            f"changed since {checkpoint.path.name}: {name} is {_text(now, name)}, was {_text(before, name)}"
            for name in names
            if _text(now, name) != _text(before, name)
        ]
    return notes


def _compare(
    checkpoint: VerifiedCheckpoint, role: str, saved: Mapping[str, Any], found: ModelIdentity, config: RunConfig
) -> None:
    faults = []
    if saved["sha256"] != found.sha256:
        faults.append(f"its weights have SHA-256 {found.sha256}, expected {saved['sha256']}")
    faults += [
        f"its {name} is {size}, expected {saved['shape'].get(name)}"
        for name, size in found.shape.items()
        if saved["shape"].get(name) != size
    ]
    if not faults:
        return
    source = f"model.{role} = {found.folder!r}"
    if role == "reference" and not config.model.reference:
        source = f"model.reference is empty and model.policy = {found.folder!r}"
    raise CheckpointError(
        f"{source} is not the {role} model that {checkpoint} was trained with: {'; '.join(faults)}; set "
        f"model.{role} to the folder that it had ({saved['folder']!r} then; it may have moved), or start a new run "
        "from the checkpoint's weights (ppomax convert megatron-to-hf)"
    )


def _fields(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """section.field: value, of a whole configuration."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _fields(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _text(fields: Mapping[str, Any], name: str) -> str:
    return json.dumps(fields[name]) if name in fields else "not there"
