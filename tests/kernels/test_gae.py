"""Advantages and returns against a plain loop over tokens in fp64, and the invariants of the recursion."""

import math
import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ppomax.kernels import gae as gae_file
from ppomax.kernels.gae import gae

NAN = math.nan


def looped(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float, bootstrap: Tensor | None = None
) -> Tensor:
    """Advantages by the definition: row by row, from the last kept token to the first, in python floats."""
    advantages = torch.zeros(rewards.shape, dtype=torch.float64)
    for b in range(rewards.shape[0]):
        next_value = 0.0 if bootstrap is None else bootstrap[b].item()
        next_advantage = 0.0
        for t in reversed(mask[b].nonzero().flatten().tolist()):
            delta = rewards[b, t].item() + gamma * next_value - values[b, t].item()
            next_advantage = delta + gamma * lam * next_advantage
            next_value = values[b, t].item()
            advantages[b, t] = next_advantage
    return advantages


def random_case(B: int, T: int, *, density: float = 0.7, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rewards, values [B, T], a mask with gaps [B, T], bootstrap [B]."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, B, T, generator=generator)
    return rewards, values, torch.rand(B, T, generator=generator) < density, torch.randn(B, generator=generator)


def assert_near(got: Tensor, wanted: Tensor) -> None:
    """To fp32's rounding of each entry (the reference computes in fp64), or of the largest one (Triton, in fp32)."""
    scale = max(1.0, wanted.abs().max().item()) if os.environ.get("PPOMAX_KERNELS") != "reference" else 1.0
    rtol, atol = (2e-7, 1e-6) if scale == 1.0 else (2e-6, 1e-6 * scale)
    torch.testing.assert_close(got.double(), wanted, rtol=rtol, atol=atol)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a few dozen tokens take several blocks."""
    if os.environ.get("PPOMAX_KERNELS") != "reference":
        from ppomax.kernels import token_rewards_triton

        monkeypatch.setattr(token_rewards_triton, "FEW_ROWS_BLOCK", 16)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (1.0, 1.0), (0.99, 0.9), (1.0, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 2), (8, 50), (3, 64), (2, 129), (2, 1000)])
@pytest.mark.parametrize("density", [1.0, 0.6])
def test_equals_the_loop(B: int, T: int, gamma: float, lam: float, density: float) -> None:
    rewards, values, mask, bootstrap = random_case(B, T, density=density)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap=bootstrap)
    wanted = looped(rewards, values, mask, gamma=gamma, lam=lam, bootstrap=bootstrap)
    assert advantages.dtype == returns.dtype == torch.float32
    assert_near(advantages, wanted)
    assert_near(returns, torch.where(mask, wanted + values.double(), 0))


def test_hand_worked_row_with_a_gap() -> None:
    # gamma = 1, lam = 1/2: delta_2 = 1 + 0 - 3 = -2, delta_0 = 0 + 3 - 1 = 2, A_0 = 2 + (-2) / 2.
    advantages, returns = gae(
        torch.tensor([[0.0, NAN, 1.0]]),
        torch.tensor([[1.0, NAN, 3.0]]),
        torch.tensor([[True, False, True]]),
        gamma=1.0,
        lam=0.5,
    )
    torch.testing.assert_close(advantages, torch.tensor([[1.0, 0.0, -2.0]]))
    torch.testing.assert_close(returns, torch.tensor([[2.0, 0.0, 1.0]]))


@pytest.mark.parametrize("garbage", [NAN, math.inf, -math.inf])
def test_nothing_outside_the_mask_is_read(garbage: float) -> None:
    rewards, values, mask, bootstrap = random_case(4, 70)
    mask[2] = False
    bootstrap[2] = garbage
    wanted = looped(rewards, values, mask, gamma=1.0, lam=0.9, bootstrap=bootstrap)
    rewards, values = torch.where(mask, rewards, garbage), torch.where(mask, values, garbage)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.9, bootstrap=bootstrap)
    assert_near(advantages, wanted)
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()


def test_empty_batch_and_empty_rows_give_zeros() -> None:
    for shape in ((0, 5), (2, 0)):
        empty = torch.zeros(shape)
        assert gae(empty, empty, empty.bool(), gamma=1.0, lam=0.9)[0].shape == shape
    rewards, values, mask, bootstrap = random_case(3, 5)
    for result in gae(rewards, values, mask & False, gamma=1.0, lam=0.9, bootstrap=bootstrap):
        assert (result == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_give_fp32_results(dtype: torch.dtype) -> None:
    rewards, values, mask, _ = random_case(2, 20)
    rewards, values = rewards.to(dtype), values.to(dtype)
    advantages, _ = gae(rewards, values, mask, gamma=1.0, lam=0.9)
    assert advantages.dtype == torch.float32
    assert_near(advantages, looped(rewards, values, mask, gamma=1.0, lam=0.9))


def test_results_are_constants() -> None:
    rewards, values, mask, _ = random_case(2, 5)
    for result in gae(rewards, values.requires_grad_(), mask, gamma=1.0, lam=0.9):
        assert not result.requires_grad


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (1.0, 1.0), (0.9, 1e-5), (1.0, 1e-9), (0.0, 0.5)])
@pytest.mark.parametrize("density", [1.0, 0.6, 0.1])
@pytest.mark.usefixtures("small_blocks")
def test_fp64_rows_of_several_blocks(gamma: float, lam: float, density: float) -> None:
    rewards, values, mask, bootstrap = random_case(3, 77, density=density)
    advantages, _ = gae(rewards.double(), values.double(), mask, gamma=gamma, lam=lam, bootstrap=bootstrap.double())
    wanted = looped(rewards, values, mask, gamma=gamma, lam=lam, bootstrap=bootstrap)
    torch.testing.assert_close(advantages, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lam", [0.95, 1.0])
def test_rows_of_64k_tokens(lam: float) -> None:
    rewards, values, mask, bootstrap = random_case(1, 65536, density=0.9)
    advantages, _ = gae(rewards, values, mask, gamma=1.0, lam=lam, bootstrap=bootstrap)
    assert_near(advantages, looped(rewards, values, mask, gamma=1.0, lam=lam, bootstrap=bootstrap))


def test_large_values_cost_no_precision() -> None:
    # Values around 8192 are 2^-10 apart in fp32: rounded once, their differences are exact.
    rewards, values, mask, _ = random_case(2, 100, density=1.0)
    values += 8192.0
    bootstrap = torch.full((2,), 8192.0)
    advantages, _ = gae(rewards, values, mask, gamma=1.0, lam=0.9, bootstrap=bootstrap)
    wanted = looped(rewards, values, mask, gamma=1.0, lam=0.9, bootstrap=bootstrap)
    torch.testing.assert_close(advantages.double(), wanted, rtol=2e-6, atol=5e-6)


def test_huge_magnitudes_stay_finite() -> None:
    rewards, values, mask, bootstrap = (x if x.dtype == torch.bool else x * 1e30 for x in random_case(2, 40))
    advantages, _ = gae(rewards, values, mask, gamma=1.0, lam=0.0, bootstrap=bootstrap)
    wanted = looped(rewards, values, mask, gamma=1.0, lam=0.0, bootstrap=bootstrap)
    torch.testing.assert_close(advantages.double(), wanted, rtol=2e-6, atol=1e24)


@pytest.mark.usefixtures("small_blocks")
def test_rows_may_be_apart_and_columns_too() -> None:
    rewards, values, mask, bootstrap = random_case(3, 37)
    wide_rows = torch.full((3, 50), NAN)
    wide_rows[:, 5:42] = values
    got = gae(
        rewards.t().contiguous().t(), wide_rows[:, 5:42], mask, gamma=1.0, lam=0.9, bootstrap=bootstrap.repeat(2)[:3]
    )
    torch.testing.assert_close(got, gae(rewards, values, mask, gamma=1.0, lam=0.9, bootstrap=bootstrap))


def packed_case(dtype: torch.dtype = torch.int32) -> tuple[list[Tensor], Tensor, Tensor]:
    """rewards, values, mask of rows of 5, 0, 40, 1 and 18 tokens and 6 of padding, [70]; cu_seqlens; bootstrap [5]."""
    rewards, values, mask, _ = (x[0] for x in random_case(1, 70))
    rewards[64:], values[64:], mask[64:] = NAN, NAN, True
    return [rewards, values, mask], torch.tensor([0, 5, 5, 45, 46, 64], dtype=dtype), random_case(5, 1)[3]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.usefixtures("small_blocks")
def test_packed_rows_equal_each_row_alone(dtype: torch.dtype) -> None:
    tensors, cu_seqlens, bootstrap = packed_case(dtype)
    setting: dict[str, Any] = {"gamma": 0.99, "lam": 0.9}
    got = gae(*tensors, **setting, bootstrap=bootstrap, cu_seqlens=cu_seqlens, max_seqlen=40)
    for b, (first, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        rows = [x[None, first:end] for x in tensors]
        wanted = gae(*rows, **setting, bootstrap=bootstrap[b : b + 1])
        torch.testing.assert_close([x[None, first:end] for x in got], list(wanted), rtol=1e-6, atol=1e-6)
    for x in got:
        assert (x[64:] == 0).all()


def test_packed_tensors_without_rows_are_zero() -> None:
    x = torch.full((7,), NAN)
    starts = torch.zeros(1, dtype=torch.int32)
    for result in gae(x, x, x == x, gamma=1.0, lam=0.9, cu_seqlens=starts, max_seqlen=0):
        assert (result == 0).all()


@pytest.mark.usefixtures("small_blocks")
def test_every_entry_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    rewards, values, mask, bootstrap = random_case(3, 37)
    wanted = gae(rewards, values, mask, gamma=1.0, lam=0.9, bootstrap=bootstrap)
    tensors, cu_seqlens, packed_bootstrap = packed_case()
    packed: dict[str, Any] = {"bootstrap": packed_bootstrap, "cu_seqlens": cu_seqlens, "max_seqlen": 40}
    wanted_packed = gae(*tensors, gamma=1.0, lam=0.9, **packed)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(NAN))
    # Bitwise: a second run gives the same.
    torch.testing.assert_close(
        gae(rewards, values, mask, gamma=1.0, lam=0.9, bootstrap=bootstrap), wanted, rtol=0, atol=0
    )
    torch.testing.assert_close(gae(*tensors, gamma=1.0, lam=0.9, **packed), wanted_packed, rtol=0, atol=0)


def test_compiles_as_one_graph() -> None:
    rewards, values, mask, bootstrap = random_case(2, 9)

    def call(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return gae(rewards, values, mask, gamma=1.0, lam=0.9, bootstrap=bootstrap)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rewards, values), call(rewards, values), rtol=0, atol=0)


def test_is_a_sound_operator() -> None:
    rewards, values, mask, bootstrap = random_case(2, 9)
    torch.library.opcheck(gae_file._gae, (rewards, values, mask, 1.0, 0.9, bootstrap, None, None))


cases = st.builds(random_case, B=st.just(3), T=st.integers(1, 90), seed=st.integers(0, 1000))
unit = st.floats(0, 1)


@settings(max_examples=12, deadline=None)
@given(case=cases, gamma=unit)
def test_lambda_zero_gives_the_td_error(case: tuple[Tensor, ...], gamma: float) -> None:
    rewards, values, _, bootstrap = case
    everything = torch.ones_like(rewards, dtype=torch.bool)
    advantages, _ = gae(rewards, values, everything, gamma=gamma, lam=0.0, bootstrap=bootstrap)
    following = torch.cat((values[:, 1:], bootstrap[:, None]), dim=1)
    torch.testing.assert_close(advantages, rewards + gamma * following - values, rtol=1e-5, atol=1e-6)


@settings(max_examples=12, deadline=None)
@given(case=cases)
def test_lambda_and_gamma_one_give_the_reward_to_go(case: tuple[Tensor, ...]) -> None:
    rewards, values, mask, _ = case
    _, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = (rewards.double() * mask).flip(1).cumsum(1).flip(1)
    assert_near(returns, to_go * mask)


@settings(max_examples=12, deadline=None)
@given(case=cases, gamma=unit, lam=unit)
def test_masked_gaps_are_transparent(case: tuple[Tensor, ...], gamma: float, lam: float) -> None:
    rewards, values, mask, bootstrap = (x[:1] for x in case)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap=bootstrap)
    kept = [x[mask][None] for x in (rewards, values, mask)]
    wanted = gae(*kept, gamma=gamma, lam=lam, bootstrap=bootstrap)
    torch.testing.assert_close((advantages[mask][None], returns[mask][None]), wanted, rtol=1e-6, atol=1e-6)


@settings(max_examples=12, deadline=None)
@given(case=cases, factor=st.floats(-3, 3))
def test_advantages_are_linear_in_rewards_and_values(case: tuple[Tensor, ...], factor: float) -> None:
    rewards, values, mask, bootstrap = (x if x.dtype == torch.bool else x.double() for x in case)
    plain, _ = gae(rewards, values, mask, gamma=1.0, lam=0.9, bootstrap=bootstrap)
    scaled, _ = gae(factor * rewards, factor * values, mask, gamma=1.0, lam=0.9, bootstrap=factor * bootstrap)
    torch.testing.assert_close(scaled, factor * plain, rtol=1e-9, atol=1e-9)


@settings(max_examples=12, deadline=None)
@given(case=cases, cut=st.integers(0, 90), gamma=unit)
def test_lambda_one_row_in_two_halves_bootstraps_to_the_whole(case: tuple[Tensor, ...], cut: int, gamma: float) -> None:
    rewards, values, _, bootstrap = (x.double() for x in case)
    mask = torch.ones_like(rewards, dtype=torch.bool)
    cut = min(cut, rewards.shape[1] - 1)
    _, whole = gae(rewards, values, mask, gamma=gamma, lam=1.0, bootstrap=bootstrap)
    # With lambda 1 the return of the second half's first token is all that the first half needs to know.
    _, first = gae(rewards[:, :cut], values[:, :cut], mask[:, :cut], gamma=gamma, lam=1.0, bootstrap=whole[:, cut])
    torch.testing.assert_close(first, whole[:, :cut], rtol=1e-9, atol=1e-9)


@settings(max_examples=12, deadline=None)
@given(case=cases, order=st.permutations(range(3)), before=st.integers(0, 9), after=st.integers(0, 9))
def test_order_of_rows_and_side_of_padding_change_nothing(
    case: tuple[Tensor, ...], order: list[int], before: int, after: int
) -> None:
    rewards, values, mask, bootstrap = case
    wanted = gae(rewards, values, mask, gamma=1.0, lam=0.9, bootstrap=bootstrap)
    rewards, values = (torch.nn.functional.pad(x[order], (before, after), value=NAN) for x in (rewards, values))
    mask = torch.nn.functional.pad(mask[order], (before, after))
    got = gae(rewards, values, mask, gamma=1.0, lam=0.9, bootstrap=bootstrap[order])
    inside = slice(before, before + wanted[0].shape[1])
    torch.testing.assert_close([x[:, inside] for x in got], [x[order] for x in wanted], rtol=1e-6, atol=1e-5)


def test_wrong_arguments_are_named() -> None:
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"expected the same \[B, T\]"):
        gae(x, torch.zeros(2, 4), mask, gamma=1.0, lam=0.9)
    with pytest.raises(ValueError, match=r"expected \(2,\), one per row"):
        gae(x, x, mask, gamma=1.0, lam=0.9, bootstrap=torch.zeros(3))
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        gae(x, x, mask, gamma=1.0, lam=1.1)
    with pytest.raises(ValueError, match="cu_seqlens and max_seqlen must be given together"):
        gae(x[0], x[0], mask[0], gamma=1.0, lam=0.9, cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"expected \[K\] and \[B\+1\]"):
        gae(x, x, mask, gamma=1.0, lam=0.9, cu_seqlens=torch.tensor([0, 3]), max_seqlen=3)
