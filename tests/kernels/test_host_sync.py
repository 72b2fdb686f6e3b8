"""No function waits for the device: while it runs, PyTorch refuses what reads a value or shapes a result by values.

The reference versions and what surrounds them are watched on CPU tensors, where such a read is cheap and passes
unseen; on a GPU each would stop the host until the device is done, and no CUDA graph could hold it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from ppomax.kernels import swiglu_reference
from ppomax.kernels.adamw import adamw_step, squared_norm
from ppomax.kernels.experience import experience
from ppomax.kernels.gae import gae
from ppomax.kernels.linear_full_kl import linear_full_kl
from ppomax.kernels.linear_logprobs import linear_logprobs
from ppomax.kernels.linear_policy_loss import linear_cross_entropy, linear_policy_loss
from ppomax.kernels.logprobs import token_logprobs
from ppomax.kernels.policy_loss import policy_loss
from ppomax.kernels.rms_norm import rms_norm
from ppomax.kernels.rope import rope
from ppomax.kernels.sampling import sample_with_margins
from ppomax.kernels.swiglu import swiglu
from ppomax.kernels.token_rewards import token_rewards
from ppomax.kernels.value_head_loss import value_head_loss
from ppomax.kernels.value_loss import value_loss
from ppomax.kernels.whiten import Moments, masked_moments, merge_moments, whiten

N, H, V = 4, 8, 12
READS = {"_local_scalar_dense", "is_nonzero", "equal", "item"}
SHAPED_BY_VALUES = {"nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive"}
INDEXED = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}


class NoHostSync(TorchDispatchMode):
    """Raises RuntimeError for operations that wait for the device, inside our operators too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in INDEXED and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if name in READS or name in SHAPED_BY_VALUES or by_mask:
            raise RuntimeError(f"{func} waits for the device")
        if func.namespace == "ppomax":
            with self:  # PyTorch has left the mode, and would not watch what the operator calls.
                return OPDEFS[f"ppomax::{name}"]._init_fn(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_sync() -> Iterator[None]:
    """While it is open, waiting for the device raises RuntimeError."""

    def refuse(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a copy to the host waits for the device")

    with ExitStack() as stack:
        for name in ("tolist", "numpy", "cpu"):  # of CPU tensors these are no operations of PyTorch
            stack.enter_context(patch.object(Tensor, name, refuse))
        stack.enter_context(NoHostSync())
        yield


def x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def ids(*shape: int) -> Tensor:
    """0, 1, ...; the last one is masked."""
    return torch.arange(shape[0]).where(torch.arange(shape[0]) < shape[0] - 1, -1)


def mask(*shape: int) -> Tensor:
    """Rows with a gap, and one without a kept entry."""
    kept = torch.arange(shape[-1]) % 3 != 1
    return kept.expand(shape) & (torch.arange(shape[0]) > 0)[:, None] if len(shape) > 1 else kept


def constants(count: int, *shape: int) -> list[Tensor]:
    return [x(*shape, seed=seed).detach() for seed in range(count)]


def moments() -> Moments:
    return masked_moments(x(N, H), mask(N, H))


SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.1}
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1, "step": 3}
REWARDS: dict[str, Any] = {"kl_coef": 0.1, "kl_estimator": "k3"}
CALLS: dict[str, Callable[[], Any]] = {
    "token_logprobs": lambda: token_logprobs(x(N, V), ids(N), vocab_size=10),
    "linear_logprobs": lambda: linear_logprobs(x(N, H), x(V, H), ids(N), vocab_size=10),
    "linear_policy_loss": lambda: (
        linear_policy_loss(x(N, H), x(V, H), ids(N), *constants(3, N), clip=0.2, entropy_coef=0.1).loss
    ),
    "linear_cross_entropy": lambda: linear_cross_entropy(x(N, H), x(V, H), ids(N), *constants(1, N)),
    "linear_full_kl": lambda: linear_full_kl(x(N, H), x(V, H), x(N, H), x(V, H), mask(N)),
    "token_rewards": lambda: token_rewards(*constants(1, N), *constants(2, N, H), mask(N, H), **REWARDS),
    "gae": lambda: gae(*constants(2, N, H), mask(N, H), gamma=1.0, lam=0.9, bootstrap=constants(1, N)[0]),
    "experience": lambda: experience(
        *constants(1, N), *constants(3, N, H), mask(N, H), gamma=1.0, lam=0.9, bootstrap=constants(1, N)[0], **REWARDS
    ),
    "whiten": lambda: whiten(x(N, H), mask(N, H), moments=merge_moments(moments(), moments())),
    "policy_loss": lambda: policy_loss(x(N), *constants(3, N), clip=0.2, dual_clip=3.0).loss,
    "value_loss": lambda: value_loss(x(N), *constants(3, N), clip=0.2).loss,
    "value_head_loss": lambda: value_head_loss(x(N, H), x(H), *constants(3, N), clip=0.2).loss,
    "sample": lambda: sample_with_margins(
        constants(1, N, V)[0], seen=mask(N, V), seeds=torch.arange(N), positions=torch.arange(N), **SAMPLING
    ),
    "rms_norm": lambda: rms_norm(x(N, H), x(H), eps=1e-6),
    "rope": lambda: rope(x(N, 2, H), *constants(2, N, H // 2)),
    "swiglu": lambda: swiglu(x(N, H)),
    "adamw_step": lambda: adamw_step(
        *([c.abs()] for c in constants(4, H)),
        grad_scale=torch.tensor(0.5),
        is_finite=torch.tensor(True),
        copies=[torch.zeros(H, dtype=torch.bfloat16)],
        zero_grads=True,
        **ADAMW,
    ),
    "squared_norm": lambda: squared_norm(constants(2, H), device=torch.device("cpu")),
}


@pytest.mark.one_version
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_forward_and_backward_read_no_value(call: Callable[[], Any]) -> None:
    with no_host_sync():
        result = call()
        outputs = [y for y in (result if isinstance(result, tuple) else (result,)) if isinstance(y, Tensor)]
        differentiable = [y.sum() for y in outputs if y.requires_grad]
        if differentiable:
            torch.stack(differentiable).sum().backward()


@pytest.mark.one_version
def test_a_host_sync_inside_an_operator_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swiglu_reference, "forward", lambda gate_up: gate_up * float(gate_up.sum()))
    with no_host_sync(), pytest.raises(RuntimeError, match="waits for the device"):
        swiglu(x(N, H))


@pytest.mark.one_version
@pytest.mark.parametrize(
    "wait",
    [
        lambda y: y.sum().item(),
        lambda y: bool(y.sum() > 0),
        lambda y: (y > 0).nonzero(),
        lambda y: y[y > 0],
        lambda y: y.masked_select(y > 0),
        lambda y: torch.where(y > 0),
        lambda y: y.unique(),
        lambda y: torch.equal(y, y),
        lambda y: y.detach().index_put_((y > 0,), torch.tensor(1.0)),
        lambda y: y.tolist(),
        lambda y: y.cpu(),
        lambda y: y.numpy(),
        lambda y: torch.bincount((y > 0).long().view(-1), minlength=int(y.sum())),
    ],
)
def test_a_host_sync_is_noticed(wait: Callable[[Tensor], Any]) -> None:
    y = torch.ones(3)
    with no_host_sync(), pytest.raises(RuntimeError, match="waits for the device"):
        wait(y)
