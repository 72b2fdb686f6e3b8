"""The fused value head against hidden @ weight and the clipped loss in fp64, differentiated by autograd."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.library import opcheck

from ppomax.kernels.value_head_loss import value_head_loss
from ppomax.kernels.value_loss import value_loss

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def random_case(N: int, H: int, *, seed: int = 0) -> Case:
    """hidden [N, H], weight [H], old_values, returns and weights [N] (one in four 0), float64; values of 0.3 or so."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64)
    weight = 0.3 * torch.randn(H, generator=generator, dtype=torch.float64) / H**0.5
    old, returns = 0.3 * torch.randn(2, N, generator=generator, dtype=torch.float64)
    weights = torch.rand(N, generator=generator, dtype=torch.float64)
    return hidden, weight, old, returns, torch.where(torch.rand(N, generator=generator) < 0.25, 0.0, weights)


def expected(
    hidden: Tensor, weight: Tensor, old: Tensor, returns: Tensor, weights: Tensor, *, clip: float | None
) -> Any:
    values = (hidden * weight).sum(dim=1)
    squared = (values - returns) ** 2
    if clip is not None:
        squared = torch.max(squared, (values.clamp(old - clip, old + clip) - returns) ** 2)
    return (weights * squared).sum() / 2


def with_gradients_of(
    call: Callable[..., Any], hidden: Tensor, weight: Tensor, *others: Tensor, **options: Any
) -> list:
    """[loss, d loss / d hidden, d loss / d weight]."""
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    result = call(*leaves, *others, **options)
    loss = result if isinstance(result, Tensor) else result.loss
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


