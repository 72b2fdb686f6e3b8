"""What a model folder holds, in lines for people."""

from collections import Counter

import torch

from ppomax.engine.models.distributed_checkpoint import OPTIMIZER
from ppomax.engine.models.megatron_reader import MegatronReader
from ppomax.engine.models.stored_model import StoredModel


def describe(model: StoredModel) -> str:
    """Format, family, head, number of parameters, dtypes and shape, one per line."""
    shape, weights = model.shape, model.weights
    rope = shape.rope_scaling
    scaling = "" if rope.kind == "default" else f", scaling {rope.kind} by {rope.factor:g}"
    head = "scalar" if shape.scalar else f"vocabulary{', tied to the embedding' if shape.tie_embeddings else ''}"
    extras = [name for name, has in (("q, k, v biases", shape.qkv_bias), ("q, k norms", shape.qk_norm)) if has]
    attention = [
        f"{shape.num_heads} query heads",
        f"{shape.num_query_groups} key / value heads",
        f"head_dim {shape.head_dim}",
    ]
    dtypes = Counter(str(weights.dtypes[name]).removeprefix("torch.") for name in model.names.values())
    rows = {
        "format": _format(model),
        "family": shape.family,
        "head": head,
        "parameters": f"{sum(torch.Size(weights.sizes[name]).numel() for name in model.names.values()):,}",
        "tensors": ", ".join(f"{count} {dtype}" for dtype, count in sorted(dtypes.items())),
        "vocabulary": f"{shape.vocab_size}",
        "layers": f"{shape.num_layers}, hidden {shape.hidden_size}, feed-forward {shape.ffn_hidden_size}",
        "attention": ", ".join(attention + extras),
        "context": f"{shape.max_position_embeddings} tokens, rope_theta {shape.rope_theta:g}{scaling}",
    }
    return "\n".join(f"{name:<11} {value}" for name, value in rows.items())


def tensor_table(model: StoredModel) -> str:
    """Name, dtype and shape of every tensor under its Hugging Face name."""
    width = max(map(len, model.names))
    rows = [(name, model.weights.dtypes[found], model.weights.sizes[found]) for name, found in model.names.items()]
    return "\n".join(
        f"{name:<{width}}  {str(dtype).removeprefix('torch.'):<8}  {list(size)}" for name, dtype, size in rows
    )


def _format(model: StoredModel) -> str:
    if not isinstance(model.weights, MegatronReader):
        return "Hugging Face"
    tensors = model.weights.checkpoint.tensors
    num_chunks = sum(len(tensor.chunks) for tensor in tensors.values())
    optimizer = " with optimizer" if any(key.startswith(OPTIMIZER) for key in tensors) else ""
    origin = f", role {model.folder.name} of {model.step.name}{optimizer}" if model.step else ""
    return f"Megatron distributed checkpoint{origin}, {num_chunks} chunks"
