"""Every operation of kernels/ gives on CUDA what it gives on the CPU: values and gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ppomax.kernels.adamw import adamw_step
from ppomax.kernels.experience import experience
from ppomax.kernels.gae import gae
from ppomax.kernels.linear_logprobs import linear_full_kl, linear_logprobs
from ppomax.kernels.logprobs import token_logprobs
from ppomax.kernels.policy_loss import policy_loss
from ppomax.kernels.rms_norm import rms_norm
from ppomax.kernels.rope import rope
from ppomax.kernels.sampling import sample_with_margins
from ppomax.kernels.swiglu import swiglu
from ppomax.kernels.token_rewards import token_rewards
from ppomax.kernels.value_loss import value_loss
from ppomax.kernels.whiten import whiten

pytestmark = pytest.mark.gpu

B, T, N, H, V = 7, 33, 231, 48, 517
SIZES = {"BT": (B, T), "B": (B,), "N": (N,), "NH": (N, H), "VH": (V, H), "NV": (N, V), "H": (H,), "NhD": (N, 3, 16)}


def normal(size: str, seed: int) -> Tensor:
    return torch.randn(SIZES[size], generator=torch.Generator().manual_seed(seed))


def mask() -> Tensor:
    """[B, T]: ragged rows with gaps, one without any kept token."""
    kept = torch.rand(B, T, generator=torch.Generator().manual_seed(9)) < 0.7
    kept[3] = False
    return kept


def labels() -> Tensor:
    """[N]: some rows are masked."""
    drawn = torch.randint(0, V - 5, (N,), generator=torch.Generator().manual_seed(8))
    return torch.where(torch.arange(N) % 5 == 0, -1, drawn)


def token_weights() -> Tensor:
    return mask() / mask().sum()


REWARDS = {"kl_coef": 0.1, "kl_estimator": "k3"}
POLICY = {"clip": 0.2, "dual_clip": 3.0}
# name: (function, its inputs, its settings, how many of the first inputs get a gradient)
CASES: dict[str, tuple[Callable[..., Any], Sequence[Tensor], dict[str, Any], int]] = {
    "gae": (gae, (normal("BT", 1), normal("BT", 2), mask()), {"gamma": 0.99, "lam": 0.9}, 0),
    "token_rewards": (token_rewards, (normal("B", 1), normal("BT", 2), normal("BT", 3), mask()), REWARDS, 0),
    "experience": (
        experience,
        (normal("B", 1), normal("BT", 2), normal("BT", 3), normal("BT", 4), mask()),
        {"kl_coef": 0.1, "gamma": 1.0, "lam": 0.95},
        0,
    ),
    "whiten": (whiten, (normal("BT", 1), mask()), {}, 0),
    "policy_loss": (policy_loss, (normal("BT", 1), normal("BT", 2), normal("BT", 3), token_weights()), POLICY, 1),
    "policy_loss-penalty": (
        policy_loss,
        (normal("BT", 1), normal("BT", 2), normal("BT", 3), token_weights()),
        {"clip": None, "objective": "penalty", "penalty_beta": 0.1},
        1,
    ),
    "value_loss": (
        value_loss,
        (normal("BT", 1), normal("BT", 2), normal("BT", 3), token_weights()),
        {"clip": 0.2},
        1,
    ),
    "token_logprobs": (token_logprobs, (normal("NV", 1), labels()), {"vocab_size": V - 5}, 1),
    "linear_logprobs": (
        linear_logprobs,
        (normal("NH", 1), normal("VH", 2), labels()),
        {"vocab_size": V - 5, "chunk_rows": 50},
        2,
    ),
    "linear_full_kl": (
        linear_full_kl,
        (normal("NH", 1), normal("VH", 2), normal("NH", 3), normal("VH", 4)),
        {"vocab_size": V - 5},
        0,
    ),
    "rms_norm": (rms_norm, (normal("NH", 1), normal("H", 2)), {"eps": 1e-6}, 2),
    "swiglu": (swiglu, (normal("NH", 1),), {}, 1),
    "rope": (
        rope,
        (normal("NhD", 1), normal("N", 2)[:, None].expand(N, 8).cos(), normal("N", 2)[:, None].expand(N, 8).sin()),
        {},
        1,
    ),
}


def tensors(result: Any) -> list[Tensor]:
    """The tensors of a result, which may be a tensor or tuples of them."""
    return [result] if isinstance(result, Tensor) else [x for item in result for x in tensors(item)]


def results_on(device: torch.device, name: str) -> list[Tensor]:
    """Outputs of a case, then the gradients of the weighted sum of those that have one."""
    function, inputs, settings, num_differentiable = CASES[name]
    given = [
        x.detach().clone().to(device).requires_grad_(i < num_differentiable and x.is_floating_point())
        for i, x in enumerate(inputs)
    ]
    outputs = tensors(function(*given, **settings))
    differentiable = [x for x in outputs if x.requires_grad]
    if differentiable:
        ramps = [torch.linspace(-1, 2, x.numel(), device=device).view(x.shape) for x in differentiable]
        torch.autograd.backward(differentiable, ramps)
    grads = [x.grad for x in given[:num_differentiable] if x.grad is not None]
    assert len(grads) == num_differentiable
    return [x.detach().cpu() for x in (*outputs, *grads)]


@pytest.mark.parametrize("name", CASES)
def test_cuda_gives_what_the_cpu_gives(device: torch.device, name: str) -> None:
    ours, expected = results_on(device, name), results_on(torch.device("cpu"), name)
    assert len(ours) == len(expected)
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 0, "repetition_penalty": 1.1},
        {"temperature": 1.5, "top_p": 1.0, "top_k": 20, "repetition_penalty": 1.0},
    ],
    ids=["greedy", "paper", "top_k"],
)
def test_cuda_draws_the_tokens_of_the_cpu(device: torch.device, settings: dict[str, Any]) -> None:
    logits = 3 * normal("NV", 1)
    seen = torch.rand(N, V, generator=torch.Generator().manual_seed(2)) < 0.1
    seeds, positions = torch.arange(N) * 7919 + 1, torch.arange(N) % 13

    def draw(on: torch.device) -> list[Tensor]:
        inputs = {"seen": seen.to(on), "seeds": seeds.to(on), "positions": positions.to(on)}
        return [x.cpu() for x in sample_with_margins(logits.to(on), **settings, **inputs, vocab_size=V - 5)]

    tokens, logprobs, _ = draw(device)
    expected, expected_logprobs, margins = draw(torch.device("cpu"))
    clear = margins > 1e-4
    assert clear.float().mean() > 0.95
    assert torch.equal(tokens[clear], expected[clear])
    torch.testing.assert_close(logprobs[clear], expected_logprobs[clear], rtol=1e-5, atol=1e-5)


def test_cuda_takes_the_adamw_steps_of_the_cpu(device: torch.device) -> None:
    def steps(on: torch.device) -> Tensor:
        param = normal("NH", 1).to(on)
        state = [torch.zeros_like(param), torch.zeros_like(param)]
        for step in (1, 2, 3):
            grad = normal("NH", 10 + step).to(on)
            settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "step": step}
            adamw_step([param], [grad], [state[0]], [state[1]], **settings)
        return torch.stack([param, *state]).cpu()

    torch.testing.assert_close(steps(device), steps(torch.device("cpu")), rtol=1e-5, atol=1e-6)
