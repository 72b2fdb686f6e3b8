"""Which Hugging Face tensors a Megatron parameter is made of, and which parts of them each tensor-parallel rank has.

One description serves both directions. A parameter is a stack of pieces: runs of consecutive rows of its Hugging Face
tensors. The ranks of a tensor-parallel group hold equal shares of that stack. Loading cuts a rank's share out of the
tensors; exporting deals the whole stack back to them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ppomax.engine.models.shape import ModelShape

EMBEDDING = "model.embed_tokens.weight"
VOCABULARY_HEAD = "lm_head.weight"
SCALAR_HEAD = "score.weight"
RELEASED_SCALAR_HEAD = "reward_head.weight"
"""The scalar head under the name of the released reward models of "Secrets of RLHF"."""

PADDING = -1
"""Source of the rows that pad the vocabulary: zeros, dropped on export."""


@dataclass(frozen=True)
class Piece:
    """The next `rows` rows of Hugging Face tensor number `source` (or of PADDING)."""

    source: int
    rows: int


@dataclass(frozen=True)
class Recipe:
    """How a Megatron parameter is made of the Hugging Face tensors `sources`.

    pieces: the stack along dimension 0 that all tensor-parallel ranks hold together.
    split: each rank has an equal share of the stack's rows, or of its columns, or all of it.
    """

    sources: tuple[str, ...]
    pieces: tuple[Piece, ...]
    split: Literal["rows", "columns", "none"]


@dataclass(frozen=True)
class RowRange:
    """Rows start..stop of a source."""

    source: int
    start: int
    stop: int


def weight_sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name and size of every tensor of a Hugging Face folder with a model of this shape, in file order."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    query, key = shape.num_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key, hidden),
        "self_attn.v_proj.weight": (key, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    if shape.qkv_bias:
        layer |= {f"self_attn.{x}_proj.bias": (size,) for x, size in (("q", query), ("k", key), ("v", key))}
    if shape.qk_norm:
        layer |= {f"self_attn.{x}_norm.weight": (shape.head_dim,) for x in "qk"}
    sizes: dict[str, tuple[int, ...]] = {EMBEDDING: (shape.vocab_size, hidden)}
    for number in range(shape.num_layers):
        sizes |= {f"model.layers.{number}.{name}": size for name, size in layer.items()}
    sizes["model.norm.weight"] = (hidden,)
    if shape.scalar:
        sizes[SCALAR_HEAD] = (1, hidden)
    elif not shape.tie_embeddings:
        sizes[VOCABULARY_HEAD] = (shape.vocab_size, hidden)
    return sizes


def parameter_names(shape: ModelShape) -> list[str]:
    """The Megatron parameters that hold the tensors of `weight_sizes`, layers numbered over all pipeline stages."""
    layer = [
        "input_layernorm.weight",
        "self_attention.linear_qkv.weight",
        *(["self_attention.linear_qkv.bias"] if shape.qkv_bias else []),
        *(["self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"] if shape.qk_norm else []),
        "self_attention.linear_proj.weight",
        "pre_mlp_layernorm.weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    ]
    names = ["embedding.word_embeddings.weight"]
    names += [f"decoder.layers.{number}.{name}" for number in range(shape.num_layers) for name in layer]
    names.append("decoder.final_layernorm.weight")
    if shape.scalar or not shape.tie_embeddings:
        names.append("output_layer.weight")
    return names


def recipe_of(parameter: str, shape: ModelShape, tp: int) -> Recipe:
    """The recipe of a Megatron parameter whose layer number, if any, counts over all pipeline stages.

    A "scalar_head.weight" beside a vocabulary head is made as the head of a scalar model is.
    """
    if parameter.startswith("decoder.layers."):
        number, name = parameter.removeprefix("decoder.layers.").split(".", 1)
        return _layer_recipe(name, f"model.layers.{number}.", shape, tp)
    vocabulary = (Piece(0, shape.vocab_size), Piece(PADDING, shape.padded_vocab_size(tp) - shape.vocab_size))
    match parameter:
        case "embedding.word_embeddings.weight":
            return Recipe((EMBEDDING,), vocabulary, "rows")
        case "decoder.final_layernorm.weight":
            return _whole("model.norm.weight", shape.hidden_size)
        case "output_layer.weight" if not shape.scalar:
            # With tied embeddings this is the last pipeline stage's copy of the embedding.
            return Recipe((EMBEDDING if shape.tie_embeddings else VOCABULARY_HEAD,), vocabulary, "rows")
        case "output_layer.weight" | "scalar_head.weight":
            return _whole(SCALAR_HEAD, 1)
    raise KeyError(f"no Hugging Face tensors are known for the parameter {parameter}")


def _layer_recipe(name: str, prefix: str, shape: ModelShape, tp: int) -> Recipe:
    heads_per_group = shape.num_heads // shape.num_query_groups
    match name:
        case "input_layernorm.weight":
            return _whole(prefix + "input_layernorm.weight", shape.hidden_size)
        case "pre_mlp_layernorm.weight":
            return _whole(prefix + "post_attention_layernorm.weight", shape.hidden_size)
        case "self_attention.q_layernorm.weight" | "self_attention.k_layernorm.weight":
            return _whole(f"{prefix}self_attn.{name.split('.')[1][0]}_norm.weight", shape.head_dim)
        case "self_attention.linear_qkv.weight" | "self_attention.linear_qkv.bias":
            kind = name.rsplit(".", 1)[1]
            # Megatron keeps a group's query heads, key head and value head together.
            group = (Piece(0, heads_per_group * shape.head_dim), Piece(1, shape.head_dim), Piece(2, shape.head_dim))
            sources = tuple(f"{prefix}self_attn.{x}_proj.{kind}" for x in "qkv")
            return Recipe(sources, group * shape.num_query_groups, "rows")
        case "self_attention.linear_proj.weight":
            return Recipe((prefix + "self_attn.o_proj.weight",), (Piece(0, shape.hidden_size),), "columns")
        case "mlp.linear_fc1.weight":
            # Every rank has a gate and an up half of its own.
            rank = (Piece(0, shape.ffn_hidden_size // tp), Piece(1, shape.ffn_hidden_size // tp))
            return Recipe((prefix + "mlp.gate_proj.weight", prefix + "mlp.up_proj.weight"), rank * tp, "rows")
        case "mlp.linear_fc2.weight":
            return Recipe((prefix + "mlp.down_proj.weight",), (Piece(0, shape.hidden_size),), "columns")
    raise KeyError(f"no Hugging Face tensors are known for the parameter {name} of a layer")


def _whole(source: str, rows: int) -> Recipe:
    return Recipe((source,), (Piece(0, rows),), "none")


def local_rows(recipe: Recipe, tp: int, tp_rank: int) -> list[RowRange]:
    """The rows that a tensor-parallel rank stacks to make its share of the parameter (all, unless rows are split)."""
    total = sum(piece.rows for piece in recipe.pieces)
    first, last = 0, total
    if recipe.split == "rows":
        first, last = tp_rank * total // tp, (tp_rank + 1) * total // tp
    return row_ranges(recipe, first, last)


def row_ranges(recipe: Recipe, first: int, last: int) -> list[RowRange]:
    """Rows first..last of a parameter that is not split, as rows of its sources."""
    ranges, offset = [], 0
    taken = dict.fromkeys(range(PADDING, len(recipe.sources)), 0)
    for piece in recipe.pieces:
        start, stop = max(first - offset, 0), min(last - offset, piece.rows)
        if start < stop:
            ranges.append(RowRange(piece.source, taken[piece.source] + start, taken[piece.source] + stop))
        offset += piece.rows
        taken[piece.source] += piece.rows
    return ranges


def local_columns(recipe: Recipe, num_columns: int, tp: int, tp_rank: int) -> slice:
    """The columns of every row that one tensor-parallel rank has."""
    if recipe.split != "columns":
        return slice(None)
    return slice(tp_rank * num_columns // tp, (tp_rank + 1) * num_columns // tp)


def merge_shares(recipe: Recipe, shares: Sequence[Tensor]) -> dict[str, Tensor]:
    """The Hugging Face tensors of a parameter from the shares of all tensor-parallel ranks (one share if not split).

    The results are contiguous copies. Vocabulary padding is dropped.
    """
    stack = torch.cat(list(shares), dim=1 if recipe.split == "columns" else 0)
    rows: list[list[Tensor]] = [[] for _ in recipe.sources]
    for piece, part in zip(recipe.pieces, stack.split([piece.rows for piece in recipe.pieces]), strict=True):
        if piece.source != PADDING:
            rows[piece.source].append(part)
    return {name: torch.cat(parts) for name, parts in zip(recipe.sources, rows, strict=True)}
