"""What `--dry-run` checks beyond the configuration: that tokenizer and data can be read and the models be split."""

from ppomax.engine.config import RunConfig
from ppomax.engine.config_checks import MODELS_READ
from ppomax.engine.data.chat import make_template
from ppomax.engine.data.datasets import load_dialogues, load_pairs, load_prompts
from ppomax.engine.data.tokenizer import load_tokenizer
from ppomax.engine.models.hf_config import read_shape
from ppomax.engine.models.shape import check_split


def check_inputs(config: RunConfig, command: str) -> list[str]:
    """Reads every data file of the stage as the stage would; returns one line per data set. No ranks, no weights.

    Raises the DataError, ConfigError or CheckpointError that the stage itself would end with.
    """
    data, model = config.data, config.model
    template = make_template(data, load_tokenizer(model.tokenizer or model.policy or model.reward))
    limit = data.max_length - config.sampling.max_new_tokens
    lines = []
    for key, sources in (("train", data.train), ("eval", data.eval), ("ptx", data.ptx if command == "ppo" else ())):
        if not sources:
            continue
        if command == "sft" or key == "ptx":
            summary = load_dialogues(data, sources, template).summary()
        elif command == "reward":
            summary = load_pairs(data, sources, template).summary()
        else:
            summary = load_prompts(data, sources, template, max_prompt_tokens=limit).summary()
        lines.append(f"data.{key}: {summary}")
    for role in MODELS_READ[command]:
        folder = getattr(model, role)
        if folder:
            layout = getattr(config.parallel, role)
            shape = read_shape(folder)
            check_split(shape, tp=layout.tp, pp=layout.pp)
            lines.append(f"model.{role}: {shape.family}, {shape.num_parameters():,} parameters, {folder}")
    return lines
