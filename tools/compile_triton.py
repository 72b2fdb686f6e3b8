"""Compiles Triton kernels for GPUs that are not here, and reads from the result what a gate can judge.

`recorded` lets calls of kernels/ on tensors of device "meta" note their launches, each with the specialisation that
Triton's own launcher would give it. `compile_for` translates a launch; `facts_of` reads registers, spills, shared
memory and instructions. No driver is needed, but Triton's interpreter must be off.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import triton
from torch._library.custom_ops import OPDEFS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32)}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
"""Shared memory that one program may ask for, in bytes."""

SHARED_PER_CTA = 1024
REGISTERS, REGISTER_UNIT, MAX_WARPS, MAX_CTAS = 65536, 256, 64, 32
INSTRUCTIONS = {
    "LDG.128": r"\bLDG\.E\S*\.128",
    "STG.128": r"\bSTG\.E\S*\.128",
    "LDGSTS.128": r"\bLDGSTS\S*\.128",
    "UTMALDG": r"\bUTMALDG",
    "HMMA": r"\bHMMA\b",
    "HGMMA": r"\bHGMMA\b",
    "MUFU.EX2": r"\bMUFU\.EX2",
    "BAR": r"\bBAR\.",
    "ATOM": r"\b(?:ATOM|ATOMG|RED|REDG)\.",
    "LDL": r"\bLDL\b",
    "STL": r"\bSTL\b",
}


@dataclass(frozen=True)
class Launch:
    """One kernel as a launcher would start it; `call` says for whom, `grid` with how many programs."""

    kernel: JITFunction
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]
    grid: tuple[int, ...]
    call: str

    @property
    def name(self) -> str:
        """`<op>.<kernel>`."""
        return name_of(self.kernel)

    @property
    def key(self) -> str:
        """Equal for launches of the same binary."""
        constants = {path: str(value) for path, value in self.constants.items()}
        return repr((self.name, self.signature, constants, self.attributes, sorted(self.options.items())))

    @property
    def variant(self) -> str:
        """What tells this binary from others of its kernel: types of pointers, constants, warps."""
        pointers = "".join(f"{kind[1:]} " for kind in self.signature.values() if str(kind).startswith("*"))
        names = self.kernel.arg_names
        constants = " ".join(f"{names[path[0]]}={value}" for path, value in self.constants.items() if value is not None)
        return f"{pointers}{constants}".strip()


@dataclass(frozen=True)
class Facts:
    """Of one binary. spill: bytes of registers kept in memory. fp64: instructions of PTX on float64."""

    registers: int
    stack: int
    spill: int
    shared: int
    warps: int
    stages: int
    ctas: int
    fp64: int
    has_dot: bool
    instructions: dict[str, int]

    @property
    def resident_warps(self) -> int:
        """Warps of the CTAs that fit one multiprocessor."""
        return self.ctas * self.warps


def name_of(kernel: JITFunction) -> str:
    return f"{kernel.module.rpartition('.')[2].removesuffix('_triton')}.{kernel.__name__}"


@contextmanager
def recorded(launches: list[Launch], call: str) -> Iterator[None]:
    """While it is open, kernels/ choose Triton for every tensor, and launches are noted instead of made.

    Custom operators run their implementation on "meta" tensors too, where PyTorch would ask only for shapes.
    """
    backend = make_backend(TARGETS["sm_90"])

    def note(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        bind = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = bind(*args, **kwargs)
        _, signature, constants, attributes = self._pack_args(backend, dict(options), bound, specialization, options)
        size = tuple(grid(bound) if callable(grid) else grid)
        launches.append(Launch(self, signature, constants, attributes, dict(options), size, call))

    with ExitStack() as stack:
        stack.enter_context(patch("ppomax.kernels.dispatch.use_triton", lambda *tensors: True))
        stack.enter_context(patch.object(JITFunction, "run", note))
        for name, operator in list(OPDEFS.items()):
            if name.startswith("ppomax::"):
                stack.enter_context(patch.object(operator, "_abstract_fn", operator._init_fn))
        yield


def kernels_of(module: Any) -> list[JITFunction]:
    """The kernels that a module defines to be launched: by convention, those whose name ends with `_kernel`."""
    found = [value for value in vars(module).values() if isinstance(value, JITFunction)]
    return [kernel for kernel in found if kernel.module == module.__name__ and kernel.__name__.endswith("_kernel")]


def compile_for(launch: Launch, arch: str) -> Any:
    """Triton's compiled kernel of a launch for "sm_80" or "sm_90"."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    return triton.compile(source, target=TARGETS[arch], options=launch.options)


def facts_of(compiled: Any, arch: str) -> Facts:
    """What NVIDIA's tools say about a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        usage = _output(TOOLS / "cuobjdump", "-res-usage", str(binary))
        text = _output(TOOLS / "nvdisasm", "-c", str(binary))
    sizes = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    counts = {name: len(re.findall(pattern, text)) for name, pattern in INSTRUCTIONS.items()}
    registers, warps, shared = int(sizes["REG"]), compiled.metadata.num_warps, compiled.metadata.shared
    return Facts(
        registers=registers,
        stack=int(sizes["STACK"]),
        spill=_spilled_bytes(compiled.asm["ptx"]) if counts["LDL"] or counts["STL"] or int(sizes["STACK"]) else 0,
        shared=shared,
        warps=warps,
        stages=compiled.metadata.num_stages,
        ctas=_resident_ctas(registers, warps, shared, arch),
        fp64=len(re.findall(r"\.f64\b", compiled.asm["ptx"])),
        has_dot="tt.dot" in compiled.asm["ttir"],
        instructions={name: count for name, count in counts.items() if count},
    )


def _spilled_bytes(ptx: str) -> int:
    """What ptxas says that it stored and loaded of registers, which takes it a second run."""
    target = re.search(r"\.target\s+(sm_\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [str(TOOLS / "ptxas"), "-v", f"--gpu-name={target[1]}", str(path), "-o", str(path.with_suffix(".o"))]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(number) for number in re.findall(r"(\d+) bytes spill", log))


def _resident_ctas(registers: int, warps: int, shared: int, arch: str) -> int:
    """CTAs that fit one multiprocessor: registers are given to warps in units."""
    per_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // (per_warp * warps)
    return min(by_registers, SHARED_LIMIT[arch] // (shared + SHARED_PER_CTA), MAX_WARPS // warps, MAX_CTAS)


def _output(*command: str | Path) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout
