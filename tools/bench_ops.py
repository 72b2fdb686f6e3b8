"""What the benchmark times: for each operation its calls, what the device must at least move and compute, its passes.

The calls are those of kernel_shapes.py, and smaller ones on a CPU, but nothing is masked, so that the floors are exact.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ppomax.tools import kernel_cases as cases
from ppomax.tools import kernel_shapes as shapes
from ppomax.tools.bench_peers import Contender
from ppomax.tools.kernel_inputs import BF16, FP32, Case, Maker, run, tensors_in

Function = Callable[[], object]
Passes = tuple[str, ...]
FORWARD: Passes = ("forward",)
APART: Passes = ("forward", "backward", "forward and backward")
TOGETHER: Passes = ("forward and backward",)
"""Of operations whose gradient is formed in the forward pass."""


@dataclass(frozen=True)
class Item:
    """A call to time.

    small: the call on which errors are measured against fp64. flops: per pass. unread: how many of the first inputs the
    backward pass has no need to read. updated: inputs written in place. launch_bound: it is timed as a replayed CUDA
    graph too.
    """

    case: Case
    small: Case
    passes: Passes = FORWARD
    flops: tuple[float, ...] = (0.0, 0.0, 0.0)
    unread: int = 0
    updated: tuple[int, ...] = ()
    launch_bound: bool = False

    @property
    def op(self) -> str:
        return self.case.op

    @property
    def function(self) -> str:
        """The name by which bench_peers knows its peers."""
        return "linear_cross_entropy" if self.case.name.startswith("cross-entropy") else self.op


def items(device: torch.device) -> list[Item]:
    """The calls to time: production sizes on CUDA, small ones on a CPU."""
    return _cuda_items() if device.type == "cuda" else _cpu_items()


def _cuda_items() -> list[Item]:
    N, H, F = shapes.NUM_TOKENS, shapes.HIDDEN, shapes.FEED_FORWARD
    linear_vocab = 128256
    return [
        *_token_level((64, 1024), (1024, 8192), num_tokens=64 * N),
        *_layers(N, H, F, BF16),
        *(_logprobs(N, V, BF16) for V in shapes.VOCABULARIES),
        *_linear(N, H, linear_vocab, BF16),
        *_sampling(64, 151936),
        *(_paged_attention(R, 1024, 1) for R in (64, 256)),
        _paged_attention(16, 2048, 512),
        *(_rope_store(N) for N in (256, 8192)),
        _adamw(10**9 // 4),
    ]


def _cpu_items() -> list[Item]:
    return [
        *_token_level((16, 128), (64, 256), num_tokens=2**16),
        *_layers(256, 1024, 2816, FP32),
        _logprobs(128, 8000, FP32),
        *_linear(128, 256, 8000, FP32),
        *_sampling(8, 8000),
        *(_paged_attention(16, 256, queries, heads=8, D=64, page_size=16, dtype=FP32) for queries in (1, 64)),
        _rope_store(256, heads=8, groups=2, D=64, dtype=FP32),
        _adamw(2**20),
    ]


def _token_level(small: tuple[int, int], large: tuple[int, int], *, num_tokens: int) -> list[Item]:
    check = (4, 65)
    return [
        *(
            Item(cases.experience_case(*size), cases.experience_case(*check), launch_bound=True)
            for size in (small, large)
        ),
        Item(cases.gae_case(*small), cases.gae_case(*check), launch_bound=True),
        Item(cases.token_rewards_case(*small), cases.token_rewards_case(*check), launch_bound=True),
        Item(cases.whiten_case(*large), cases.whiten_case(*check)),
        Item(
            cases.policy_loss_case(num_tokens),
            cases.policy_loss_case(999),
            TOGETHER,
            launch_bound=True,
        ),
        Item(cases.value_loss_case(num_tokens), cases.value_loss_case(999), TOGETHER, launch_bound=True),
    ]


def _layers(N: int, H: int, F: int, dtype: torch.dtype) -> list[Item]:
    return [
        Item(cases.value_head_loss_case(N, H, dtype), cases.value_head_loss_case(64, H, dtype), TOGETHER),
        Item(cases.rms_norm_case(N, H, dtype), cases.rms_norm_case(64, H, dtype), APART),
        Item(cases.swiglu_case(N, F, dtype), cases.swiglu_case(64, F, dtype), APART),
        Item(cases.rope_case(N, H // 128, dtype=dtype), cases.rope_case(64, 8, dtype=dtype), APART, unread=1),
    ]


def _logprobs(N: int, V: int, dtype: torch.dtype) -> Item:
    return Item(cases.logprobs_case(N, V, dtype), cases.logprobs_case(16, V, dtype), APART)


def _linear(N: int, H: int, V: int, dtype: torch.dtype) -> list[Item]:
    """The products alone: 2NHV for logits, as much again for each gradient, and for logits that are formed again."""
    product = 2.0 * N * H * V
    few = min(N, 128)
    loss = cases.linear_policy_loss_case
    logprobs, cross_entropy = cases.linear_logprobs_case, cases.linear_cross_entropy_case
    full_kl = cases.linear_full_kl_case
    return [
        Item(loss(N, H, V, dtype), loss(few, H, V, dtype), TOGETHER, (3 * product,)),
        Item(logprobs(N, H, V, dtype), logprobs(few, H, V, dtype), APART, (product, 3 * product, 4 * product)),
        Item(cross_entropy(N, H, V, dtype), cross_entropy(few, H, V, dtype), TOGETHER, (3 * product,)),
        Item(full_kl(N, H, V, dtype), full_kl(few, H, V, dtype), FORWARD, (2 * product,)),
    ]


def _sampling(R: int, V: int) -> list[Item]:
    kinds: list[tuple[str, dict[str, Any]]] = [("plain", {}), ("paper", shapes.PAPER_SAMPLING)]
    return [
        Item(cases.sampling_case(R, V, name, **settings), cases.sampling_case(4, V, name, **settings))
        for name, settings in kinds
    ]


def _paged_attention(R: int, context: int, queries: int, **sizes: Any) -> Item:
    """Two products of each query with what it sees; 2 operations a term."""
    case = cases.paged_attention_case(R, context, queries, **sizes)
    heads, D = (sizes.get(name, size) for name, size in (("heads", 32), ("D", 128)))
    flops = 4.0 * R * queries * (context - (queries - 1) / 2) * heads * D
    return Item(case, cases.paged_attention_case(4, 70, queries, **sizes), FORWARD, (flops,), launch_bound=queries == 1)


def _rope_store(N: int, **sizes: Any) -> Item:
    small = cases.rope_store_case(70, in_place=True, **sizes)
    return Item(cases.rope_store_case(N, in_place=True, **sizes), small, launch_bound=N < 1024)


def _adamw(num_params: int) -> Item:
    return Item(cases.adamw_case(num_params), cases.adamw_case(9999), updated=(0, 2, 3))


def upstream(outputs: Sequence[Tensor]) -> list[Tensor]:
    """A fixed upstream gradient for each output that has one."""
    return [torch.linspace(0.5, 1.5, x.numel(), device=x.device).view(x.shape).to(x.dtype) for x in outputs]


def prepared(item: Item, contender: Contender, inputs: Sequence[Any], name: str) -> Function:
    """One pass ("forward", "backward" or both) of a contender on these inputs, to be called again and again."""
    num = item.case.num_gradients
    given = [x.detach().requires_grad_() if i < num else x for i, x in enumerate(inputs)]

    def forward() -> list[Tensor]:
        return tensors_in(contender.function(*given, **item.case.settings))

    if name == "forward":
        return forward
    outputs = [x for x in forward() if x.requires_grad]
    weights = upstream(outputs)
    if name == "backward":
        return lambda: torch.autograd.grad(outputs, given[:num], weights, retain_graph=True)
    return lambda: torch.autograd.grad([x for x in forward() if x.requires_grad], given[:num], weights)


def traffic(item: Item, inputs: Sequence[Any]) -> dict[str, int]:
    """Bytes that each pass must at least read and write: {pass: bytes}."""
    outputs, gradients = run(item.case, inputs)
    read, written = _num_bytes(list(inputs)), _num_bytes(outputs)
    written += _num_bytes([inputs[i] for i in item.updated])
    returned = _num_bytes([x for x in outputs if x.is_floating_point()]) if gradients else 0
    backward = returned + read - _num_bytes(list(inputs[: item.unread])) + _num_bytes(gradients)
    both = read + written + _num_bytes(gradients)
    return {"forward": read + written, "backward": backward, "forward and backward": both}


def _num_bytes(value: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors_in(value))


def error(item: Item, contender: Contender, device: torch.device) -> float:
    """The largest relative error of an output or gradient of the small call, |x - y| / |y| with y computed in fp64."""
    inputs = item.small.inputs(Maker(device, dense=True))
    if item.op == "sampling":
        return _sampling_error(item.small, contender, inputs)
    expected = _results(item, item.small.function, contender.num_outputs, copied(inputs, torch.float64))
    ours = _results(item, contender.function, contender.num_outputs, copied(inputs))
    return max(relative_error(x, y) for x, y in zip(ours, expected, strict=True))


def _results(item: Item, function: Callable[..., Any], num_outputs: int | None, inputs: Sequence[Any]) -> list[Tensor]:
    """The first outputs, their gradients, the updated inputs; fp64 inputs are left to the torch reference."""

    def first(*given: Any, **settings: Any) -> list[Tensor]:
        return tensors_in(function(*given, **settings))[:num_outputs]

    case = Case(item.op, item.small.name, first, item.small.inputs, item.small.settings, item.small.num_gradients)
    is_double = any(x.dtype == torch.float64 for x in tensors_in(list(inputs)))
    with patch.dict(os.environ, {"PPOMAX_KERNELS": "reference"} if is_double else {}):
        outputs, gradients = run(case, inputs)
    return [*outputs, *gradients, *tensors_in([inputs[i] for i in item.updated])]


def copied(value: Any, dtype: torch.dtype | None = None) -> Any:
    """Copies of tensors; those of floating point in `dtype`, if it is given."""
    if isinstance(value, Tensor):
        return value.to(dtype, copy=True) if dtype is not None and value.is_floating_point() else value.clone()
    return [copied(x, dtype) for x in value] if isinstance(value, list | tuple) else value


def _sampling_error(case: Case, contender: Contender, inputs: Sequence[Any]) -> float:
    """Of the log-probabilities of whatever tokens were drawn."""
    tokens, logprobs = contender.function(*inputs, **case.settings)[:2]
    return relative_error(logprobs, inputs[0].double().log_softmax(-1).gather(1, tokens[:, None])[:, 0])


def relative_error(x: Tensor, y: Tensor) -> float:
    difference, size = (x.double() - y.double()).norm().item(), y.double().norm().item()
    return difference / size if size > 0 else difference
