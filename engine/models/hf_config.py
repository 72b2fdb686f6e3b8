"""config.json of a Hugging Face folder, read into a ModelShape and written from one, without transformers.

Fields that a config.json leaves out have the defaults that transformers gives them. What the engine does not compute
(biases elsewhere than on q, k, v; sliding windows; experts; other rotary scalings) is refused here.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ppomax.engine.errors import CheckpointError
from ppomax.engine.models.shape import ModelShape, RopeScaling


@dataclass(frozen=True)
class Family:
    """What tells the dense Llama-like families apart. class_name: of transformers, before "ForCausalLM"."""

    class_name: str
    max_position_embeddings: int
    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    num_key_value_heads: int | None = None
    sliding_window: int | None = None


FAMILIES = {
    "llama": Family("Llama", 2048),
    "mistral": Family("Mistral", 131072, num_key_value_heads=8, sliding_window=4096),
    "qwen2": Family("Qwen2", 32768, qkv_bias=True, num_key_value_heads=32),
    "qwen3": Family("Qwen3", 32768, qk_norm=True, head_dim=128, num_key_value_heads=32),
}

# LlamaRewardModel is the class of the released reward models of "Secrets of RLHF".
SCALAR_CLASSES = ("ForSequenceClassification", "RewardModel")

ROPE_THETA = 10000.0  # of all four families

MOST_HEADS = 65536
"""More are no model: what is counted head by head would not end."""


def read_shape(folder: str) -> ModelShape:
    """The shape of the model in a Hugging Face folder; raises CheckpointError where the engine cannot run it."""
    config = _Config(Path(folder) / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        config.refuse(f"model_type {model_type!r} is not supported", f"expected one of {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    _refuse_unsupported(config, family)
    hidden_size, num_heads = config.size("hidden_size"), config.size("num_attention_heads")
    num_groups = config.size("num_key_value_heads", family.num_key_value_heads or num_heads, null=num_heads)
    if num_heads > MOST_HEADS:
        config.refuse(f"num_attention_heads is {num_heads}", f"expected at most {MOST_HEADS}")
    if num_heads % num_groups:
        config.refuse(
            f"num_attention_heads is {num_heads}", f"expected a multiple of num_key_value_heads, {num_groups}"
        )
    scalar = _is_scalar(config)
    return ModelShape(
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden_size,
        num_layers=config.size("num_hidden_layers"),
        num_heads=num_heads,
        num_query_groups=num_groups,
        head_dim=config.size("head_dim", family.head_dim or hidden_size // num_heads, null=hidden_size // num_heads),
        ffn_hidden_size=config.size("intermediate_size"),
        max_position_embeddings=config.size("max_position_embeddings", family.max_position_embeddings),
        rope_theta=_rope_theta(config),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)) and not scalar,
        scalar=scalar,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        family=model_type,
        rope_scaling=_rope_scaling(config),
    )


def config_json(
    shape: ModelShape, *, dtype: str, bos_id: int | None, eos_id: int | list[int] | None, pad_id: int | None
) -> dict[str, Any]:
    """What config.json says of a model of this shape, in the fields that transformers 4 and 5 both read."""
    family = FAMILIES[shape.family]
    config: dict[str, Any] = {
        "architectures": [family.class_name + (SCALAR_CLASSES[0] if shape.scalar else "ForCausalLM")],
        "model_type": shape.family,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_query_groups,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn_hidden_size,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": _rope_scaling_json(shape.rope_scaling),
        "tie_word_embeddings": shape.tie_embeddings and not shape.scalar,
        "torch_dtype": dtype,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
    }
    if family.sliding_window is not None:
        config["sliding_window"] = None
    if shape.scalar:
        config |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    return config


class _Config:
    """A config.json whose complaints name the file, the field, the value and what was expected."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.fields = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(
                f"cannot read {path}: {error.strerror}; expected a Hugging Face folder: config.json and safetensors"
            ) from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not valid JSON ({error}); copy the folder again") from error
        if not isinstance(self.fields, dict):
            raise CheckpointError(f"{path} holds no JSON object; copy the folder again")

    def refuse(self, fault: str, advice: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {fault}; {advice}")

    def get(self, name: str, default: Any = None) -> Any:
        return self.fields.get(name, default)

    def size(self, name: str, default: int | None = None, *, null: int | None = None) -> int:
        """A positive integer; default where the field is absent, null (or else default) where it is null."""
        value = self.get(name, default)
        if value is None:
            value = null if null is not None else default
        if type(value) is not int or value <= 0:
            self.refuse(f"{name} is {value!r}", "expected a positive integer")
        return value

    def number(self, name: str, default: float) -> float:
        return self.positive(name, self.get(name, default))

    def positive(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            self.refuse(f"{name} is {value!r}", "expected a positive number")
        return float(value)


def _is_scalar(config: _Config) -> bool:
    architectures = config.get("architectures") or ["ForCausalLM"]
    if not isinstance(architectures, list):
        config.refuse(f"architectures is {architectures!r}", "expected a list with the name of a class")
    name = str(architectures[0])
    if name.endswith("ForCausalLM"):
        return False
    if not name.endswith(SCALAR_CLASSES):
        config.refuse(
            f"architecture {name} is not supported", "expected ...ForCausalLM or ...ForSequenceClassification"
        )
    id2label = config.get("id2label") or {"0": "score"}
    if not isinstance(id2label, dict):
        config.refuse(f"id2label is {id2label!r}", "expected an object with one name")
    labels = config.get("num_labels", len(id2label))
    if labels != 1:
        config.refuse(f"{name} has {labels} labels", "expected 1: a reward model or critic gives one number per token")
    return True


def _refuse_unsupported(config: _Config, family: Family) -> None:
    advice = "the engine does not compute it; choose a model without it"
    for name in ("attention_bias", "mlp_bias", "num_experts", "num_local_experts", "quantization_config"):
        if config.get(name):
            config.refuse(f"{name} is {config.get(name)!r}", advice)
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        config.refuse(f"hidden_act is {config.get('hidden_act')!r}", "expected 'silu'")
    window = config.get("sliding_window", family.sliding_window)
    is_used = family.sliding_window is not None or bool(config.get("use_sliding_window"))
    longest = config.size("max_position_embeddings", family.max_position_embeddings)
    if is_used and window is not None and config.positive("sliding_window", window) < longest:
        config.refuse(
            f"attention looks back over sliding_window = {window} of {longest} positions",
            "the engine attends to all of them; choose a model without a sliding window",
        )


def _rope_parameters(config: _Config) -> dict[str, Any]:
    """transformers 5 has it all in rope_parameters; 4 has rope_theta and rope_scaling (with type or rope_type)."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, dict) or any(isinstance(value, dict) for value in parameters.values()):
        config.refuse(f"rope parameters are {parameters!r}", "expected one set of parameters for all layers")
    factor = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if factor not in (None, 1):
        config.refuse(f"partial_rotary_factor is {factor!r}", "the engine rotates whole heads")
    return parameters


def _rope_theta(config: _Config) -> float:
    theta = _rope_parameters(config).get("rope_theta", config.get("rope_theta", ROPE_THETA))
    return config.positive("rope_theta", theta)


def _rope_scaling(config: _Config) -> RopeScaling:
    parameters = _rope_parameters(config)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    wanted: dict[str, tuple[str, ...]] = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    }
    if not isinstance(kind, str) or kind not in wanted:
        config.refuse(f"rotary scaling of kind {kind!r} is not supported", f"expected one of {', '.join(wanted)}")
    factors: dict[str, Any] = {
        name: config.positive(f"rope parameter {name}", parameters.get(name)) for name in wanted[kind]
    }
    if kind != "llama3":
        return RopeScaling(kind, **factors)
    name = "original_max_position_embeddings"
    original = config.positive(name, parameters.get(name, config.get("max_position_embeddings")))
    return RopeScaling(kind, **factors, original_max_position_embeddings=int(original))


def _rope_scaling_json(scaling: RopeScaling) -> dict[str, Any] | None:
    if scaling.kind == "default":
        return None
    fields: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        fields |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    return fields
