"""Compiles every Triton kernel of kernels/ at its production sizes, without a GPU, and judges the result: `make aot`.

    python -m ppomax.tools.aot_kernels [--only OP ...] [--arch sm_90 sm_80] [--output FOLDER]

The calls are those of kernel_shapes.PRODUCTION. A binary fails for registers kept in memory, shared memory that a GPU
does not have, float64 arithmetic, atomics, loads narrower than 16 bytes, products that no tensor core computes and
grids beyond the limits; exceptions stand below, each with its reason. Exit code 1 when something fails.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

from ppomax.kernels import dispatch
from ppomax.kernels.interpreter_triton import is_interpreted
from ppomax.tools.compile_triton import (
    SHARED_LIMIT,
    TARGETS,
    Facts,
    Launch,
    compile_for,
    facts_of,
    kernels_of,
    name_of,
    recorded,
)
from ppomax.tools.kernel_inputs import Case, Maker, run
from ppomax.tools.kernel_shapes import PRODUCTION

GRID_LIMIT = 65535
"""Of axes 1 and 2."""

SPILLS_ALLOWED: dict[str, str] = {}
MOMENTS = "moments are summed in float64, a few operations a token: a large mean must not hide the variance"
FLOAT64_ALLOWED: dict[str, str] = {
    "experience._experience_kernel": MOMENTS,
    "whiten._moments_kernel": MOMENTS,
    "whiten._merge_parts_kernel": MOMENTS,
    "whiten._whiten_kernel": "reads the moments, once per program",
    "policy_loss._policy_loss_kernel": "reads the moments that advantages are whitened by, once per program",
}
PACKED = "packed rows begin anywhere, so that nothing wider than an entry is aligned"
NARROW_ALLOWED: dict[str, str] = {
    "experience._experience_kernel packed": PACKED,
    "gae._gae_kernel packed": PACKED,
    "token_rewards._token_rewards_kernel packed": PACKED,
    "sampling._draw_kernel bf16": "4 entries a thread, 8 bytes in bf16: twice as many spill",
    "whiten._merge_parts_kernel": "reads three numbers a row of the batch",
    "logprobs._combine_kernel": "folds 16 bytes a row and shard, next to rows of 64 KB and more",
    "sampling._fold_kernel": "folds a few records per request",
    "partial_sums._sum_partials_kernel": "adds a few hundred numbers in one program",
}
IEEE = "fp32 products are exact to fp32, which those of tensor cores (TF32) are not"
NO_TENSOR_CORE_ALLOWED: dict[str, str] = {
    "paged_attention._decode_kernel fp32": IEEE,
    "paged_attention._prefill_kernel fp32": IEEE,
}
"""Per kernel (`<op>.<kernel>`), or per kernel and word in the names of its calls: why it may."""


@dataclass(frozen=True)
class Binary:
    """A launch compiled for one architecture, and what is wrong with it."""

    launch: Launch
    arch: str
    facts: Facts
    faults: list[str]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ppomax.tools.aot_kernels", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="OP", help="operations, by the name of their file in kernels/")
    parser.add_argument("--arch", nargs="+", choices=sorted(TARGETS), default=["sm_90", "sm_80"])
    parser.add_argument("--output", type=Path, help="folder for aot-kernels.md and aot-kernels.json")
    arguments = parser.parse_args(argv)
    if is_interpreted():
        sys.exit("aot_kernels: TRITON_INTERPRET=1 turns kernels into Python; unset it to compile them")
    ops = sorted({case.op for case in PRODUCTION})
    if unknown := set(arguments.only or ()) - set(ops):
        sys.exit(f"aot_kernels: no operation {', '.join(sorted(unknown))}; there are {', '.join(ops)}")
    chosen = arguments.only or ops
    launches, faults = record(case for case in PRODUCTION if case.op in chosen)
    faults += uncovered(launches, [name for name in triton_files() if name in chosen or not arguments.only])
    binaries = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for result in pool.map(compiled, *zip(*itertools.product(launches, arguments.arch), strict=True)):
            if isinstance(result, str):
                faults.append(result)
            else:
                binaries.append(result)
                print(line_of(result), flush=True)
    faults += [f"{b.launch.name} {b.arch} ({b.launch.call}): {fault}" for b in binaries for fault in b.faults]
    if arguments.output is not None:
        write(arguments.output, binaries)
    print(f"{len(binaries)} binaries, {len(faults)} faults")
    if faults:
        sys.exit("\n".join(faults))


def compiled(launch: Launch, arch: str) -> Binary | str:
    """The binary of a launch, or why there is none."""
    try:
        facts = facts_of(compile_for(launch, arch), arch)
    except Exception as error:  # whatever a compiler raises is a fault of the kernel
        return f"{launch.name} {arch} ({launch.call}): {type(error).__name__}: {str(error)[:500]}"
    return Binary(launch, arch, facts, judge(launch, facts, arch))


def record(cases: Iterable[Case]) -> tuple[list[Launch], list[str]]:
    """(launches, one of each binary; calls that failed, with the reason)."""
    launches: list[Launch] = []
    faults = []
    for case in cases:
        try:
            with recorded(launches, case.name):
                run(case, case.inputs(Maker("meta")))
        except Exception as error:  # of the launcher under test
            faults.append(f"{case.op} ({case.name}) on meta tensors: {type(error).__name__}: {error}")
    first: dict[str, Launch] = {}
    for launch in launches:
        first.setdefault(launch.key, launch)
    return list(first.values()), faults


def triton_files() -> list[str]:
    """Names of the files of kernels/ that hold kernels, without their ending `_triton`."""
    return sorted(path.stem.removesuffix("_triton") for path in Path(dispatch.__file__).parent.glob("*_triton.py"))


def uncovered(launches: Sequence[Launch], files: Sequence[str]) -> list[str]:
    """Kernels of these files that none of the calls launches, and launched ones that do not look like kernels."""
    launched = {launch.name for launch in launches}
    modules = [import_module(f"ppomax.kernels.{name}_triton") for name in files]
    kernels = [name_of(kernel) for module in modules for kernel in kernels_of(module)]
    return [
        *(f"{name}: no call of tools/kernel_shapes.py launches it" for name in kernels if name not in launched),
        *(f"{name}: is launched, so name it ..._kernel" for name in sorted(launched) if not name.endswith("_kernel")),
    ]


def judge(launch: Launch, facts: Facts, arch: str) -> list[str]:
    """What the gate holds against a binary."""
    count = facts.instructions.get
    faults = []
    if facts.spill and not is_in(SPILLS_ALLOWED, launch):
        faults.append(f"{facts.spill} bytes of registers spill")
    if facts.shared > SHARED_LIMIT[arch]:
        faults.append(f"{facts.shared} bytes of shared memory; {arch} has {SHARED_LIMIT[arch]}")
    if facts.fp64 and not is_in(FLOAT64_ALLOWED, launch):
        faults.append(f"{facts.fp64} instructions on float64")
    if count("ATOM"):
        faults.append(f"{count('ATOM')} atomics: two runs would differ")
    if not any(map(count, ("LDG.128", "LDGSTS.128", "UTMALDG"))) and not is_in(NARROW_ALLOWED, launch):
        faults.append("no load of 16 bytes")
    if facts.has_dot and not any(map(count, ("HMMA", "HGMMA"))) and not is_in(NO_TENSOR_CORE_ALLOWED, launch):
        faults.append("tl.dot without tensor cores")
    if any(size > GRID_LIMIT for size in launch.grid[1:]):
        faults.append(f"grid {launch.grid}: axes 1 and 2 end at {GRID_LIMIT}")
    return faults


def is_in(allowed: Iterable[str], launch: Launch) -> bool:
    return bool({launch.name, *(f"{launch.name} {word}" for word in launch.call.split())} & set(allowed))


def line_of(binary: Binary) -> str:
    facts = binary.facts
    counts = " ".join(f"{name} {count}" for name, count in facts.instructions.items())
    return (
        f"{binary.launch.name:40s} {binary.arch} {facts.registers:3d} registers, {facts.spill} B spilled, "
        f"{facts.shared:6d} B shared, {facts.ctas} x {facts.warps} warps, fp64 {facts.fp64} | {counts} | "
        f"{binary.launch.call}; {binary.launch.variant}" + "".join(f"\n    FAULT {fault}" for fault in binary.faults)
    )


def write(folder: Path, binaries: Sequence[Binary]) -> None:
    """aot-kernels.md, a table to read, and aot-kernels.json, the same numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"kernel": b.launch.name, "call": b.launch.call, "variant": b.launch.variant, "arch": b.arch}
        | asdict(b.facts)
        | {"faults": b.faults}
        for b in binaries
    ]
    lines = ",\n".join(json.dumps(row) for row in rows)
    (folder / "aot-kernels.json").write_text(f"[\n{lines}\n]\n")
    (folder / "aot-kernels.md").write_text(markdown(binaries))


