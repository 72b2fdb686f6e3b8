"""What a run's configuration changes: against its preset and the defaults, and against other runs."""

import tomllib
from collections.abc import Sequence
from typing import Any

from ppomax.engine.config_file import load_config, to_toml
from ppomax.engine.config_help import fields, toml_value
from ppomax.engine.errors import ConfigError

PLACES = ("train.output",)
"""Differs in every run and says nothing."""
PRESET_STAGES = ("critic", "ppo")
MISSING = "(none)"


def config_rows(configs: Sequence[dict[str, Any] | None], commands: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each field in which a run leaves its baseline or differs from the other runs: {key, base, values,
    changed: by run, differs: the runs are not equal}; values are TOML. configs: config.toml of each run, or None.
    """
    flat = [_flat(config) if config is not None else {} for config in configs]
    bases = [_baseline(config, command) for config, command in zip(configs, commands, strict=True)]
    order = {key: number for number, (key, _) in enumerate(fields())}
    keys = sorted({key for one in flat for key in one}, key=lambda key: (order.get(key, len(order)), key))
    rows = []
    for key in keys:
        if key in PLACES:
            continue
        values = [one.get(key, MISSING) for one in flat]
        known = [base.get(key, MISSING) for base in bases]
        is_read = [config is not None for config in configs]
        changed = [a != b for a, b in zip(values, known, strict=True)]
        read = {value for value, here in zip(values, is_read, strict=True) if here}
        if len(read) > 1 or any(change and here for change, here in zip(changed, is_read, strict=True)):
            rows.append({"key": key, "base": known, "values": values, "changed": changed, "differs": len(read) > 1})
    return rows


def preset_of(config: dict[str, Any] | None, command: str) -> str:
    """What the run is compared with, in words."""
    section = (config or {}).get("ppo")
    name = section.get("preset") if isinstance(section, dict) else None
    return f"preset {name} and defaults" if command in PRESET_STAGES and isinstance(name, str) else "defaults"


def _baseline(config: dict[str, Any] | None, command: str) -> dict[str, str]:
    """Every field as the preset and the defaults set it for this stage."""
    overrides = []
    section, data = (config or {}).get("ppo"), (config or {}).get("data")
    if command in PRESET_STAGES and isinstance(section, dict):
        overrides.append(f"ppo.preset={toml_value(section.get('preset', 'ppo_max'))}")
    if isinstance(data, dict) and data.get("ptx"):
        overrides.append(f"data.ptx={toml_value(data['ptx'])}")  # ppo_max sets ppo.ptx_coef by it
    stage = command if command in ("sft", "reward", "critic", "ppo", "evaluate") else "sft"
    try:
        base = load_config(None, overrides, command=stage, for_planning=True)
    except ConfigError:
        base = load_config(None, [], command=stage, for_planning=True)
    values = _flat(tomllib.loads(to_toml(base)))
    return {**values, "data.ptx": "[]"} if "data.ptx" in values else values


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """{dotted key: value as TOML}."""
    values: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            values |= _flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = toml_value(value)
    return values
