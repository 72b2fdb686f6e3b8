"""The clipped value loss against the formula written with torch operations in fp64 and differentiated by autograd."""

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.library import opcheck

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


def use_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 tokens and partial sums 2 at a time, so that a few tokens already span several of both."""
    monkeypatch.setattr(import_module("ppomax.kernels.value_loss_triton"), "BLOCK", 16)
    monkeypatch.setattr(import_module("ppomax.kernels.partial_sums_triton"), "BLOCK", 2)


def loss_and_gradient(call: Callable[..., Any], values: Tensor, *others: Tensor, clip: float | None) -> list[Tensor]:
    leaf = values.detach().clone().requires_grad_()
    result = call(leaf, *others, clip=clip)
    loss = result if isinstance(result, Tensor) else result.loss
    return [loss.detach(), *torch.autograd.grad(loss, leaf)]


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
    assert gradcheck(lambda x: value_loss(x, *others, clip=clip).loss, (values.requires_grad_(),), fast_mode=True)


@pytest.mark.parametrize("shape", [(1,), (15,), (16,), (17,), (3, 21)])
def test_blocks_add_up_and_their_edges_are_right(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)
    case = random_case(*shape)
    got, wanted = (loss_and_gradient(call, *case, clip=0.2) for call in (value_loss, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_long_sums_keep_fp32_precision() -> None:
    case = [x.float() for x in random_case(5000)]
    got, wanted = value_loss(*case, clip=0.2), value_loss(*(x.double() for x in case), clip=0.2)
    torch.testing.assert_close([x.double() for x in got], list(wanted), rtol=1e-6, atol=0)


def test_clip_fraction_sums_the_weights_of_clipped_tokens() -> None:
    values, old, returns, weights = random_case(60)
    bounded = values.clamp(old - 0.2, old + 0.2)
    is_clipped = (bounded - returns).abs() > (values - returns).abs()
    got = value_loss(values.requires_grad_(), old, returns, weights, clip=0.2).clip_fraction
    torch.testing.assert_close(got, weights[is_clipped].sum())
    assert 0 < got < weights.sum()
    assert not got.requires_grad


def test_inputs_may_have_gaps_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)
    case = random_case(7, 10)
    leaves = [torch.full((10, 7, 3), math.nan, dtype=torch.float64, requires_grad=i == 0) for i in range(4)]
    views = [leaf[..., 1].t() for leaf in leaves]
    with torch.no_grad():
        for view, x in zip(views, case, strict=True):
            view.copy_(x)
    got = value_loss(*views, clip=0.2).loss
    (grad,) = torch.autograd.grad(got, leaves[0])
    torch.testing.assert_close([got.detach(), grad[..., 1].t()], loss_and_gradient(expected, *case, clip=0.2))
    assert (grad[..., ::2] == 0).all()


def test_every_entry_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)
    case = random_case(5, 13)
    wanted = loss_and_gradient(expected, *case, clip=0.2)

    def poisoned(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: original(*args, **kwargs).fill_(math.nan)

    for holder, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(holder, name, poisoned(getattr(holder, name)))
    torch.testing.assert_close(loss_and_gradient(value_loss, *case, clip=0.2), wanted, rtol=1e-12, atol=1e-12)


def test_two_runs_agree_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)
    case = [x.float() for x in random_case(5, 13)]
    runs = [[*loss_and_gradient(value_loss, *case, clip=0.2), value_loss(*case, clip=0.2)[1]] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("clip", [None, 0.2])
def test_compiled_whole_it_gives_the_same(clip: float | None) -> None:
    case = random_case(5, 13)
    compiled = torch.compile(value_loss, fullgraph=True, backend="aot_eager")
    got, wanted = (loss_and_gradient(call, *case, clip=clip) for call in (compiled, value_loss))
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_operator_keeps_pytorchs_rules() -> None:
    opcheck(torch.ops.ppomax.value_loss.default, (*random_case(3, 5), 0.2))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_tiny_and_huge_values_keep_their_precision(scale: float) -> None:
    *values, weights = random_case(30)
    case = [*((scale * x).float() for x in values), weights.float()]
    got = loss_and_gradient(value_loss, *case, clip=0.2 * scale)
    wanted = loss_and_gradient(expected, *(x.double() for x in case), clip=0.2 * scale)
    torch.testing.assert_close([x.double() for x in got], wanted, rtol=2e-6, atol=1e-7 * scale)
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=2e-6, atol=0)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), left=st.integers(0, 3), right=st.integers(0, 3), cut=st.integers(0, 10))
def test_order_padding_and_parts_of_tokens_do_not_matter(seed: int, left: int, right: int, cut: int) -> None:
    case = random_case(2, 5, seed=seed)
    loss, grad = loss_and_gradient(value_loss, *case, clip=0.2)
    rows = torch.tensor([1, 0])
    fill = (math.nan, math.nan, math.nan, 0.0)
    moved = [torch.nn.functional.pad(x[rows], (left, right), value=f) for x, f in zip(case, fill, strict=True)]
    moved_loss, moved_grad = loss_and_gradient(value_loss, *moved, clip=0.2)
    torch.testing.assert_close(moved_loss, loss)
    assert torch.equal(moved_grad, torch.nn.functional.pad(grad[rows], (left, right)))
    flat = [x.flatten() for x in case]
    parts = [value_loss(*(x[part] for x in flat), clip=0.2).loss for part in (slice(0, cut), slice(cut, 10))]
    torch.testing.assert_close(parts[0] + parts[1], loss)


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


@pytest.mark.parametrize("broken", [0, 1, 2, 3])
def test_nan_of_a_kept_token_shows_in_the_loss(broken: int) -> None:
    case = [torch.zeros(2), torch.zeros(2), torch.ones(2), torch.ones(2)]
    case[broken][0] = math.nan
    assert value_loss(*case, clip=0.2).loss.isnan()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 4e-3)])
def test_narrow_values_give_fp32_loss_and_their_own_gradient_type(dtype: torch.dtype, tolerance: float) -> None:
    narrow = [x.to(dtype) for x in random_case(100)]
    leaf, twin = narrow[0].clone().requires_grad_(), narrow[0].double().requires_grad_()
    got = value_loss(leaf, *narrow[1:], clip=0.2).loss
    wanted = expected(twin, *(x.double() for x in narrow[1:]), clip=0.2)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=0)
    (grad,), (wanted_grad,) = torch.autograd.grad(got, leaf), torch.autograd.grad(wanted, twin)
    assert grad.dtype == dtype
    assert (grad.double() - wanted_grad).norm() <= tolerance * wanted_grad.norm()


def test_wrong_arguments_are_named() -> None:
    values, old, returns, weights = random_case(4)
    with pytest.raises(ValueError, match="expected one shape"):
        value_loss(values, old, returns, weights[:3], clip=0.2)
    with pytest.raises(ValueError, match="must be positive or None"):
        value_loss(values, old, returns, weights, clip=0.0)
