"""The step delimiter that a process model has learned to judge at: config.json keeps it beside the weights, and whoever
uses the model takes it from there.
"""

from pathlib import Path
from typing import Any

from ppomax.engine.checkpoint_state import read_state
from ppomax.engine.config import RunConfig
from ppomax.engine.errors import CheckpointError, ConfigError
from ppomax.engine.models.side_files import STEP_DELIMITER, read_json


def with_learned_delimiter(config: RunConfig, folder: str) -> RunConfig:
    """The configuration with the delimiter of a process model where data.step_delimiter is not set. folder: of the
    model; empty for none. Raises ConfigError where it is set to another one.
    """
    learned = read_json(Path(folder) / "config.json").get(STEP_DELIMITER) if folder else None
    if learned is None:  # no process model, or one of somebody else's
        return config
    if not isinstance(learned, str) or not learned:
        raise CheckpointError(
            f"{folder}/config.json: {STEP_DELIMITER} is {learned!r}, expected text; copy the folder again"
        )
    data = config.data
    if "step_delimiter" in data.model_fields_set and data.step_delimiter != learned:
        raise ConfigError(
            f"data.step_delimiter is {data.step_delimiter!r}, but the process model {folder} learned to judge steps "
            f"that end with {learned!r}; remove data.step_delimiter, which then is the model's, or train a process "
            "model with the other one"
        )
    return config.model_copy(update={"data": data.model_copy(update={"step_delimiter": learned})})


def delimiter_to_keep(config: RunConfig, role: str) -> str | None:
    """What config.json of an export has to say of a role's model: None where that is no process model."""
    return config.data.step_delimiter if role == "reward" and config.reward.labels == "steps" else None


def delimiter_of_checkpoint(step: Path, role: str) -> str | None:
    """As `delimiter_to_keep`, of a role of a training checkpoint."""
    config: Any = read_state(step).get("config")
    try:
        is_process = role == "reward" and config["reward"]["labels"] == "steps"
        return config["data"]["step_delimiter"] if is_process else None
    except (KeyError, TypeError):  # written before configurations were part of it
        return None
