"""The clipped value loss against the formula written with torch operations in fp64 and differentiated by autograd."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from ppomax.kernels.value_loss import value_loss


def random_case(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values, old_values, returns, weights (one in four 0), float64."""
    generator = torch.Generator().manual_seed(seed)
    values, old, returns = 0.3 * torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    weights = torch.rand(shape, generator=generator, dtype=torch.float64)
    return values, old, returns, torch.where(torch.rand(shape, generator=generator) < 0.25, 0.0, weights)


def expected(values: Tensor, old: Tensor, returns: Tensor, weights: Tensor, *, clip: float | None) -> Tensor:
    squared = (values - returns) ** 2
    if clip is not None:
        squared = torch.max(squared, (old + (values - old).clamp(-clip, clip) - returns) ** 2)
    return (weights * squared).sum() / 2


@pytest.mark.parametrize("clip", [None, 0.01, 0.2, 5.0])
def test_loss_and_gradient_equal_autograd(clip: float | None) -> None:
    values, *others = random_case(5, 40)
    leaf, twin = values.clone().requires_grad_(), values.clone().requires_grad_()
    got, wanted = value_loss(leaf, *others, clip=clip).loss, expected(twin, *others, clip=clip)
    torch.testing.assert_close(got, wanted)
    (3 * got).backward()
    (3 * wanted).backward()
    torch.testing.assert_close(leaf.grad, twin.grad)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_gradcheck_passes(clip: float | None) -> None:
    values, *others = random_case(30)
    assert gradcheck(lambda x: value_loss(x, *others, clip=clip).loss, (values.requires_grad_(),))


@pytest.mark.parametrize(
    ("value", "loss", "grad", "clipped"),
    [
        (0.1, 0.405, -0.9, 0.0),  # inside the clip range
        (0.5, 0.32, 0.0, 1.0),  # clamped to 0.2, which is further from the return 1
        (-0.5, 1.125, -1.5, 0.0),  # clamped to -0.2, which is nearer: the plain error counts
    ],
    ids=["free", "clipped", "worse than clipped"],
)
def test_hand_worked_token(value: float, loss: float, grad: float, clipped: float) -> None:
    x = torch.tensor([value], requires_grad=True)
    result = value_loss(x, torch.zeros(1), torch.ones(1), torch.ones(1), clip=0.2)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(loss, rel=1e-5)
    assert result.clip_fraction.item() == clipped
    assert x.grad is not None
    assert x.grad.item() == pytest.approx(grad, abs=1e-6)


def test_exact_tie_takes_half_the_gradient_as_autograd_does() -> None:
    x, y = (torch.tensor([1.75], requires_grad=True) for _ in range(2))
    others = torch.zeros(1), torch.ones(1), torch.ones(1)
    value_loss(x, *others, clip=0.25).loss.backward()
    expected(y, *others, clip=0.25).backward()
    assert x.grad is not None
    assert x.grad.item() == 0.375
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_tokens_of_weight_zero_are_not_read(garbage: float, clip: float | None) -> None:
    values, old, returns, weights = random_case(5, 12)
    leaf, dirty_old, dirty_returns = (torch.where(weights != 0, x, garbage) for x in (values, old, returns))
    leaf.requires_grad_()
    got = value_loss(leaf, dirty_old, dirty_returns, weights, clip=clip)
    torch.testing.assert_close(got, value_loss(values, old, returns, weights, clip=clip))
    (grad,) = torch.autograd.grad(got.loss, leaf)
    assert (grad[weights == 0] == 0).all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0,), (2, 0), (3,)])
def test_nothing_to_keep_gives_zero_loss_and_gradient(shape: tuple[int, ...]) -> None:
    x = torch.full(shape, math.nan, requires_grad=True)
    result = value_loss(x, x.detach(), x.detach(), torch.zeros(shape), clip=0.2)
    result.loss.backward()
    assert result.loss == 0
    assert result.clip_fraction == 0
    assert x.grad is not None
    assert (x.grad == 0).all()


def test_nan_of_a_kept_token_shows_in_the_loss() -> None:
    x = torch.tensor([math.nan, 0.0])
    assert value_loss(x, torch.zeros(2), torch.ones(2), torch.ones(2), clip=0.2).loss.isnan()


def test_bf16_values_give_fp32_loss_and_bf16_gradient() -> None:
    narrow = [x.bfloat16() for x in random_case(100)]
    leaf, twin = narrow[0].clone().requires_grad_(), narrow[0].double().requires_grad_()
    got = value_loss(leaf, *narrow[1:], clip=0.2).loss
    wanted = expected(twin, *(x.double() for x in narrow[1:]), clip=0.2)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
    (grad,), (wanted_grad,) = torch.autograd.grad(got, leaf), torch.autograd.grad(wanted, twin)
    assert grad.dtype == torch.bfloat16
    assert (grad.double() - wanted_grad).norm() <= 8e-3 * wanted_grad.norm()


def test_wrong_arguments_are_named() -> None:
    values, old, returns, weights = random_case(4)
    with pytest.raises(ValueError, match="expected one shape"):
        value_loss(values, old, returns, weights[:3], clip=0.2)
    with pytest.raises(ValueError, match="must be positive or None"):
        value_loss(values, old, returns, weights, clip=0.0)
