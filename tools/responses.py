"""Responses of the two sides of a comparison: a file as it is, or what a model folder answers to a file of prompts.

What a model answered stays in the output folder with what it was made from, and is taken again by a later run, so that
a judge that failed does not cost another generation.
"""

import contextlib
import gc
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ppomax.engine.config import RunConfig
from ppomax.engine.config_file import to_toml
from ppomax.engine.data.chat import Template
from ppomax.engine.data.datasets import BadRow, PromptRow
from ppomax.engine.data.readers import Format
from ppomax.engine.errors import ConfigError
from ppomax.engine.parallel.collectives import raise_on_all
from ppomax.tools.generate import Writer, read_prompts, respond_to_all
from ppomax.tools.inference import inference_config, load_model, load_template


@dataclass(frozen=True)
class Side:
    """Where the responses of one side are, or will be. config, template, prompts: of a model that is to answer."""

    path: Path
    origin: dict[str, Any] | None = None
    config: RunConfig | None = None
    template: Template | None = None
    prompts: Sequence[PromptRow | BadRow] = ()

    @property
    def is_missing(self) -> bool:
        return self.config is not None and not self.path.exists()


def prepare_side(source: str, prompts: str | None, format: Format | None, overrides: Sequence[str], path: Path) -> Side:
    """Checks one side before any model is loaded. path: where a model's responses go.

    Raises ConfigError for a folder without prompts to answer, or where `path` holds responses made from something else.
    """
    if not Path(source).is_dir():
        return Side(Path(source))
    if prompts is None:
        raise ConfigError(f"{source} is a model folder; give --prompts FILE, which both models answer")
    config = inference_config(source, overrides)
    template = load_template(config)
    origin = _origin(source, prompts, config)
    side = Side(path, origin, config, template, read_prompts(prompts, format, config, template))
    if path.exists() and not _is_from(path, origin):
        raise ConfigError(f"{path} holds responses of another model, prompts or settings; give another --output")
    return side


def _record(path: Path) -> Path:
    return path.with_suffix(".origin.json")


def _is_from(path: Path, origin: dict[str, Any]) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return bool(json.loads(_record(path).read_text()) == origin)
    return False


def _origin(source: str, prompts: str, config: RunConfig) -> dict[str, Any]:
    """What responses depend on: settings, the prompts' bytes, and names, sizes and times of the model's files."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(Path(source).iterdir())]
    content = Path(prompts).read_bytes() if Path(prompts).is_file() else prompts.encode()
    return {
        "model": source,
        "files": [list(file) for file in files],
        "prompts": prompts,
        "prompts_sha256": hashlib.sha256(content).hexdigest(),
        "config": to_toml(config.model_copy(update={"parallel": type(config.parallel)()})),
    }


def respond(side: Side) -> None:
    """Lets the model of a side answer, if its responses are not there. Within joined_ranks; every rank must call it."""
    if not side.is_missing:
        return
    assert side.config is not None
    assert side.template is not None
    is_writer = dist.get_rank() == 0
    with raise_on_all(ConfigError, f"{side.path} cannot be written"):
        if is_writer:
            _record(side.path).write_text(json.dumps(side.origin, indent=1))
            Path(f"{side.path}.partial").unlink(missing_ok=True)
    writer = Writer(side.path, is_writer=is_writer)
    respond_to_all(load_model(side.config, side.template), side.prompts, writer, samples=1, stops=())
    # The next model takes the memory of this one.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
