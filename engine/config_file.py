"""From a TOML file and `section.field=value` arguments to a `RunConfig`, and back to a file.

Precedence: arguments, then the file, then the preset (`critic` and `ppo` only), then the defaults of config.py. Faults
are collected and raised as one `ConfigError`, so that a person can fix all of them at once. Whether the layout fits the
ranks is the question of `parallel/layout.py`, whether a model's shape is possible that of `models/shape.py`.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from ppomax.engine.config import RunConfig
from ppomax.engine.config_checks import impossible_combinations
from ppomax.engine.config_help import allows_none, expected, fields, nearest_key, row_section, sections, toml_value
from ppomax.engine.config_models import RoleLayout, expand_roles
from ppomax.engine.config_ppo import PpoConfig
from ppomax.engine.config_section import Section
from ppomax.engine.errors import ConfigError
from ppomax.engine.presets import PRESETS, preset_values

Tree = dict[str, Any]


def load_config(path: str | None, overrides: Sequence[str], *, command: str, for_planning: bool = False) -> RunConfig:
    """The configuration of one stage.

    path: TOML file, or None for defaults alone. overrides: `section.field=value`, the value as TOML or a bare word.
    command: sft, reward, critic, ppo or evaluate. for_planning: what a run needs besides its sizes (models, data) may
    be missing. Raises ConfigError that lists every fault found.
    """
    file_layer = _normalised(_read_toml(path)) if path is not None else {}
    line_layer = _normalised(_parse_overrides(overrides))
    given = _merge(file_layer, line_layer)
    preset = _preset_layer(given) if command in ("critic", "ppo") else {}
    layers = {"command line": line_layer, str(path): file_layer, "ppo.preset": preset}
    config = _validate(_merge(preset, given), layers)
    if not for_planning:
        _raise_if(impossible_combinations(config, command))
    return config


def write_config(config: RunConfig, path: str | Path) -> None:
    """Writes the whole tree as TOML that `load_config` reads back to an equal config."""
    Path(path).write_text(to_toml(config), encoding="utf-8")


def to_toml(config: RunConfig) -> str:
    """The whole tree as TOML, every field named."""
    tables = []
    for name, _ in sections():
        section = _lookup(config.model_dump(), name.split("."))
        lines = [f"{key} = {toml_value(value)}" for key, value in section.items() if not isinstance(value, dict)]
        if lines:
            tables.append("\n".join([f"[{name}]", *lines]))
    return "\n\n".join(tables) + "\n"


def _read_toml(path: str) -> Tree:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file (current folder: {Path.cwd()})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as a configuration file: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); a configuration is a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: malformed TOML: {error}") from None


def _parse_overrides(overrides: Sequence[str]) -> Tree:
    tree: Tree = {}
    faults = []
    texts = {key for key, field in fields() if field.annotation is str}
    for override in overrides:
        key, equals, raw = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            faults.append(f"{override!r}: expected section.field=value, for instance ppo.lam=0.9")
            continue
        value = _parse_value(raw.strip())
        if ".".join(parts) in texts and not isinstance(value, str):
            value = raw.strip()
        tree = _merge(tree, _nested(parts, value))
    _raise_if(faults)
    return tree


def _parse_value(raw: str) -> Any:
    """A TOML value; anything that is none, as an unquoted word or path, is text."""
    try:
        parsed = tomllib.loads(f"value = {raw}")
    except tomllib.TOMLDecodeError:
        return raw
    return parsed["value"] if set(parsed) == {"value"} else raw


def _nested(parts: Sequence[str], value: Any) -> Tree:
    for part in reversed(parts):
        value = {part: value}
    return value


def _merge(below: Tree, above: Tree) -> Tree:
    """Both trees in one; where both have a value, the one from above."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _normalised(layer: Tree) -> Tree:
    """The layer with `parallel.tp` put into every role and "none" made None, so that layers merge field by field."""
    if isinstance(layer.get("parallel"), dict):
        layer = {**layer, "parallel": expand_roles(layer["parallel"])}
    for key, field in fields():
        if allows_none(field) and _lookup(layer, key.split(".")) == "none":
            layer = _merge(layer, _nested(key.split("."), None))
    return layer