# In the interpreter 4 programs take 8 rows at a time: 37 rows are two turns of the first one.
@pytest.mark.parametrize("clip", [None, 0.01, 0.2, 5.0])
@pytest.mark.parametrize(("N", "H"), [(1, 1), (1, 8), (7, 37), (37, 64), (5, 130)])
def test_loss_and_gradients_equal_autograd(N: int, H: int, clip: float | None) -> None:
    case = random_case(N, H)
    got, wanted = (with_gradients_of(call, *case, clip=clip) for call in (value_head_loss, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_rows_longer_than_a_programs_share_are_taken_one_by_one() -> None:
    case = random_case(6, 9000)
    got, wanted = (with_gradients_of(call, *case, clip=0.2) for call in (value_head_loss, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_metrics_and_values_are_those_of_the_separate_head_and_loss() -> None:
    hidden, weight, *others = random_case(37, 20)
    got = value_head_loss(hidden.requires_grad_(), weight.requires_grad_(), *others, clip=0.1)
    values = hidden @ weight
    wanted = value_loss(values, *others, clip=0.1)
    torch.testing.assert_close(list(got[:2]), list(wanted))
    torch.testing.assert_close(got.values, torch.where(others[2] != 0, values, 0))
    assert got.loss.requires_grad
    assert not got.clip_fraction.requires_grad
    assert not got.values.requires_grad


@pytest.mark.parametrize("clip", [None, 0.2])
def test_gradcheck_passes(clip: float | None) -> None:
    hidden, weight, *others = random_case(9, 6)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    assert gradcheck(lambda h, w: value_head_loss(h, w, *others, clip=clip).loss, leaves, fast_mode=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 4e-3)])
def test_narrow_inputs_are_computed_in_fp32_and_rounded_once(dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, *others = random_case(37, 100)
    narrow = hidden.to(dtype), weight.to(dtype), *(x.float() for x in others)
    got = with_gradients_of(value_head_loss, *narrow, clip=0.2)
    wanted = with_gradients_of(expected, *(x.double() for x in narrow), clip=0.2)
    assert [x.dtype for x in got] == [torch.float32, dtype, dtype]
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=1e-6, atol=0)
    for mine, other in zip(got[1:], wanted[1:], strict=True):
        assert (mine.double() - other).norm() <= tolerance * other.norm()
    if dtype != torch.float32:
        assert (got[1] == wanted[1].to(dtype)).double().mean() > 0.99
        assert (got[2] == wanted[2].to(dtype)).double().mean() > 0.97


def test_the_weight_may_have_a_leading_one_and_another_dtype() -> None:
    hidden, weight, *others = random_case(7, 12)
    got = with_gradients_of(value_head_loss, hidden.bfloat16(), weight[None].float(), *others, clip=0.2)
    wanted = with_gradients_of(expected, hidden.bfloat16().double(), weight.float().double(), *others, clip=0.2)
    assert got[2].shape == (1, 12)
    assert got[2].dtype == torch.float32
    torch.testing.assert_close(got[2][0].double(), wanted[2], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_rows_of_weight_zero_are_not_read(garbage: float, clip: float | None) -> None:
    hidden, weight, old, returns, weights = random_case(19, 12)
    is_kept = weights != 0
    dirty = (
        torch.where(is_kept[:, None], hidden, garbage),
        weight,
        *(torch.where(is_kept, x, garbage) for x in (old, returns)),
        weights,
    )
    got = with_gradients_of(value_head_loss, *dirty, clip=clip)
    torch.testing.assert_close(got, with_gradients_of(expected, *random_case(19, 12), clip=clip))
    assert (got[1][~is_kept] == 0).all()
    assert (value_head_loss(*dirty, clip=clip).values[~is_kept] == 0).all()


@pytest.mark.parametrize("N", [0, 3])
def test_nothing_to_keep_gives_zero_loss_and_gradients(N: int) -> None:
    x, nan = torch.full((N, 5), math.nan), torch.full((N,), math.nan)
    weight = torch.ones(1, 5)
    loss, grad_hidden, grad_weight = with_gradients_of(value_head_loss, x, weight, nan, nan, torch.zeros(N), clip=0.2)
    assert loss == 0
    assert grad_hidden.shape == (N, 5)
    assert (grad_hidden == 0).all()
    assert grad_weight.shape == (1, 5)
    assert (grad_weight == 0).all()


@pytest.mark.parametrize("broken", range(5))
def test_nan_of_a_kept_token_shows_in_the_loss(broken: int) -> None:
    case = list(random_case(3, 4))
    case[4] = torch.ones(3, dtype=torch.float64)
    case[broken].view(-1)[1] = math.nan
    assert value_head_loss(*case, clip=0.2).loss.isnan()


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_tiny_and_huge_values_keep_their_precision(scale: float) -> None:
    hidden, weight, old, returns, weights = random_case(19, 40)
    case = [x.float() for x in (hidden, scale * weight, scale * old, scale * returns, weights)]
    got = with_gradients_of(value_head_loss, *case, clip=0.2 * scale)
    wanted = with_gradients_of(expected, *(x.double() for x in case), clip=0.2 * scale)
    for mine, other in zip(got, wanted, strict=True):
        assert (mine.double() - other).norm() <= 2e-6 * other.norm()


def test_gradients_can_be_handed_on_unscaled() -> None:
    hidden, weight, *others = random_case(7, 12)
    unscaled = with_gradients_of(value_head_loss, hidden, weight, *others, clip=0.2, upstream_is_one=True)
    torch.testing.assert_close(unscaled, with_gradients_of(expected, hidden, weight, *others, clip=0.2))
    loss = value_head_loss(hidden.requires_grad_(), weight, *others, clip=0.2, upstream_is_one=True).loss
    with pytest.raises(RuntimeError, match="scaled"):
        (2 * loss).backward()


def test_inputs_may_have_gaps_in_memory() -> None:
    hidden, weight, old, returns, weights = random_case(11, 6)
    wanted = with_gradients_of(expected, hidden, weight, old, returns, weights, clip=0.2)
    spaced = [torch.full((11, 3), math.nan, dtype=torch.float64) for _ in range(3)]
    for wide, x in zip(spaced, (old, returns, weights), strict=True):
        wide[:, 1] = x
    others = [wide[:, 1] for wide in spaced]
    head = weight.repeat_interleave(2)[::2]
    for leaf in (torch.full((11, 9), math.nan).double(), torch.full((9, 11), math.nan).double()):
        view = leaf[:, 2:8] if leaf.shape == (11, 9) else leaf.t()[:, 2:8]
        view.copy_(hidden)
        leaf.requires_grad_()
        view = leaf[:, 2:8] if leaf.shape == (11, 9) else leaf.t()[:, 2:8]
        loss = value_head_loss(view, head, *others, clip=0.2).loss
        (grad,) = torch.autograd.grad(loss, leaf)
        grad = grad if leaf.shape == (11, 9) else grad.t()
        torch.testing.assert_close([loss.detach(), grad[:, 2:8]], wanted[:2])
        assert (grad[:, :2] == 0).all()


def test_every_entry_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(37, 13)
    wanted = with_gradients_of(expected, *case, clip=0.2)

    def poisoned(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: original(*args, **kwargs).fill_(math.nan)

    for holder, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(holder, name, poisoned(getattr(holder, name)))
    torch.testing.assert_close(with_gradients_of(value_head_loss, *case, clip=0.2), wanted, rtol=1e-12, atol=1e-12)
    assert value_head_loss(*case, clip=0.2).values.isfinite().all()


def test_two_runs_agree_bit_for_bit() -> None:
    case = [x.float() for x in random_case(70, 40)]
    runs = [[*with_gradients_of(value_head_loss, *case, clip=0.2), *value_head_loss(*case, clip=0.2)] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("clip", [None, 0.2])
def test_compiled_whole_it_gives_the_same(clip: float | None) -> None:
    case = random_case(9, 13)
    compiled = torch.compile(value_head_loss, fullgraph=True, backend="aot_eager")
    got, wanted = (with_gradients_of(call, *case, clip=clip) for call in (compiled, value_head_loss))
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_operator_keeps_pytorchs_rules() -> None:
    opcheck(torch.ops.ppomax.value_head_loss.default, (*random_case(3, 5), 0.2))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), left=st.integers(0, 3), right=st.integers(0, 3), cut=st.integers(0, 6))
def test_order_padding_and_parts_of_rows_do_not_matter(seed: int, left: int, right: int, cut: int) -> None:
    hidden, weight, *others = random_case(6, 4, seed=seed)
    loss, grad_hidden, grad_weight = with_gradients_of(value_head_loss, hidden, weight, *others, clip=0.2)
    rows = torch.tensor([3, 1, 5, 0, 2, 4])
    pad = torch.nn.functional.pad
    moved = [pad(x[rows], (left, right), value=v) for x, v in zip(others, (math.nan, math.nan, 0.0), strict=True)]
    states = pad(hidden[rows], (0, 0, left, right), value=math.nan)
    found = with_gradients_of(value_head_loss, states, weight, *moved, clip=0.2)
    torch.testing.assert_close(found, [loss, pad(grad_hidden[rows], (0, 0, left, right)), grad_weight])
    parts = [
        with_gradients_of(value_head_loss, hidden[part], weight, *(x[part] for x in others), clip=0.2)
        for part in (slice(0, cut), slice(cut, 6))
    ]
    torch.testing.assert_close([parts[0][0] + parts[1][0], parts[0][2] + parts[1][2]], [loss, grad_weight])
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]), grad_hidden)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({0: torch.ones(4)}, "expected"),
        ({1: torch.ones(4)}, "expected"),
        ({1: torch.ones(5, 1)}, "expected"),
        ({3: torch.ones(3)}, "expected"),
        ({4: torch.ones(4, 1)}, "expected"),
    ],
    ids=["hidden", "weight", "weight [H, 1]", "returns", "weights"],
)
def test_wrong_shapes_are_named(change: dict[int, Tensor], match: str) -> None:
    case = [change.get(i, x) for i, x in enumerate(random_case(4, 5))]
    with pytest.raises(ValueError, match=match):
        value_head_loss(*case, clip=0.2)


def test_a_clip_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match=r"value_head_loss: clip 0\.0 must be positive or None"):
        value_head_loss(*random_case(4, 5), clip=0.0)
