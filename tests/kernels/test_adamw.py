"""The AdamW step against torch.optim.AdamW over several updates, and a hand-worked first one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ppomax.kernels.adamw import adamw_step

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6}


def random_tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for size in (1, 7, 64)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_five_steps_equal_torch(weight_decay: float) -> None:
    params = random_tensors(0)
    twins = [torch.nn.Parameter(x.clone()) for x in params]
    optimizer = torch.optim.AdamW(twins, weight_decay=weight_decay, **SETTINGS)
    averages, squares = ([torch.zeros_like(x) for x in params] for _ in range(2))
    for step in range(1, 6):
        grads = random_tensors(step)
        adamw_step(params, grads, averages, squares, weight_decay=weight_decay, step=step, **SETTINGS)
        for twin, grad in zip(twins, grads, strict=True):
            twin.grad = grad.clone()
        optimizer.step()
        torch.testing.assert_close(params, [twin.data for twin in twins], rtol=1e-6, atol=1e-7)


def test_first_step_moves_by_the_learning_rate() -> None:
    params, grads = [torch.tensor([1.0, 1.0])], [torch.tensor([1e-3, -50.0])]
    adamw_step(
        params, grads, [torch.zeros(2)], [torch.zeros(2)], weight_decay=0.5, step=1, **{**SETTINGS, "eps": 1e-12}
    )
    # Bias correction makes the first update sign(g) * lr; the decay takes lr * 0.5 of the parameter.
    torch.testing.assert_close(params[0], torch.tensor([1 - 0.005 - 0.01, 1 - 0.005 + 0.01]))


def test_bf16_gradients_update_fp32_state() -> None:
    params = random_tensors(0)
    twins = [x.clone() for x in params]
    grads = [x.bfloat16() for x in random_tensors(1)]
    for tensors, gradients in ((params, grads), (twins, [x.float() for x in grads])):
        state = [[torch.zeros_like(x) for x in tensors] for _ in range(2)]
        adamw_step(tensors, gradients, *state, weight_decay=0.0, step=1, **SETTINGS)
        assert {x.dtype for x in tensors} == {torch.float32}
    torch.testing.assert_close(params, twins, rtol=0, atol=0)


def test_gradients_and_autograd_are_left_alone() -> None:
    params = [torch.ones(3, requires_grad=True)]
    grads = [torch.full((3,), 2.0)]
    adamw_step(params, grads, [torch.zeros(3)], [torch.zeros(3)], weight_decay=0.0, step=1, **SETTINGS)
    assert (grads[0] == 2).all()
    assert params[0].is_leaf


def test_nothing_to_update_is_fine() -> None:
    adamw_step([], [], [], [], weight_decay=0.0, step=1, **SETTINGS)


def test_wrong_arguments_are_named() -> None:
    x = [torch.zeros(2)]
    with pytest.raises(ValueError, match="equally many"):
        adamw_step(x, [], x, x, weight_decay=0.0, step=1, **SETTINGS)
    with pytest.raises(ValueError, match="must count from 1"):
        adamw_step(x, x, x, x, weight_decay=0.0, step=0, **SETTINGS)
