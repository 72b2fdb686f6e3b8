"""The shape of a Llama-family model: what is needed to build it, whatever format its weights come in."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ppomax.engine.config_models import ArchitectureConfig
from ppomax.engine.errors import ConfigError


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary frequencies: kind "default", "linear" or "llama3" with Hugging Face's parameter names."""

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelShape:
    """Sizes as in Hugging Face's LlamaConfig; vocab_size without padding; scalar: one value per token instead of
    logits.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    max_position_embeddings: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    scalar: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    family: str = "llama"
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)

    def padded_vocab_size(self, tp: int) -> int:
        """The vocabulary rounded up to a multiple of tp; padding rows are masked in every softmax and dropped on
        export.
        """
        return -(-self.vocab_size // tp) * tp

    def num_parameters(self) -> int:
        """Unique parameters, vocabulary padding left out."""
        h, hd = self.hidden_size, self.head_dim
        attention = h * hd * (2 * self.num_heads + 2 * self.num_query_groups)
        if self.qkv_bias:
            attention += hd * (self.num_heads + 2 * self.num_query_groups)
        if self.qk_norm:
            attention += 2 * hd
        layer = attention + 3 * h * self.ffn_hidden_size + 2 * h
        embedding = self.vocab_size * h
        head = h if self.scalar else (0 if self.tie_embeddings else embedding)
        return self.num_layers * layer + h + embedding + head


def shape_from_init(init: ArchitectureConfig, vocab_size: int, *, scalar: bool = False) -> ModelShape:
    """The shape of a model that starts from random weights; vocab_size is the tokenizer's, used where init names
    none.
    """
    if init.vocab_size is not None and init.vocab_size < vocab_size:
        raise ConfigError(
            f"model.init.vocab_size {init.vocab_size} is smaller than the tokenizer's "
            f"{vocab_size} tokens; leave it unset"
        )
    if init.head_dim is None and init.hidden_size % init.num_heads:
        raise ConfigError(
            f"model.init.hidden_size {init.hidden_size} is not divisible by model.init.num_heads {init.num_heads}; "
            "set model.init.head_dim or change one of them"
        )
    head_dim = init.head_dim or init.hidden_size // init.num_heads
    if head_dim % 2:
        raise ConfigError(
            f"heads of {head_dim} dimensions: rotary embeddings need an even number; "
            "set model.init.head_dim, or another model.init.hidden_size or num_heads"
        )
    if init.num_heads % init.num_query_groups:
        raise ConfigError(
            f"model.init.num_heads {init.num_heads} is not a multiple of "
            f"model.init.num_query_groups {init.num_query_groups}"
        )
    return ModelShape(
        vocab_size=init.vocab_size or vocab_size,
        hidden_size=init.hidden_size,
        num_layers=init.num_layers,
        num_heads=init.num_heads,
        num_query_groups=init.num_query_groups,
        head_dim=head_dim,
        ffn_hidden_size=init.ffn_hidden_size,
        max_position_embeddings=init.max_position_embeddings,
        rope_theta=init.rope_theta,
        norm_eps=init.norm_eps,
        tie_embeddings=init.tie_embeddings and not scalar,
        scalar=scalar,
    )


def layers_per_stage(num_layers: int, *, pp: int, first: int | None = None, last: int | None = None) -> list[int]:
    """Layers of each pipeline stage. first, last: those of the first and the last; the others share the rest evenly.

    Raises ConfigError where they cannot.
    """
    given = {number: count for number, count in ((0, first), (pp - 1, last)) if count is not None}
    rest, num_left = num_layers - sum(given.values()), pp - len(given)
    if (first is None and last is None) and rest % pp:
        raise ConfigError(
            f"the model's {num_layers} layers are not divisible by pp {pp}; choose a pp that divides them, or set "
            "first_stage_layers or last_stage_layers"
        )
    if rest < num_left or (rest > 0 and num_left == 0) or (num_left and rest % num_left):
        raise ConfigError(
            f"the model's {num_layers} layers cannot be split over pp {pp} stages with first_stage_layers {first} and "
            f"last_stage_layers {last}: {rest} are left for {num_left} other stages, each of which needs as many; "
            "choose other numbers"
        )
    return [given.get(number, rest // max(1, num_left)) for number in range(pp)]


def stage_of_layer(layer: int, stages: Sequence[int], vpp: int) -> int:
    """The pipeline stage that holds a layer, counted from 0. stages: layers of each; vpp: chunks of each."""
    chunks = [number for _ in range(vpp) for number, count in enumerate(stages) for _ in range(count // vpp)]
    return chunks[layer]


def check_split(
    shape: ModelShape,
    *,
    tp: int,
    pp: int,
    vpp: int,
    first_stage_layers: int | None = None,
    last_stage_layers: int | None = None,
) -> None:
    """Raises ConfigError unless the model's heads, feed-forward width and layers can be split over tp and pp ranks.

    vpp: model chunks per pipeline rank.
    """
    faults = [
        f"{name} {size} of the model is not divisible by tp {tp}; choose a tp that divides it"
        for name, size in (("num_heads", shape.num_heads), ("ffn_hidden_size", shape.ffn_hidden_size))
        if size % tp
    ]
    if max(shape.num_query_groups, tp) % min(shape.num_query_groups, tp):
        faults.append(f"tp {tp} and the model's {shape.num_query_groups} key / value heads: one must divide the other")
    try:
        stages = layers_per_stage(shape.num_layers, pp=pp, first=first_stage_layers, last=last_stage_layers)
    except ConfigError as error:
        faults.append(str(error))
    else:
        uneven = sorted({count for count in stages if count % vpp})
        if uneven:
            counts = " or ".join(map(str, uneven))
            faults.append(
                f"the model's {shape.num_layers} layers cannot be split into pp {pp} * vpp {vpp} = {pp * vpp} chunks: "
                f"choose a vpp that divides the {counts} layers of a pipeline stage"
            )
    if faults:
        raise ConfigError("\n".join(faults))
