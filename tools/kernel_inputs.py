"""One call of a public function of kernels/, and how it gets its inputs: random numbers on any device, or none at all.

On "meta" tensors have shapes and types only, which is all that a compiler needs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

BF16, FP32 = torch.bfloat16, torch.float32


class Maker:
    """Draws inputs on a device; those of "meta" have no entries. dense: masks keep everything."""

    def __init__(self, device: torch.device | str, seed: int = 0, *, dense: bool = False) -> None:
        self.device = torch.device(device)
        self.dense = dense
        self._generator = None if self.device.type == "meta" else torch.Generator(self.device).manual_seed(seed)

    def normal(self, *size: int, dtype: torch.dtype = FP32, std: float = 1.0) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self.device).normal_(0.0, std, generator=self._generator)

    def uniform(self, *size: int) -> Tensor:
        return torch.empty(size, device=self.device).uniform_(generator=self._generator)

    def zeros(self, *size: int) -> Tensor:
        return torch.zeros(size, device=self.device)

    def integers(self, *size: int, high: int) -> Tensor:
        return torch.empty(size, dtype=torch.int64, device=self.device).random_(0, high, generator=self._generator)

    def labels(self, num_rows: int, vocab_size: int) -> Tensor:
        """One label in eight masks its row."""
        return torch.where(self._seven_of_eight(num_rows), self.integers(num_rows, high=vocab_size), -1)

    def mask(self, B: int, T: int, *, with_gaps: bool = False) -> Tensor:
        """Responses that begin within the first quarter of their row and end within the last."""
        start, end = self.integers(B, 1, high=T // 4 + 1), T - self.integers(B, 1, high=T // 4 + 1)
        position = torch.arange(T, device=self.device)[None]
        inside = ((position >= start) & (position < end)) | self.dense
        return inside & (self.uniform(B, T) < 0.8) if with_gaps else inside

    def token_weights(self, num_tokens: int) -> Tensor:
        """One over the number of kept tokens; one token in eight has none."""
        kept = self._seven_of_eight(num_tokens)
        return kept / kept.sum()

    def _seven_of_eight(self, num: int) -> Tensor:
        return (torch.arange(num, device=self.device) % 8 != 7) | self.dense


@dataclass(frozen=True)
class Case:
    """function(*inputs(maker), **settings), of whose inputs the first `num_gradients` get a gradient."""

    op: str
    name: str
    function: Callable[..., Any]
    inputs: Callable[[Maker], Sequence[Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    num_gradients: int = 0


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a result: one, or those of nested tuples, lists and the values of dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [x for item in value for x in tensors_in(item)] if isinstance(value, tuple | list) else []


def run(case: Case, inputs: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients): the gradients of a fixed weighted sum of the outputs that have one."""
    given = [x.detach().requires_grad_() if i < case.num_gradients else x for i, x in enumerate(inputs)]
    outputs = tensors_in(case.function(*given, **case.settings))
    differentiable = [x for x in outputs if x.requires_grad]
    if not case.num_gradients:
        return outputs, []
    upstream = [torch.linspace(0.5, 1.5, x.numel(), device=x.device).view(x.shape).to(x.dtype) for x in differentiable]
    gradients = torch.autograd.grad(differentiable, given[: case.num_gradients], upstream)
    return [x.detach() for x in outputs], list(gradients)


def name_of(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}[dtype]
