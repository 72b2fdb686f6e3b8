"""The one-call experience against its three parts, which have tests of their own."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ppomax.kernels.experience import experience
from ppomax.kernels.gae import gae
from ppomax.kernels.token_rewards import KlEstimator, token_rewards
from ppomax.kernels.whiten import masked_moments

SETTINGS: dict[str, Any] = {"gamma": 1.0, "lam": 0.9}


Case = tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor], Tensor]


def random_case(B: int, T: int) -> Case:
    """scores [B], (logprobs, ref_logprobs, values, step_rewards) [B, T], a mask with gaps."""
    generator = torch.Generator().manual_seed(B)
    logprobs, ref, values, step = torch.randn(4, B, T, generator=generator)
    scores = torch.randn(B, generator=generator)
    return scores, (logprobs, ref, values, step), torch.rand(B, T, generator=generator) < 0.7


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "full"])
def test_equals_its_parts(estimator: KlEstimator) -> None:
    scores, (logprobs, ref, values, step), mask = random_case(5, 70)
    bootstrap = torch.randn(5, generator=torch.Generator().manual_seed(1))
    penalty: dict[str, Any] = {"kl_coef": 0.1, "kl_estimator": estimator, "step_rewards": step}
    penalty["kl"] = (logprobs - ref).abs() if estimator == "full" else None
    got = experience(scores, logprobs, ref, values, mask, **penalty, **SETTINGS, bootstrap=bootstrap)
    rewards, kl = token_rewards(scores, logprobs, ref, mask, **penalty)
    advantages, returns = gae(rewards, values, mask, **SETTINGS, bootstrap=bootstrap)
    wanted = (rewards, kl, advantages, returns)
    torch.testing.assert_close(got[:4], wanted)
    torch.testing.assert_close(tuple(got.moments), tuple(masked_moments(advantages, mask)))


def test_moments_describe_the_kept_advantages() -> None:
    scores, (logprobs, ref, values, _), mask = random_case(4, 30)
    result = experience(scores, logprobs, ref, values, mask, kl_coef=0.1, **SETTINGS)
    kept = result.advantages[mask].double()
    assert result.moments.count.item() == kept.numel()
    assert result.moments.mean.item() == pytest.approx(kept.mean().item())
    assert result.moments.m2.item() == pytest.approx(kept.var(unbiased=False).item() * kept.numel())


def test_nothing_outside_the_mask_is_read() -> None:
    scores, tensors, mask = random_case(3, 20)
    mask[1] = False
    got, wanted = (
        experience(scores, logprobs, ref, values, mask, kl_coef=0.1, step_rewards=step, **SETTINGS)
        for logprobs, ref, values, step in ([torch.where(mask, x, math.nan) for x in tensors], tensors)
    )
    torch.testing.assert_close(got[:4], wanted[:4])
    torch.testing.assert_close(tuple(got.moments), tuple(wanted.moments))


def test_a_batch_without_kept_tokens_is_all_zero() -> None:
    scores, (logprobs, ref, values, _), mask = random_case(3, 20)
    result = experience(scores, logprobs, ref, values, mask & False, kl_coef=0.1, **SETTINGS)
    for tensor in (*result[:4], *result.moments):
        assert (tensor == 0).all()


def test_wrong_arguments_name_the_function() -> None:
    scores, (logprobs, ref, values, _), mask = random_case(3, 4)
    with pytest.raises(ValueError, match="experience: response_mask"):
        experience(scores[:2], logprobs, ref, values, mask, kl_coef=0.1, **SETTINGS)
    with pytest.raises(ValueError, match="experience: values"):
        experience(scores, logprobs, ref, values[:, :3], mask, kl_coef=0.1, **SETTINGS)
