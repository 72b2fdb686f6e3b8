"""`ppomax convert`: models and checkpoints between Hugging Face and Megatron; needs no GPU and no torchrun."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from ppomax.engine.checkpoint_state import STATE_FILE, read_state
from ppomax.engine.compare_models import compare_models
from ppomax.engine.conversion import has_tokenizer, hf_to_megatron, megatron_to_hf, reshard
from ppomax.engine.errors import CheckpointError, ConfigError
from ppomax.engine.models.hf_writer import MAX_FILE_BYTES
from ppomax.engine.models.megatron_names import Split
from ppomax.engine.models.stored_model import StoredModel, open_model
from ppomax.engine.weight_diff import make_diff, merge_diff
from ppomax.tools.inspect_model import describe, tensor_table

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main(argv: Sequence[str]) -> None:
    """Runs `ppomax convert ARGV...`. SIGTERM ends it as Ctrl-C does: what is half written is removed."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        _run(_parser().parse_args(argv))
    finally:
        signal.signal(signal.SIGTERM, previous)


def _run(arguments: argparse.Namespace) -> None:
    dtype = DTYPES.get(getattr(arguments, "dtype", None) or "")
    match arguments.command:
        case "inspect":
            for model in _models(arguments.path, arguments.role):
                print("\n".join([describe(model), *([tensor_table(model)] if arguments.tensors else [])]))
        case "hf-to-megatron":
            print(_done(hf_to_megatron(arguments.src, arguments.dst, split=_split(arguments), dtype=dtype), arguments))
        case "megatron-to-hf":
            model = megatron_to_hf(
                arguments.src,
                arguments.dst,
                role=arguments.role,
                dtype=dtype,
                tokenizer=arguments.tokenizer,
                max_file_bytes=_max_file_bytes(arguments.max_file_gb),
            )
            print(_done(model, arguments))
            if not has_tokenizer(Path(arguments.dst)):
                print("no tokenizer was found for it; to have one in the folder, convert again with --tokenizer PATH")
        case "reshard":
            reshard(arguments.src, arguments.dst, split=_split(arguments))
            print(f"wrote {arguments.dst}")
        case "verify":
            _verify(arguments.a, arguments.b, arguments.role, arguments.tolerance)
        case "make-diff":
            recovery = make_diff(arguments.raw, arguments.tuned, arguments.dst)
            exact = f"up to {recovery.largest:g} in {recovery.tensor}" if recovery.largest else "exactly"
            print(f"wrote {arguments.dst}; raw + diff gives back the tuned model {exact}")
        case "merge-diff":
            merge_diff(arguments.raw, arguments.diff, arguments.dst, dtype=dtype)
            print(f"wrote {arguments.dst}")


def _models(path: str, role: str | None) -> list[StoredModel]:
    """One model; of a training checkpoint without a role all of them."""
    if role is None and (Path(path) / STATE_FILE).is_file():
        return [open_model(path, name) for name in sorted(read_state(Path(path))["roles"])]
    return [open_model(path, role)]


def _done(model: StoredModel, arguments: argparse.Namespace) -> str:
    return f"wrote {arguments.dst}: {model.shape.family}, {model.shape.num_parameters():,} parameters"


def _split(arguments: argparse.Namespace) -> Split:
    sizes = {name: getattr(arguments, name) for name in ("tp", "pp", "vpp")}
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"--{name} {size}: expected 1 or more")
    return Split(**sizes)


def _max_file_bytes(gigabytes: float) -> int:
    if not 0 < gigabytes < float("inf"):
        raise ConfigError(f"--max-file-gb {gigabytes:g}: expected a number of gigabytes above 0")
    return int(gigabytes * 10**9)


def _verify(a: str, b: str, role: str | None, tolerance: float) -> None:
    """Prints a line per layer; raises CheckpointError where the models differ by more than the tolerance."""
    if not tolerance >= 0:
        raise ConfigError(f"--tolerance {tolerance:g}: expected 0 or more")
    has_roles = [(Path(path) / STATE_FILE).is_file() for path in (a, b)]
    if role is not None and not any(has_roles):
        raise ConfigError(f"--role {role}: neither {a} nor {b} is a training checkpoint")
    models = [open_model(path, role if has else None) for path, has in zip((a, b), has_roles, strict=True)]
    differences = compare_models(*models)
    for entry in differences:
        print(f"{entry.layer:<12} {entry.largest:<12.6g} {entry.tensor}")
    worst = max(differences, key=lambda entry: entry.largest)
    if worst.largest > tolerance:
        raise CheckpointError(
            f"{a} and {b} differ by {worst.largest:g} in {worst.tensor}, more than --tolerance {tolerance:g}"
        )
    print(f"largest difference {worst.largest:g} in {models[0].shape.num_parameters():,} parameters")


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are ConfigErrors, so that they leave by the same door as all others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\n{self.format_usage().strip()}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ppomax convert", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, *paths: tuple[str, str]) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        for path, meaning in paths:
            made.add_argument(path.lower(), metavar=path, help=meaning)
        return made

    model = "Hugging Face folder, Megatron checkpoint or step_N folder of a training run"
    new = "folder to write; must not exist"
    inspect = command("inspect", "format, family, shape, number of parameters and dtypes", ("PATH", model))
    inspect.add_argument("--tensors", action="store_true", help="also every tensor: name, dtype, shape")
    to_megatron = command(
        "hf-to-megatron", "Hugging Face to a distributed checkpoint", ("SRC", "Hugging Face folder"), ("DST", new)
    )
    to_hf = command(
        "megatron-to-hf",
        "a converted or training checkpoint to Hugging Face",
        ("SRC", "Megatron checkpoint or step_N folder of a training run"),
        ("DST", new),
    )
    again = command(
        "reshard",
        "rewrite a training checkpoint in the chunks of another layout; any layout loads it with or without",
        ("SRC", "step_N folder of a training run"),
        ("DST", new),
    )
    verify = command("verify", "largest difference of two models, per layer", ("A", model), ("B", model))
    verify.add_argument("--tolerance", type=float, default=0.0, help="largest |a - b| that is accepted (default 0)")
    folder = "Hugging Face folder"
    command(
        "make-diff",
        "what a tuned model adds to a public one",
        ("RAW", folder),
        ("TUNED", folder),
        ("DST", new),
    )
    merge = command(
        "merge-diff", "the tuned model from a public one and the diff", ("RAW", folder), ("DIFF", folder), ("DST", new)
    )
    for made in (inspect, to_hf, verify):
        made.add_argument(
            "--role", metavar="ROLE", help="of a training checkpoint: policy, critic or reward (inspect: default all)"
        )
    for made in (to_megatron, to_hf, merge):
        made.add_argument("--dtype", choices=DTYPES, help="type of the written weights (default: as they are)")
    for made in (to_megatron, again):
        for size, meaning in (("tp", "tensor"), ("pp", "pipeline"), ("vpp", "virtual pipeline")):
            text = f"{meaning}-parallel size that the chunks are cut for (default 1)"
            made.add_argument(f"--{size}", type=int, default=1, metavar="N", help=text)
    to_hf.add_argument("--tokenizer", metavar="PATH", help="folder or file (default: that of the folder or run)")
    gigabytes = MAX_FILE_BYTES / 10**9
    text = f"largest safetensors file (default {gigabytes:g})"
    to_hf.add_argument("--max-file-gb", type=float, default=gigabytes, metavar="GB", help=text)
    return parser
