"""What a user would pick instead, beside ours in one run: `make bench-peers`.

    python -m ppomax.tools.bench_beside [--trl PYTHON] [--only PART ...] [--iterations N] [--output FOLDER]

ppo: whole iterations in TRL's trainer, which needs an environment of its own. rollout: transformers' `generate` and
continuous batching, on a CPU (bench_rollout.py). losses: eager PyTorch, torch.compile and the libraries that are
installed (bench_kernels.py). Each part is a benchmark of its own, whose report lies in a folder of its name; README.md
has the ratios. The report goes to docs/benchmarks/<date>-peers-<device>/.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ppomax.tools.bench_kernels import ROOT, commit, device_name, folder_name
from ppomax.tools.bench_peers import versions
from ppomax.tools.bench_report import OURS

LOSSES = ("policy_loss", "value_loss", "linear_policy_loss", "value_head_loss", "experience")


@dataclass(frozen=True)
class Ratio:
    """time of the peer / time of ours, in the same run."""

    part: str
    what: str
    peer: str
    ratio: float


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ppomax.tools.bench_beside", description=__doc__)
    parser.add_argument(
        "--trl", metavar="PYTHON", help="of an environment with trl==1.12.0; without it ppo is left out"
    )
    parser.add_argument("--only", nargs="+", choices=[*PARTS], default=[*PARTS], help="default: all")
    parser.add_argument("--iterations", type=int, default=5, help="turns of ppo and of rollout (default 5)")
    parser.add_argument("--output", type=Path, help="folder of the report")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    environment = {
        "device": device_name(device),
        "versions": versions(),
        "command": " ".join(["python -m ppomax.tools.bench_beside", *(argv if argv is not None else sys.argv[1:])]),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    output = arguments.output or ROOT / "docs/benchmarks" / folder_name(environment).replace("-kernels-", "-peers-")
    found: list[Ratio] = []
    for name in arguments.only:
        if name == "ppo" and not arguments.trl:
            print("ppo: left out, --trl names no Python that has TRL")
            continue
        found += run_part(name, output / name, arguments)
    write(output, found, environment)


def run_part(name: str, folder: Path, arguments: argparse.Namespace) -> list[Ratio]:
    """The ratios of one part, after its benchmark."""
    part = PARTS[name]
    # Its report has the command: without the folders of this machine.
    command = [sys.executable, "-m", *part.command(arguments), "--output", os.path.relpath(folder)]
    subprocess.run(command, check=True)
    return list(part.ratios(json.loads((folder / "results.json").read_text())))


def _ppo(content: dict[str, Any]) -> Iterator[Ratio]:
    for result in content["results"]:
        yield Ratio("ppo", f"iteration, case {result['case']}", "TRL", result["trl / ours"])


def _rollout(content: dict[str, Any]) -> Iterator[Ratio]:
    for row in content["rows"]:
        if row.get("what", "").startswith("transformers"):
            threads = f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
            yield Ratio("rollout", f"{row['model']}, {threads}", row["what"], row["time / ours"])


def _losses(content: dict[str, Any]) -> Iterator[Ratio]:
    for row in content["rows"]:
        if row["ratio"] is not None and row["version"] != OURS:
            yield Ratio("losses", f"{row['op']} {row['case']}, {row['part']}", row["version"], row["ratio"])


@dataclass(frozen=True)
class Part:
    """command: module and arguments. ratios: from its results.json."""

    command: Callable[[argparse.Namespace], list[str]]
    ratios: Callable[[dict[str, Any]], Iterator[Ratio]]


PARTS = {
    "ppo": Part(
        lambda given: ["ppomax.tools.bench_ppo", "--trl", given.trl, "--iterations", str(given.iterations)], _ppo
    ),
    "rollout": Part(lambda given: ["ppomax.tools.bench_rollout", "--repeats", str(given.iterations)], _rollout),
    "losses": Part(
        lambda given: ["ppomax.tools.bench_kernels", "--skip-tests", "--compile", "--only", *LOSSES], _losses
    ),
}


def write(folder: Path, ratios: Sequence[Ratio], environment: dict[str, Any]) -> None:
    """README.md and results.json, and the table on standard output."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment, "ratios": [asdict(one) for one in ratios]}
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    names = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    table = ["| part | what | peer | time / ours |", "|---|---|---|---|"]
    table += [f"| {one.part} | {one.what} | {one.peer} | {one.ratio:.2f} |" for one in ratios]
    parts = ", ".join(f"[{part}]({part}/README.md)" for part in dict.fromkeys(one.part for one in ratios))
    text = [
        f"# Peers beside ours on {environment['device']}",
        "",
        f"`{environment['command']}`, commit {environment['commit']}, {environment['date']}; {names}.",
        "",
        f"Time of the peer over ours, in the same run: above 1 ours is faster. Details: {parts}.",
        "",
        *table,
        "",
    ]
    (folder / "README.md").write_text("\n".join(text))
    print("\n".join(table))
    print(f"wrote {folder}/README.md and results.json")


if __name__ == "__main__":
    main()