def _preset_layer(given: Tree) -> Tree:
    name = _lookup(given, ("ppo", "preset"))
    if name is None:
        name = PpoConfig.model_fields["preset"].default
    layer: Tree = {}
    if isinstance(name, str) and name in PRESETS:
        for key, value in preset_values(name, has_ptx_data=bool(_lookup(given, ("data", "ptx")))).items():
            layer = _merge(layer, _nested(key.split("."), value))
    return layer


def _validate(tree: Tree, layers: Mapping[str, Tree]) -> RunConfig:
    """JSON mode, because there strict typing takes a list where a tuple is declared, as TOML has only lists."""
    try:
        return RunConfig.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        faults = [_fault(dict(item), layers) for item in error.errors()]
    raise ConfigError(_listed(list(dict.fromkeys(faults))))


def _fault(error: dict[str, Any], layers: Mapping[str, Tree]) -> str:
    """One of pydantic's complaints in our words. Alternatives of one field give the same text, so they appear once."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    path, field = _locate(error["loc"])
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    origin, value = next(
        ((name, found) for name, layer in layers.items() if (found := _lookup(layer, path)) is not None),
        ("", error["input"]),
    )
    given = f"{key} = {toml_value(value)}" + (f" ({origin})" if origin else "")
    topic = key.partition("[")[0]
    if error["type"] == "extra_forbidden":
        guess = nearest_key(key, _candidates(key, value))
        return f"{given}: unknown key; " + (f"did you mean {guess}?" if guess else "`ppomax help` lists the sections")
    if error["type"] == "missing":
        return f"{key} is missing; expected {expected(field.annotation) if field else 'a value'}"
    if field is None or (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
        return f"{given}: expected a section; set its fields, as in {key}.FIELD=VALUE (`ppomax help {key}` lists them)"
    return f"{given}: expected {expected(field.annotation, tuple(field.metadata))} (`ppomax help {topic}`)"


def _candidates(key: str, value: Any) -> list[str]:
    """What an unknown key can have meant: a field of the same row, a section, or any field."""
    if "[" in key:
        row = row_section(dict(fields())[key.partition("[")[0]])
        return [f"{key.rpartition('.')[0]}.{name}" for name in (row.model_fields if row else ())]
    if isinstance(value, dict):
        return [name for name, _ in sections()]
    return [*(f"parallel.{name}" for name in RoleLayout.model_fields), *(name for name, _ in fields())]


def _locate(loc: tuple[int | str, ...]) -> tuple[list[int | str], FieldInfo | None]:
    """The part of a pydantic location that names keys of the file, and the field there (None for an unknown key)."""
    path: list[int | str] = []
    section: Any = RunConfig
    field: FieldInfo | None = None
    for part in loc:
        if isinstance(part, int) and field is not None and row_section(field):
            section = row_section(field)
        elif isinstance(section, type) and issubclass(section, Section):
            field = section.model_fields.get(str(part))
            section = field.annotation if field else None
        else:
            break
        path.append(part)
    return path, field


def _lookup(tree: Any, path: Sequence[int | str]) -> Any:
    """The value at a path of keys and list positions, None where there is none."""
    for part in path:
        in_list = isinstance(tree, list) and isinstance(part, int) and part < len(tree)
        if not in_list and not (isinstance(tree, dict) and part in tree):
            return None
        tree = tree[part]
    return tree


def _raise_if(faults: Sequence[str]) -> None:
    if faults:
        raise ConfigError(_listed(faults))


def _listed(faults: Sequence[str]) -> str:
    return faults[0] if len(faults) == 1 else f"{len(faults)} faults:\n" + "\n".join(f"  - {fault}" for fault in faults)