def markdown(binaries: Sequence[Binary]) -> str:
    head = ("kernel", "call", "variant", "arch", "registers", "spill B", "shared B", "CTAs x warps", "instructions")
    lines = [
        "# Kernels, compiled ahead of time",
        "",
        "Written by `make aot` (tools/aot_kernels.py), without a GPU: what the launchers of kernels/ would start at",
        "the calls of tools/kernel_shapes.py. CTAs x warps: how many programs fit one multiprocessor, and their warps.",
        "LDG.128 and STG.128 are loads and stores of 16 bytes, HMMA and HGMMA tensor cores, UTMALDG the copy engine.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
    ]
    for b in binaries:
        counts = ", ".join(f"{name} {count}" for name, count in b.facts.instructions.items())
        counts += f", fp64 {b.facts.fp64}" if b.facts.fp64 else ""
        numbers = f"{b.facts.registers} | {b.facts.spill} | {b.facts.shared} | {b.facts.ctas} x {b.facts.warps}"
        lines.append(f"| {b.launch.name} | {b.launch.call} | {b.launch.variant} | {b.arch} | {numbers} | {counts} |")
    exceptions = [
        f"* `{name}`: {kind}. {reason}"
        for kind, allowed in (
            ("spills", SPILLS_ALLOWED),
            ("float64", FLOAT64_ALLOWED),
            ("narrow loads", NARROW_ALLOWED),
            ("no tensor cores", NO_TENSOR_CORE_ALLOWED),
        )
        for name, reason in allowed.items()
    ]
    return "\n".join([*lines, "", *(["Exceptions, with their reasons:", "", *exceptions, ""] if exceptions else [])])


if __name__ == "__main__":
    main()
