"""No function waits for the device: meta tensors have no values, so `.item()` and data-dependent shapes raise."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ppomax.kernels.adamw import adamw_step
from ppomax.kernels.experience import experience
from ppomax.kernels.linear_logprobs import linear_full_kl, linear_logprobs, linear_policy_loss
from ppomax.kernels.logprobs import token_logprobs
from ppomax.kernels.policy_loss import policy_loss
from ppomax.kernels.rms_norm import rms_norm
from ppomax.kernels.rope import rope
from ppomax.kernels.sampling import sample_with_margins
from ppomax.kernels.swiglu import swiglu
from ppomax.kernels.value_loss import value_loss
from ppomax.kernels.whiten import Moments, masked_moments, merge_moments, whiten

N, H, V = 4, 8, 12


def x(*shape: int) -> Tensor:
    return torch.zeros(shape, device="meta", requires_grad=True)


def ids(*shape: int) -> Tensor:
    return torch.zeros(shape, device="meta", dtype=torch.int64)


def mask(*shape: int) -> Tensor:
    return torch.zeros(shape, device="meta", dtype=torch.bool)


def constants(count: int, *shape: int) -> list[Tensor]:
    return [torch.zeros(shape, device="meta") for _ in range(count)]


def moments() -> Moments:
    return masked_moments(x(N, H), mask(N, H))


SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.1}
CALLS: dict[str, Callable[[], Any]] = {
    "token_logprobs": lambda: token_logprobs(x(N, V), ids(N), vocab_size=10),
    "linear_logprobs": lambda: linear_logprobs(x(N, H), x(V, H), ids(N), vocab_size=10),
    "linear_policy_loss": lambda: (
        linear_policy_loss(x(N, H), x(V, H), ids(N), *constants(3, N), clip=0.2, entropy_coef=0.1).loss
    ),
    "linear_full_kl": lambda: linear_full_kl(x(N, H), x(V, H), x(N, H), x(V, H), mask(N)),
    "experience": lambda: experience(
        x(N), x(N, H), x(N, H), x(N, H), mask(N, H), kl_coef=0.1, kl_estimator="k3", gamma=1.0, lam=0.9, bootstrap=x(N)
    ),
    "whiten": lambda: whiten(x(N, H), mask(N, H), moments=merge_moments(moments(), moments())),
    "policy_loss": lambda: policy_loss(x(N), *constants(3, N), clip=0.2, dual_clip=3.0).loss,
    "value_loss": lambda: value_loss(x(N), *constants(3, N), clip=0.2).loss,
    "sample": lambda: sample_with_margins(x(N, V), seen=mask(N, V), seeds=ids(N), positions=ids(N), **SAMPLING),
    "rms_norm": lambda: rms_norm(x(N, H), x(H), eps=1e-6),
    "rope": lambda: rope(x(N, 2, H), *constants(2, N, H // 2)),
    "swiglu": lambda: swiglu(x(N, H)),
    "adamw_step": lambda: adamw_step(
        [x(H)], *([c] for c in constants(3, H)), lr=1e-3, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1, step=3
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_forward_and_backward_read_no_value(call: Callable[[], Any]) -> None:
    result = call()
    outputs = [y for y in (result if isinstance(result, tuple) else (result,)) if isinstance(y, Tensor)]
    differentiable = [y.sum() for y in outputs if y.requires_grad]
    if differentiable:
        torch.stack(differentiable).sum().backward()


def test_meta_tensors_do_catch_a_host_sync() -> None:
    with pytest.raises(RuntimeError):
        x(1).sum().item()
