"""`ppomax convert`: looks into Hugging Face folders."""

import argparse
from collections import Counter
from collections.abc import Sequence

import torch

from ppomax.engine.models.hf_config import read_shape
from ppomax.engine.models.hf_reader import SafetensorsReader


def main(argv: Sequence[str]) -> None:
    """Runs `ppomax convert ARGV...`."""
    parser = argparse.ArgumentParser(prog="ppomax convert", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="family, shape, number of parameters and dtypes of a folder")
    inspect.add_argument("folder", metavar="PATH", help="Hugging Face folder: config.json and safetensors")
    arguments = parser.parse_args(argv)
    print(describe(arguments.folder))


def describe(folder: str) -> str:
    """Family, shape, number of parameters and dtypes of a Hugging Face folder, one per line."""
    shape, reader = read_shape(folder), SafetensorsReader(folder)
    rope = shape.rope_scaling
    scaling = "" if rope.kind == "default" else f", scaling {rope.kind} by {rope.factor:g}"
    head = "scalar" if shape.scalar else f"vocabulary{', tied to the embedding' if shape.tie_embeddings else ''}"
    extras = [name for name, has in (("q, k, v biases", shape.qkv_bias), ("q, k norms", shape.qk_norm)) if has]
    attention = [
        f"{shape.num_heads} query heads",
        f"{shape.num_query_groups} key / value heads",
        f"head_dim {shape.head_dim}",
    ]
    rows = {
        "family": shape.family,
        "head": head,
        "parameters": f"{sum(torch.Size(size).numel() for size in reader.sizes.values()):,}",
        "tensors": ", ".join(f"{count} {dtype}" for dtype, count in sorted(Counter(reader.dtypes.values()).items())),
        "vocabulary": f"{shape.vocab_size}",
        "layers": f"{shape.num_layers}, hidden {shape.hidden_size}, feed-forward {shape.ffn_hidden_size}",
        "attention": ", ".join(attention + extras),
        "context": f"{shape.max_position_embeddings} tokens, rope_theta {shape.rope_theta:g}{scaling}",
    }
    return "\n".join(f"{name:<11} {value}" for name, value in rows.items())
