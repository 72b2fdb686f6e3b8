"""Advantages and returns against a plain loop over tokens in fp64, and the invariants of the recursion."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

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


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (1.0, 1.0), (0.99, 0.9), (1.0, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 2), (8, 50), (3, 64), (2, 129), (2, 1000)])
@pytest.mark.parametrize("density", [1.0, 0.6])
def test_equals_the_loop(B: int, T: int, gamma: float, lam: float, density: float) -> None:
    rewards, values, mask, bootstrap = random_case(B, T, density=density)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap=bootstrap)
    wanted = looped(rewards, values, mask, gamma=gamma, lam=lam, bootstrap=bootstrap)
    assert advantages.dtype == returns.dtype == torch.float32
    torch.testing.assert_close(advantages.double(), wanted, rtol=2e-7, atol=1e-6)
    wanted_returns = torch.where(mask, wanted + values.double(), 0)
    torch.testing.assert_close(returns.double(), wanted_returns, rtol=2e-7, atol=1e-6)


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
    torch.testing.assert_close(advantages.double(), wanted, rtol=2e-7, atol=1e-6)
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()


def test_empty_batch_and_empty_rows_give_zeros() -> None:
    for shape in ((0, 5), (2, 0)):
        empty = torch.zeros(shape)
        assert gae(empty, empty, empty.bool(), gamma=1.0, lam=0.9)[0].shape == shape
    rewards, values, mask, bootstrap = random_case(3, 5)
    for result in gae(rewards, values, mask & False, gamma=1.0, lam=0.9, bootstrap=bootstrap):
        assert (result == 0).all()


def test_bf16_inputs_give_fp32_results() -> None:
    rewards, values, mask, _ = random_case(2, 20)
    rewards, values = rewards.bfloat16(), values.bfloat16()
    advantages, _ = gae(rewards, values, mask, gamma=1.0, lam=0.9)
    assert advantages.dtype == torch.float32
    torch.testing.assert_close(
        advantages.double(), looped(rewards, values, mask, gamma=1.0, lam=0.9), rtol=2e-7, atol=1e-6
    )


def test_results_are_constants() -> None:
    rewards, values, mask, _ = random_case(2, 5)
    for result in gae(rewards, values.requires_grad_(), mask, gamma=1.0, lam=0.9):
        assert not result.requires_grad


cases = st.builds(random_case, B=st.just(3), T=st.integers(1, 90), seed=st.integers(0, 1000))
unit = st.floats(0, 1)


@settings(max_examples=20, deadline=None)
@given(case=cases, gamma=unit)
def test_lambda_zero_gives_the_td_error(case: tuple[Tensor, ...], gamma: float) -> None:
    rewards, values, _, bootstrap = case
    everything = torch.ones_like(rewards, dtype=torch.bool)
    advantages, _ = gae(rewards, values, everything, gamma=gamma, lam=0.0, bootstrap=bootstrap)
    following = torch.cat((values[:, 1:], bootstrap[:, None]), dim=1)
    torch.testing.assert_close(advantages, rewards + gamma * following - values, rtol=1e-5, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(case=cases)
def test_lambda_and_gamma_one_give_the_reward_to_go(case: tuple[Tensor, ...]) -> None:
    rewards, values, mask, _ = case
    _, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = (rewards.double() * mask).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns.double(), to_go * mask, rtol=1e-6, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(case=cases, gamma=unit, lam=unit)
def test_masked_gaps_are_transparent(case: tuple[Tensor, ...], gamma: float, lam: float) -> None:
    rewards, values, mask, bootstrap = (x[:1] for x in case)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap=bootstrap)
    kept = [x[mask][None] for x in (rewards, values, mask)]
    wanted = gae(*kept, gamma=gamma, lam=lam, bootstrap=bootstrap)
    torch.testing.assert_close((advantages[mask][None], returns[mask][None]), wanted, rtol=1e-6, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(case=cases, factor=st.floats(-3, 3))
def test_advantages_are_linear_in_rewards_and_values(case: tuple[Tensor, ...], factor: float) -> None:
    rewards, values, mask, bootstrap = (x if x.dtype == torch.bool else x.double() for x in case)
    plain, _ = gae(rewards, values, mask, gamma=1.0, lam=0.9, bootstrap=bootstrap)
    scaled, _ = gae(factor * rewards, factor * values, mask, gamma=1.0, lam=0.9, bootstrap=factor * bootstrap)
    torch.testing.assert_close(scaled, factor * plain, rtol=1e-9, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(case=cases, cut=st.integers(0, 90), gamma=unit)
def test_lambda_one_row_in_two_halves_bootstraps_to_the_whole(case: tuple[Tensor, ...], cut: int, gamma: float) -> None:
    rewards, values, _, bootstrap = (x.double() for x in case)
    mask = torch.ones_like(rewards, dtype=torch.bool)
    cut = min(cut, rewards.shape[1] - 1)
    _, whole = gae(rewards, values, mask, gamma=gamma, lam=1.0, bootstrap=bootstrap)
    # With lambda 1 the return of the second half's first token is all that the first half needs to know.
    _, first = gae(rewards[:, :cut], values[:, :cut], mask[:, :cut], gamma=gamma, lam=1.0, bootstrap=whole[:, cut])
    torch.testing.assert_close(first, whole[:, :cut], rtol=1e-9, atol=1e-9)


def test_wrong_arguments_are_named() -> None:
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"expected the same \[B, T\]"):
        gae(x, torch.zeros(2, 4), mask, gamma=1.0, lam=0.9)
    with pytest.raises(ValueError, match=r"expected \(2,\), one per row"):
        gae(x, x, mask, gamma=1.0, lam=0.9, bootstrap=torch.zeros(3))
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        gae(x, x, mask, gamma=1.0, lam=1.1)
