"""What one rank tells `ppomax doctor` about itself and its host: numbers and texts that JSON holds, no judgement."""

import importlib
import importlib.util
import os
import resource
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

from ppomax.engine.parallel.environment import gloo_address, is_one_host, keep_to_this_host, route_to, versions
from ppomax.kernels import native

COMMAND_SECONDS = 20
VARIABLES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF")
"""Beginnings of the environment variables that are shown. No others: they may hold secrets."""


def facts(local_rank: int) -> dict[str, Any]:
    """Facts of this rank. What only its host has is looked up by the first rank of each host."""
    found = {"local_rank": local_rank, "versions": versions() | _more_versions(), "network": network(local_rank)}
    found |= _gpu(local_rank)
    found["limits"] = _limits()
    found["optional"] = _optional() if local_rank == 0 else {}
    return found


def _more_versions() -> dict[str, str]:
    found = {
        "commit": _run("git", "-C", str(Path(__file__).parents[1]), "rev-parse", "--short=12", "HEAD") or "unknown"
    }
    if torch.cuda.is_available():
        driver = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["driver"] = driver.splitlines()[0] if driver else "unknown"
    return found


def _gpu(local_rank: int) -> dict[str, Any]:
    """gpu: None without one. gpu_fault, gpu_fix: why this rank cannot have the one that it should."""
    if not torch.cuda.is_available():
        has_driver = Path("/dev/nvidia0").exists() or bool(shutil.which("nvidia-smi"))
        if has_driver:
            fault = f"this host has an NVIDIA driver, but torch {torch.__version__} finds no GPU"
            return {"gpu": None, "gpu_fault": fault, "gpu_fix": "install torch's CUDA build, see CUDA_VISIBLE_DEVICES"}
        return {"gpu": None, "gpu_fault": "", "gpu_fix": ""}
    count = torch.cuda.device_count()
    if local_rank >= count:
        fix = f"start torchrun with at most --nproc-per-node {count}"
        return {"gpu": None, "gpu_fault": f"no GPU of its own: {count} are visible", "gpu_fix": fix}
    properties = torch.cuda.get_device_properties(local_rank)
    free, total = torch.cuda.mem_get_info(local_rank)
    query = "--query-gpu=uuid,ecc.mode.current,ecc.errors.uncorrected.volatile.total"
    rows = (_run("nvidia-smi", query, "--format=csv,noheader,nounits") or "").splitlines()
    ecc, errors = next(
        (row.split(", ")[1:3] for row in rows if str(properties.uuid) in row and row.count(", ") == 2), ("unknown", "")
    )
    gpu = {
        "name": properties.name,
        "capability": f"{properties.major}{properties.minor}",
        "free": free,
        "total": total,
        "ecc": ecc,
        "ecc_errors": errors,
    }
    return {"gpu": gpu, "gpu_fault": "", "gpu_fix": ""}


def network(local_rank: int) -> dict[str, Any]:
    """Where this rank listens and how it reaches the first host, as the stages set it up."""
    interfaces = psutil.net_if_addrs()
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}
    asked = {name: os.environ[name] for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name in os.environ}
    unknown = [
        f"{name}={value}"
        for name, value in asked.items()
        if name.startswith("GLOO") and not set(value.split(",")) & set(interfaces)
    ]
    keep_to_this_host()
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "")
    own = [one.address for one in interfaces.get(chosen, []) if one.family == socket.AF_INET]
    address = own[0] if own else gloo_address()
    links = Path("/sys/class/infiniband")
    return {
        "one_host": is_one_host(),
        "gloo_address": address,
        "gloo_interface": chosen or "the interface of the host's name",
        "route": route_to(os.environ.get("MASTER_ADDR", "localhost")),
        "unknown_interface": ", ".join(unknown),
        "interfaces": sorted(interfaces),
        "infiniband": ", ".join(sorted(path.name for path in links.iterdir())) if links.is_dir() else "none",
        "links": _nvlink() if local_rank == 0 and torch.cuda.is_available() else "",
        "variables": variables,
    }


def _nvlink() -> str:
    """How the GPUs of this host are joined, from the matrix of nvidia-smi."""
    words = {word for line in (_run("nvidia-smi", "topo", "-m") or "").splitlines()[1:] for word in line.split()}
    nvlinks = sorted(word for word in words if word.startswith("NV") and word[2:].isdigit())
    return f"NVLink {', '.join(nvlinks)}" if nvlinks else "no NVLink"


def _limits() -> dict[str, float]:
    memory = psutil.virtual_memory()
    shm = Path("/dev/shm")
    return {
        "shm": shutil.disk_usage(shm).free if shm.is_dir() else 0,
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "memory": memory.available,
        "total_memory": memory.total,
    }


def _optional() -> dict[str, str]:
    """Each optional accelerator: in use, or why not."""
    on_gpu = torch.cuda.is_available()
    found = {
        "Triton kernels": "in use" if on_gpu else "not used: they run on a GPU; torch references and C kernels serve"
    }
    if on_gpu and importlib.util.find_spec("triton") is None:
        found["Triton kernels"] = "not used: triton is not installed; torch references serve, and are slower"
    found["C kernels"] = "used in generation on a CPU only"
    if not on_gpu:
        has_them = native.load() is not None
        found["C kernels"] = "in use for generation" if has_them else "not used: no C compiler (cc, gcc) that works"
    without = "torch's variable-length attention serves" if on_gpu else "it needs a GPU; SDPA serves"
    found["flash-attn"] = _package("flash_attn", "in use with bf16" if on_gpu else f"not used: {without}", without)
    vllm = 'used where sampling.backend = "vllm"'
    found["vLLM"] = _package("vllm", vllm, "the embedded generator serves", try_import=False)
    for name, module in (("NVIDIA apex", "apex"), ("TransformerEngine", "transformer_engine")):
        why = "not used: ppomax has its own optimizer step, norms and attention"
        found[name] = why if importlib.util.find_spec(module) else f"{why}, and needs none"
    return found


def _package(module: str, used: str, without: str, *, try_import: bool = True) -> str:
    if importlib.util.find_spec(module) is None:
        return f"not used: not installed; {without}"
    if try_import:
        try:
            importlib.import_module(module)
        except Exception as error:  # built for another torch, say
            return f"not used: it cannot be imported ({type(error).__name__}: {str(error).splitlines()[0]})"
    return used


def _run(*command: str) -> str | None:
    """What a command prints; None where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
