"""GPUs to plan for: public data-sheet figures or measured rates, and how much of them a run is expected to reach.

Memory is the data sheet's gigabytes taken as 10^9 bytes. Devices report 2 to 7 % more; that difference is left to the
CUDA context, NCCL's buffers and what the allocator cannot use.
"""

import difflib
import json
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path

from ppomax.engine.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """One GPU and its share of a node.

    memory: bytes. flops: dense bf16 operations a second. bandwidth: of its memory, bytes a second. link: to the GPUs of
    its node, bytes a second in one direction. network: its share of what leaves the node, bytes a second in one
    direction. host: to and from the memory of its host, bytes a second in one direction. per_node: GPUs of a node.
    Seconds: collective_seconds to start a collective inside a node, hop_seconds from one member of a ring to the next,
    layer_seconds for the host to launch the operators of one layer, forward (some 25 of them), decode_layer_seconds for
    the kernels of one layer of a recorded decoding step, however few tokens they work on.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    network: float
    host: float
    per_node: int = 8
    collective_seconds: float = 15e-6
    hop_seconds: float = 5e-6
    layer_seconds: float = 2e-4
    decode_layer_seconds: float = 2e-5


# NVIDIA's data sheets: dense bf16 is half of the rate "with sparsity", a link's direction half of its "total
# bandwidth". The network is no property of a GPU: 400 Gb/s for each GPU of Hopper nodes and 200 Gb/s of Ampere nodes
# (DGX H100, DGX A100), 100 Gb/s where GPUs hang on PCIe. Hosts: PCIe 5.0 x16, or 4.0 x16, one direction.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h200", 141e9, 989e12, 4.8e12, 450e9, 50e9, 64e9),
        Gpu("h100", 80e9, 989e12, 3.35e12, 450e9, 50e9, 64e9),
        Gpu("h800", 80e9, 989e12, 3.35e12, 200e9, 50e9, 64e9),
        Gpu("h20", 96e9, 148e12, 4.0e12, 450e9, 50e9, 64e9),
        Gpu("h100-pcie", 80e9, 756e12, 2.0e12, 64e9, 12.5e9, 64e9),
        Gpu("a100-80g", 80e9, 312e12, 2.039e12, 300e9, 25e9, 32e9),
        Gpu("a100-40g", 40e9, 312e12, 1.555e12, 300e9, 25e9, 32e9),
        Gpu("a800", 80e9, 312e12, 2.039e12, 200e9, 25e9, 32e9),
        Gpu("a6000", 48e9, 155e12, 0.768e12, 32e9, 12.5e9, 32e9),
        Gpu("l40s", 48e9, 362e12, 0.864e12, 32e9, 12.5e9, 32e9),
    )
}

COMPUTE_EFFICIENCY = 0.5
"""Of the peak, in matrix products of packed micro-batches with all that lies between them."""
MEMORY_EFFICIENCY = 0.8
"""Of the memory's bandwidth, in decoding and in the optimizer."""
LINK_EFFICIENCY = 0.7
"""Of links and network, in collectives of large messages."""
STORAGE_BYTES = 2e9
"""Bytes a second that a node reads from or writes to its storage."""


def find_gpu(name: str) -> Gpu:
    """The GPU of a name, in any case, or the measured rates of a file NAME.json; raises ConfigError that names the
    nearest one, or what is wrong with the file.
    """
    if name.endswith(".json"):
        return read_rates(Path(name))
    gpu = GPUS.get(name.lower())
    if gpu is None:
        guess = difflib.get_close_matches(name.lower(), GPUS, n=1, cutoff=0.3)
        hint = f"did you mean {guess[0]}? " if guess else ""
        raise ConfigError(f"--gpu {name!r}: no figures for it; {hint}Known: {', '.join(GPUS)}")
    return gpu


def read_rates(path: Path) -> Gpu:
    """Rates as tools/measure_rates.py writes them: an object with every field of `Gpu`. Raises ConfigError."""
    hint = "`python -m ppomax.tools.measure_rates` writes such a file"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--gpu {path}: no JSON file of rates ({error}); {hint}") from error
    names = {field.name for field in fields(Gpu)}
    if not isinstance(values, dict) or values.keys() != names:
        raise ConfigError(f"--gpu {path}: expected an object with exactly {', '.join(sorted(names))}; {hint}")
    for name in sorted(names - {"name"}):
        value = values[name]
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ConfigError(f"--gpu {path}: {name} is {value!r}; expected a positive number; {hint}")
    if type(values["per_node"]) is not int:
        raise ConfigError(f"--gpu {path}: per_node is {values['per_node']}; expected a whole number; {hint}")
    return Gpu(**{**values, "name": str(values["name"])})


def gpu_of_device(device_name: str) -> Gpu | None:
    """The GPU that a driver calls `device_name` ("NVIDIA A100-SXM4-80GB"); None where there are no figures for it."""
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    fitting = [gpu for gpu in GPUS.values() if words >= {re.sub(r"^(\d+)g$", r"\1gb", w) for w in gpu.name.split("-")}]
    return max(fitting, key=lambda gpu: gpu.name.count("-"), default=None)
