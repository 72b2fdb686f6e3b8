"""Where Megatron's checkpoints keep the parameters of a model, and how a layout of ranks cuts them into chunks.

The names, sizes and order of rows of parameters are those of hf_names.py, which this file adds the checkpoint's to.
"""

from dataclasses import dataclass

from ppomax.engine.models.hf_names import Recipe, parameter_names, recipe_of
from ppomax.engine.models.shape import ModelShape, check_split

FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""The names that Megatron's own specs give these weights in checkpoints."""


@dataclass(frozen=True)
class Split:
    """How many ranks a model is spread over; vpp: model chunks per pipeline rank."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1

    def check(self, shape: ModelShape) -> None:
        """Raises ConfigError unless the model can be split so."""
        check_split(shape, tp=self.tp, pp=self.pp, vpp=self.vpp)

    def stage_of(self, parameter: str, num_layers: int) -> int:
        """The pipeline rank that saves a parameter."""
        if parameter.startswith("decoder.layers."):
            return int(parameter.split(".")[2]) // (num_layers // (self.pp * self.vpp)) % self.pp
        return 0 if parameter.startswith("embedding.") else self.pp - 1


@dataclass(frozen=True)
class Share:
    """Rows and columns of a parameter that a tensor-parallel rank saves as one chunk."""

    tp_rank: int
    rows: slice
    columns: slice


def stored_key(parameter: str) -> tuple[str, int]:
    """Name of the checkpoint's tensor that holds a parameter, and the layer in it (0 where it has none)."""
    if not parameter.startswith("decoder.layers."):
        return parameter, 0
    number, name = parameter.removeprefix("decoder.layers.").split(".", 1)
    return f"decoder.layers.{FUSED_NORMS.get(name, name)}", int(number)


def saved_parameters(shape: ModelShape, *, extra_scalar_head: bool = False) -> dict[str, Recipe]:
    """Parameters of a whole model and their recipes for one rank. Of tied weights the embedding is saved alone.

    extra_scalar_head: beside a vocabulary head.
    """
    names = parameter_names(shape) + (["scalar_head.weight"] if extra_scalar_head else [])
    return {name: recipe_of(name, shape, tp=1) for name in names}


def stored_rows(parameter: str, recipe: Recipe, shape: ModelShape, tp: int) -> int:
    """Rows of a parameter in a checkpoint that tp ranks save. recipe: for one rank."""
    if is_vocabulary(parameter, shape):
        return shape.padded_vocab_size(tp)
    return sum(piece.rows for piece in recipe.pieces)


def is_vocabulary(parameter: str, shape: ModelShape) -> bool:
    """Whether its rows are tokens, to which padding may have been added."""
    return parameter.startswith("embedding.") or (parameter == "output_layer.weight" and not shape.scalar)


def shares(parameter: str, recipe: Recipe, num_rows: int, num_columns: int, tp: int) -> list[Share]:
    """The chunks of a parameter of these stored sizes under tensor parallelism."""
    every = slice(0, num_columns)
    if recipe.split == "none":
        return [Share(0, slice(0, num_rows), every)]
    if recipe.split == "columns":
        width = num_columns // tp
        return [Share(rank, slice(0, num_rows), slice(rank * width, (rank + 1) * width)) for rank in range(tp)]
    # Gate and up lie one behind the other, and each rank has a part of both.
    halves = len(recipe.sources) if parameter.endswith("mlp.linear_fc1.weight") else 1
    height = num_rows // (halves * tp)
    starts = [(rank, half * num_rows // halves + rank * height) for half in range(halves) for rank in range(tp)]
    return [Share(rank, slice(start, start + height), every) for rank, start in starts]
