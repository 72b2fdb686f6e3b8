"""What is checked beyond the configuration: the models before every stage, tokenizer and data for `--dry-run`."""

from ppomax.engine.config import RunConfig
from ppomax.engine.config_checks import MODELS_READ
from ppomax.engine.data.chat import make_template
from ppomax.engine.data.datasets import load_dialogues, load_pairs, load_prompts, load_solutions
from ppomax.engine.data.tokenizer import load_tokenizer
from ppomax.engine.errors import DoesNotFitError
from ppomax.engine.models.hf_config import read_shape
from ppomax.engine.models.shape import check_split
from ppomax.engine.plan.run import plan_run
from ppomax.engine.plan.summary import summary_lines


def check_inputs(config: RunConfig, command: str) -> list[str]:
    """Reads every data file of the stage as the stage would; returns one line per data set. No ranks, no weights.

    Raises the DataError, ConfigError or CheckpointError that the stage itself would end with.
    """
    data = config.data
    template = make_template(data, load_tokenizer(_tokenizer(config)))
    limit = data.max_length - config.sampling.max_new_tokens
    lines = []
    for key, sources in (("train", data.train), ("eval", data.eval), ("ptx", data.ptx if command == "ppo" else ())):
        if not sources:
            continue
        if command == "sft" or key == "ptx":
            summary = load_dialogues(data, sources, template).summary()
        elif command == "reward" and config.reward.labels == "steps":
            summary = load_solutions(data, sources, template).summary()
        elif command == "reward":
            summary = load_pairs(data, sources, template).summary()
        else:
            summary = load_prompts(data, sources, template, max_prompt_tokens=limit).summary()
        lines.append(f"data.{key}: {summary}")
    return lines


def check_models(config: RunConfig, command: str) -> list[str]:
    """Reads the config.json of every model folder of the stage; returns one line per model. No ranks, no weights.

    Raises CheckpointError for one that the engine cannot run, ConfigError where its layout cannot split it, and
    DoesNotFitError where its context is shorter than data.max_length: it has learned no positions beyond.
    """
    lines = []
    for role in MODELS_READ[command]:
        folder = getattr(config.model, role)
        if not folder:
            continue
        layout = getattr(config.parallel, "reward" if command == "reward" or role == "process" else role)
        shape = read_shape(folder)
        check_split(
            shape,
            tp=layout.tp,
            pp=layout.pp,
            vpp=layout.vpp,
            first_stage_layers=layout.first_stage_layers,
            last_stage_layers=layout.last_stage_layers,
        )
        if shape.max_position_embeddings < config.data.max_length:
            raise DoesNotFitError(
                f"data.max_length {config.data.max_length} does not fit the context of model.{role} = {folder!r}, "
                f"{shape.max_position_embeddings} tokens (max_position_embeddings); "
                f"set data.max_length to at most {shape.max_position_embeddings}"
            )
        lines.append(f"model.{role}: {shape.family}, {shape.num_parameters():,} parameters, {folder}")
    return lines


def check_memory(config: RunConfig, command: str, world_size: int) -> list[str]:
    """The plan of the stage in a few lines. Raises DoesNotFitError where a GPU of this machine has less memory."""
    return summary_lines(
        plan_run(config, command, world_size, vocab_size=lambda: load_tokenizer(_tokenizer(config)).vocab_size)
    )


def _tokenizer(config: RunConfig) -> str:
    return config.model.tokenizer or config.model.policy or config.model.reward
