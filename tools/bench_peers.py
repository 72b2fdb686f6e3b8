"""Other libraries' kernels for the same operations, as far as they are installed here.

A `Contender` takes the inputs and settings of a case of kernel_cases.py. Each loader below imports its library when it
is called, so that one that is missing is an ImportError to report, and no more.
"""

import os
import socket
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ppomax.tools import bench_eager


@dataclass(frozen=True)
class Contender:
    """num_outputs: how many of our outputs it gives, the first ones; None: all.

    overwrites: it works in place, on its inputs or on what it keeps for the backward pass.
    """

    name: str
    function: Callable[..., Any]
    num_outputs: int | None = None
    overwrites: bool = False


def eager_contenders(name: str, *, compiled: bool) -> list[Contender]:
    """Plain PyTorch, and the same compiled."""
    eager: dict[str, list[Contender]] = {
        "rms_norm": [Contender("eager", bench_eager.rms_norm), Contender("torch rms_norm", bench_eager.torch_rms_norm)],
        "swiglu": [Contender("eager", bench_eager.swiglu)],
        "rope": [Contender("eager", bench_eager.rope)],
        "logprobs": [Contender("eager", bench_eager.token_logprobs)],
        "linear_logprobs": [Contender("eager", bench_eager.linear_logprobs)],
        "linear_policy_loss": [Contender("eager", bench_eager.linear_policy_loss, num_outputs=1)],
        "policy_loss": [Contender("eager", bench_eager.policy_loss, num_outputs=1)],
        "linear_cross_entropy": [Contender("eager", bench_eager.linear_cross_entropy, num_outputs=1)],
        "linear_full_kl": [Contender("eager", bench_eager.linear_full_kl)],
        "value_head_loss": [Contender("eager", bench_eager.value_head_loss, num_outputs=1)],
        "value_loss": [Contender("eager", bench_eager.value_loss, num_outputs=1)],
        "token_rewards": [Contender("eager", bench_eager.token_rewards)],
        "gae": [
            Contender("eager loop", bench_eager.gae),
            Contender("eager loop without gaps", bench_eager.gae_without_gaps),
        ],
        "experience": [
            Contender("eager loop", bench_eager.experience),
            Contender("eager loop without gaps", bench_eager.experience_without_gaps),
        ],
        "whiten": [Contender("eager", bench_eager.whiten)],
        "sampling": [Contender("eager", bench_eager.sample)],
        "rope_store": [Contender("eager", bench_eager.rope_store)],
        "paged_attention": [Contender("eager, padded", bench_eager.paged_attention)],
        "adamw": [Contender("eager", bench_eager.adamw)],
    }
    found = eager[name]
    if not compiled or name in ("gae", "experience"):  # torch.compile would unroll the loop over T
        return found
    first = found[0]
    return [*found, Contender("torch.compile", torch.compile(first.function, dynamic=False), first.num_outputs)]


def _liger_rms_norm() -> Contender:
    function = import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction

    def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        return function.apply(x, weight, eps, 0.0, "llama", False)

    return Contender("Liger", rms_norm)


def _liger_swiglu() -> Contender:
    function = import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
    return Contender("Liger", lambda gate_up: function.apply(*gate_up.chunk(2, dim=-1)), overwrites=True)


