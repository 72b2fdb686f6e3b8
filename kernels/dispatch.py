"""The only rule that chooses between the Triton version of an operation and its torch reference.

Every operation `<op>` has three files: `<op>.py` (the public function: checks, custom operator, autograd),
`<op>_reference.py` (the equation in torch, the definition) and `<op>_triton.py` (kernels and launchers). The last two
offer functions of the same names, and so does `<op>_c.py` for those of C_OPS: C kernels for CPUs. Some forward passes,
those of generation, have C kernels of their own (decoding_c.py, sampling_c.py).
Nothing here imports triton: a process that never uses a Triton version never loads it.

The environment variable PPOMAX_KERNELS narrows the choice: "reference" leaves the torch references, "cpu" what a
machine without a GPU has (no interpreted Triton).
"""

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from ppomax.kernels import native

C_OPS = ("adamw", "logprobs", "rms_norm", "rope", "swiglu")
"""Operations with a C version for `implementation` to choose."""


def use_triton(*tensors: Tensor | None) -> bool:
    """Whether Triton computes on these tensors; tensors that are None do not count.

    True when triton is installed, the environment allows it, and either every tensor is on CUDA or Triton interprets
    its kernels (TRITON_INTERPRET=1).
    """
    if os.environ.get("PPOMAX_KERNELS") in ("reference", "cpu"):
        return False
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    on_cuda = all(tensor.is_cuda for tensor in tensors if tensor is not None)
    return (interpreted or on_cuda) and _triton_is_installed()


def use_c(*tensors: Tensor | None) -> bool:
    """Whether the C kernels (native.py) compute on these tensors, where an operation has one: float32 on a CPU, unless
    Triton does or the environment asks for the reference.
    """
    if os.environ.get("PPOMAX_KERNELS") == "reference" or use_triton(*tensors):
        return False
    for tensor in tensors:
        if tensor is not None and (tensor.is_cuda or (tensor.is_floating_point() and tensor.dtype != torch.float32)):
            return False
    return native.load() is not None


def implementation(op: str, *tensors: Tensor | None) -> ModuleType:
    """The module that computes `op` on these tensors: `<op>_triton` if `use_triton` says so, `<op>_c` if it is of C_OPS
    and `use_c` says so, else `<op>_reference`.
    """
    version = "triton" if use_triton(*tensors) else "c" if op in C_OPS and use_c(*tensors) else "reference"
    return import_module(f"ppomax.kernels.{op}_{version}")


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None
