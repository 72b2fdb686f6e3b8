"""The only rule that chooses between the Triton version of an operation and its torch reference.

Every operation `<op>` has three files at most: `<op>.py` (the public function: checks, autograd),
`<op>_reference.py` (the equation in torch, the definition) and `<op>_triton.py` (kernels and launchers). The last
two offer functions of the same names.
Nothing here imports triton: a process that never uses a Triton version never loads it.
"""

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from torch import Tensor

TRITON_OPS: frozenset[str] = frozenset()
"""Operations that have a `<op>_triton.py`. Empty: so far every operation runs its reference on every device."""


def use_triton(op: str, *tensors: Tensor | None) -> bool:
    """Whether the Triton version of `op` computes on these tensors; tensors that are None do not count.

    True when the operation has a Triton version, triton is installed, the environment does not say
    PPOMAX_KERNELS=reference, and either every tensor is on CUDA or Triton interprets its kernels (TRITON_INTERPRET=1).
    """
    if op not in TRITON_OPS or os.environ.get("PPOMAX_KERNELS") == "reference":
        return False
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    on_cuda = all(tensor.is_cuda for tensor in tensors if tensor is not None)
    return (interpreted or on_cuda) and _triton_is_installed()


def implementation(op: str, *tensors: Tensor | None) -> ModuleType:
    """The module that computes `op` on these tensors: `<op>_triton` if `use_triton` says so, else `<op>_reference`."""
    version = "triton" if use_triton(op, *tensors) else "reference"
    return import_module(f"ppomax.kernels.{op}_{version}")


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None