def _liger_rope() -> Contender:
    """It takes queries and keys: the last eighth of the heads are its keys."""
    function = import_module("liger_kernel.ops.rope").LigerRopeFunction

    def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        num_keys = max(1, x.shape[1] // 8)
        heads = x.transpose(0, 1)[None]
        tables = [torch.cat((table, table), dim=-1)[None] for table in (cos, sin)]
        parts = function.apply(heads[:, :-num_keys], heads[:, -num_keys:], *tables)
        return torch.cat(parts, dim=1)[0].transpose(0, 1)

    return Contender("Liger, queries and keys", rope, overwrites=True)


def _liger_logprobs() -> Contender:
    function = import_module("liger_kernel.ops.vocab_parallel_cross_entropy").LigerVocabParallelCEFunction

    def token_logprobs(logits: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
        loss = function.apply(logits[:, None], labels[:, None], None, -100, 0.0, "megatron", "global")
        return -loss[:, 0]

    return Contender("Liger vocabulary-parallel, no entropy", token_logprobs, num_outputs=1, overwrites=True)


def _megatron_fused_logprobs() -> Contender:
    function = import_module("megatron.core.fusions.fused_cross_entropy").fused_vocab_parallel_cross_entropy
    group = _world_of_one()

    def token_logprobs(logits: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
        return -function(_own(logits)[:, None], labels[:, None], group)[:, 0]

    return Contender("Megatron fused, no entropy", token_logprobs, num_outputs=1, overwrites=True)


def _megatron_logprobs() -> Contender:
    module = import_module("megatron.core.tensor_parallel.cross_entropy")
    state = import_module("megatron.core.parallel_state")
    _world_of_one()
    if not state.model_parallel_is_initialized():
        state.initialize_model_parallel()

    def token_logprobs(logits: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
        return -module.vocab_parallel_cross_entropy(_own(logits)[:, None], labels[:, None])[:, 0]

    return Contender("Megatron, no entropy", token_logprobs, num_outputs=1, overwrites=True)


def _own(logits: Tensor) -> Tensor:
    """Logits that Megatron may overwrite: it makes a copy of them itself, in fp32, unless they are fp32 already."""
    return logits.clone() if logits.dtype == torch.float32 else logits


def _cce_logprobs() -> Contender:
    function = import_module("cut_cross_entropy").linear_cross_entropy

    def linear_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -function(hidden, weight, labels, reduction="none")

    return Contender("cut-cross-entropy, no entropy", linear_logprobs, num_outputs=1)


def _liger_linear_logprobs() -> Contender:
    name = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
    function = import_module(name).LigerFusedLinearScaledCrossEntropyFunction

    def linear_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        nll, entropy = function.apply(hidden, weight, labels, return_entropy=True)
        return -nll, entropy

    return Contender("Liger scaled cross-entropy", linear_logprobs)


def _verl_linear_logprobs() -> Contender:
    function = _verl_kernels("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    return Contender("verl", lambda hidden, weight, labels: function(hidden, weight, labels, 1.0, "none", None))


def _verl_kernels(name: str) -> ModuleType:
    """A module of verl without what its packages import on the way: Ray and much else that kernels do not need."""
    for package in ("verl", "verl.utils"):
        if package in sys.modules:
            continue
        spec = find_spec(package)
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError(f"No module named {package!r}")
        bare = ModuleType(package)
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules[package] = bare
    return import_module(name)


def _with_policy_loss(load: Callable[[], Contender]) -> Callable[[], Contender]:
    """A library's log-probabilities of hidden states, and the loss on them in plain PyTorch."""

    def loaded() -> Contender:
        peer = load()

        def loss(
            hidden: Tensor, weight: Tensor, labels: Tensor, *rest: Tensor, entropy_coef: float, **clips: Any
        ) -> Tensor:
            result = peer.function(hidden, weight, labels)
            logprobs, entropy = result if isinstance(result, tuple) else (result, None)
            value = bench_eager.policy_loss(logprobs.float(), *rest, **clips)
            return value if entropy is None else value - entropy_coef * (rest[-1] * entropy.float()).sum()

        return Contender(f"{peer.name} + eager loss", loss, num_outputs=1)

    return loaded


def _torch_adamw() -> Contender:
    step = import_module("torch.optim.adamw").adamw

    def adamw(
        params: list[Tensor], grads: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor], **s: Any
    ) -> None:
        steps = [torch.full((), float(s["step"] - 1), device=p.device) for p in params]
        (beta1, beta2), chosen = s["betas"], {name: s[name] for name in ("lr", "weight_decay", "eps")}
        with torch.no_grad():
            step(
                params,
                [g.to(p.dtype) for g, p in zip(grads, params, strict=True)],
                exp_avg,
                exp_avg_sq,
                [],
                steps,
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                maximize=False,
                **chosen,
            )

    return Contender("torch fused", adamw)


@cache
def _world_of_one() -> Any:
    """The process group of this process alone."""
    if not dist.is_initialized():
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, init_method=f"tcp://localhost:{port}", rank=0, world_size=1)
    return dist.group.WORLD


LOADERS: dict[str, dict[str, Callable[[], Contender]]] = {
    "rms_norm": {"liger_kernel": _liger_rms_norm},
    "swiglu": {"liger_kernel": _liger_swiglu},
    "rope": {"liger_kernel": _liger_rope},
    "logprobs": {
        "liger_kernel": _liger_logprobs,
        "megatron.core (fused)": _megatron_fused_logprobs,
        "megatron.core": _megatron_logprobs,
    },
    "linear_logprobs": {
        "liger_kernel": _liger_linear_logprobs,
        "cut_cross_entropy": _cce_logprobs,
        "verl": _verl_linear_logprobs,
    },
    "linear_policy_loss": {
        "liger_kernel": _with_policy_loss(_liger_linear_logprobs),
        "verl": _with_policy_loss(_verl_linear_logprobs),
    },
    "adamw": {"torch": _torch_adamw},
}
"""Peers per operation, by the name of their package."""

CUDA_ONLY = ("liger_kernel", "cut_cross_entropy", "verl")
DISTRIBUTIONS = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "verl", "megatron-core", "numpy")


def library_contenders(name: str, device: torch.device) -> tuple[list[Contender], dict[str, str]]:
    """(peers of other libraries that are installed and run on this device, {those that are not: why})."""
    contenders, absent = [], {}
    for package, load in LOADERS.get(name, {}).items():
        if package in CUDA_ONLY and device.type != "cuda":
            absent[package] = "runs on CUDA only"
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # about libraries that they would rather have
                contenders.append(load())
        except ImportError as error:
            absent[package] = f"not installed: {error}"
        except Exception as error:  # a peer that cannot start is reported, and the others are timed
            absent[package] = f"{type(error).__name__}: {error}"
    return contenders, absent


def versions() -> dict[str, str]:
    """Of the libraries that take part."""
    found = {"python": sys.version.split()[0]}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {}) | _threads()


def _threads() -> dict[str, str]:
    return {"threads": str(torch.get_num_threads()), "cpus": str(os.cpu_count())}
