"""Masked moments, their merging, and whitening, against torch.var on the kept entries."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ppomax.kernels import whiten as whiten_file
from ppomax.kernels.whiten import Moments, masked_moments, merge_moments, whiten


def random_case(B: int = 4, T: int = 11, *, seed: int = 0, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, generator=generator) + offset, torch.rand(B, T, generator=generator) < 0.6


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_equal_torch(offset: float) -> None:
    x, mask = random_case(offset=offset)
    kept = x[mask].double()
    moments = masked_moments(x, mask)
    assert moments.count.item() == kept.numel()
    assert moments.mean.item() == pytest.approx(kept.mean().item(), rel=1e-12)
    assert moments.m2.item() == pytest.approx((kept - kept.mean()).square().sum().item(), rel=1e-9)
    assert {m.dtype for m in moments} == {torch.float64}


@pytest.mark.parametrize("unbiased", [False, True])
def test_whitened_entries_have_mean_zero_and_variance_one(unbiased: bool) -> None:
    x, mask = random_case(offset=3.0)
    out = whiten(x, mask, unbiased=unbiased, eps=0.0)
    assert out[mask].mean().abs() < 1e-6
    assert out[mask].var(unbiased=unbiased).item() == pytest.approx(1.0, abs=1e-5)


def test_mean_can_be_left_where_it_is() -> None:
    x, mask = random_case(offset=3.0)
    out = whiten(x, mask, shift_mean=False)
    torch.testing.assert_close(out, torch.where(mask, whiten(x, mask) + x[mask].mean(), 0.0), rtol=1e-5, atol=1e-5)


def test_whitening_whitened_entries_changes_nothing() -> None:
    x, mask = random_case(offset=3.0)
    once = whiten(x, mask, eps=0.0)
    torch.testing.assert_close(whiten(once, mask, eps=0.0), once, rtol=1e-6, atol=1e-6)


def test_given_moments_are_used() -> None:
    x, mask = random_case()
    moments = Moments(*(torch.tensor(v, dtype=torch.float64) for v in (10.0, 1.0, 40.0)))
    torch.testing.assert_close(whiten(x, mask, moments=moments, eps=0.0), torch.where(mask, (x - 1) / 2, 0.0))


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_dropped_entries_are_not_read_and_become_zero(garbage: float) -> None:
    x, mask = random_case()
    wanted = whiten(x, mask)
    out = whiten(torch.where(mask, x, garbage), mask)
    torch.testing.assert_close(out, wanted)
    assert (out[~mask] == 0).all()


@pytest.mark.parametrize("unbiased", [False, True])
def test_no_entry_and_one_entry_are_finite(unbiased: bool) -> None:
    x, mask = random_case()
    assert (whiten(x, mask & False, unbiased=unbiased) == 0).all()
    single = torch.zeros_like(mask)
    single[1, 2] = True
    assert (whiten(x, single, unbiased=unbiased) == 0).all()


def test_results_are_constants() -> None:
    x, mask = random_case()
    assert not whiten(x.requires_grad_(), mask).requires_grad


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), rows=st.integers(0, 4))
def test_merged_parts_equal_the_whole_in_any_order(seed: int, rows: int) -> None:
    x, mask = random_case(seed=seed, offset=5.0)
    parts = masked_moments(x[:rows], mask[:rows]), masked_moments(x[rows:], mask[rows:])
    whole = masked_moments(x, mask)
    for merged in (merge_moments(*parts), merge_moments(*parts[::-1])):
        torch.testing.assert_close(tuple(merged), tuple(whole), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (1,), (2500,), (3, 0), (2, 3, 4)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.8
    kept = x[mask].double()
    moments = masked_moments(x, mask)
    assert moments.count.item() == kept.numel()
    variance = kept.var(correction=0) if kept.numel() else torch.zeros(())
    mean = kept.mean() if kept.numel() else 0.0
    wanted = torch.where(mask, (x.double() - mean) * torch.rsqrt(variance + 1e-6), 0.0)
    torch.testing.assert_close(whiten(x, mask).double(), wanted, rtol=2e-6, atol=2e-6)


def test_strided_tensors_of_several_blocks() -> None:
    x, mask = random_case(3, 2100)
    apart = torch.nn.functional.pad(x, (3, 9), value=math.nan)[:, 3:2103]
    columns = mask.t().contiguous().t()
    torch.testing.assert_close(tuple(masked_moments(apart, columns)), tuple(masked_moments(x, mask)))
    torch.testing.assert_close(whiten(apart, columns), whiten(x, mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    x, mask = random_case()
    x = x.to(dtype)
    out = whiten(x, mask)
    kept = x[mask].double()
    wanted = (x.double() - kept.mean()) * torch.rsqrt(kept.var(correction=0) + 1e-6)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-7 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(out.double(), torch.where(mask, wanted, 0.0), rtol=tolerance, atol=tolerance)


def test_a_large_mean_costs_no_precision() -> None:
    x, mask = random_case(offset=8192.0)
    kept = x[mask].double()
    wanted = torch.where(mask, (x.double() - kept.mean()) * torch.rsqrt(kept.var(correction=0) + 1e-6), 0.0)
    torch.testing.assert_close(whiten(x, mask).double(), wanted, rtol=2e-6, atol=2e-6)


def test_every_entry_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    x, mask = random_case()
    wanted, moments = whiten(x, mask), masked_moments(x, mask)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(math.nan))
    torch.testing.assert_close(whiten(x, mask), wanted, rtol=0, atol=0)
    torch.testing.assert_close(tuple(masked_moments(x, mask)), tuple(moments), rtol=0, atol=0)


def test_compiles_as_one_graph_and_is_a_sound_operator() -> None:
    x, mask = random_case()
    compiled = torch.compile(lambda x: whiten(x, mask), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), whiten(x, mask), rtol=0, atol=0)
    torch.library.opcheck(whiten_file._masked_moments, (x, mask))
    torch.library.opcheck(whiten_file._whiten, (x, mask, *masked_moments(x, mask), True, False, 1e-6))


def test_unequal_shapes_are_named() -> None:
    x, mask = random_case()
    with pytest.raises(ValueError, match="expected one shape"):
        whiten(x, mask[:2])
