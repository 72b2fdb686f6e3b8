"""What lies beside the weights of a model folder: config.json, generation_config.json, tokenizer, chat template."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ppomax.engine.data.tokenizer import SAVED_FILES, Tokenizer
from ppomax.engine.errors import CheckpointError
from ppomax.engine.models.hf_config import config_json
from ppomax.engine.models.shape import ModelShape

EXPORT_MARK = {"exported_by": "ppomax"}
"""A field of config.json: tells our folders, which an export may replace, from those of others."""

GENERATION_FILE = "generation_config.json"

STEP_DELIMITER = "step_delimiter"
"""A field of the config.json of process models (process_model.py)."""


def write_side_files(
    folder: Path,
    shape: ModelShape,
    dtype: torch.dtype,
    *,
    tokenizer: Tokenizer | None,
    source: Path | None = None,
    step_delimiter: str | None = None,
) -> None:
    """Writes them into a folder.

    tokenizer: is saved there; gives the special ids. source: a model folder whose special ids, step delimiter,
    generation_config.json and (unless a tokenizer is given) tokenizer files are taken over as they are. step_delimiter:
    of a process model.
    """
    ids = special_ids(source) if source else {}
    if tokenizer is not None:
        ids |= {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
        tokenizer.save(folder)
    for name in [GENERATION_FILE] if tokenizer else [GENERATION_FILE, *SAVED_FILES]:
        if source is not None and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if not shape.scalar and not (folder / GENERATION_FILE).exists():
        write_json(folder / GENERATION_FILE, {f"{role}_token_id": ids.get(role) for role in ("bos", "eos", "pad")})
    name = str(dtype).removeprefix("torch.")
    config = config_json(shape, dtype=name, bos_id=ids.get("bos"), eos_id=ids.get("eos"), pad_id=ids.get("pad"))
    delimiter = read_json(source / "config.json").get(STEP_DELIMITER) if source else step_delimiter
    own = EXPORT_MARK if delimiter is None else EXPORT_MARK | {STEP_DELIMITER: delimiter}
    write_json(folder / "config.json", config | own)


def special_ids(folder: Path) -> dict[str, Any]:
    """The ids of bos, eos and pad as the config.json of a model folder has them; eos may be a list."""
    config = read_json(folder / "config.json")
    return {role: config.get(f"{role}_token_id") for role in ("bos", "eos", "pad")}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises CheckpointError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy the folder again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; copy the folder again")
    return content


def write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
