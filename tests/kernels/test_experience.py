"""The one-call experience against its three parts, which have tests of their own."""

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from ppomax.kernels import experience as experience_file
from ppomax.kernels.experience import TokenExperience, experience
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


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a few dozen tokens take several blocks."""
    if os.environ.get("PPOMAX_KERNELS") != "reference":
        from ppomax.kernels import token_rewards_triton

        monkeypatch.setattr(token_rewards_triton, "FEW_ROWS_BLOCK", 16)


def by_hand(
    scores: Tensor, logprobs: Tensor, ref: Tensor, values: Tensor, mask: Tensor, bootstrap: Tensor, step: Tensor
) -> tuple[Tensor, Tensor]:
    """(rewards, advantages) in python floats, kl_coef 0.1, k1, gamma 0.99, lam 0.9."""
    rewards, advantages = torch.zeros(2, *mask.shape, dtype=torch.float64)
    for b in range(len(mask)):
        reward_extra, next_value, next_advantage = scores[b].item(), bootstrap[b].item(), 0.0
        for t in reversed(mask[b].nonzero().flatten().tolist()):
            reward = reward_extra + step[b, t].item() - 0.1 * (logprobs[b, t].item() - ref[b, t].item())
            delta = reward + 0.99 * next_value - values[b, t].item()
            next_advantage = delta + 0.99 * 0.9 * next_advantage
            reward_extra, next_value = 0.0, values[b, t].item()
            rewards[b, t], advantages[b, t] = reward, next_advantage
    return rewards, advantages


@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 2), (4, 77), (8, 129)])
@pytest.mark.usefixtures("small_blocks")
def test_fp64_rows_of_several_blocks_equal_a_loop(B: int, T: int) -> None:
    scores, tensors, mask = random_case(B, T)
    mask[0, T // 2 :] = False
    scores = scores.double()
    logprobs, ref, values, step = (x.double() for x in tensors)
    bootstrap = torch.randn(B, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"kl_coef": 0.1, "gamma": 0.99, "lam": 0.9, "step_rewards": step, "bootstrap": bootstrap}
    result = experience(scores, logprobs, ref, values, mask, **options)
    rewards, advantages = by_hand(scores, logprobs, ref, values, mask, bootstrap, step)
    torch.testing.assert_close(result.rewards, rewards, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.advantages, advantages, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.returns, torch.where(mask, advantages + values, 0), rtol=1e-12, atol=1e-12)
    kept = advantages[mask]
    wanted_m2 = (kept - kept.mean()).square().sum().item() if kept.numel() else 0.0
    assert result.moments.m2.item() == pytest.approx(wanted_m2, rel=1e-11, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_give_fp32_results(dtype: torch.dtype) -> None:
    scores, tensors, mask = random_case(3, 20)
    halves = [x.to(dtype) for x in (scores, *tensors[:3])]
    result = experience(*halves, mask, kl_coef=0.1, **SETTINGS)
    wanted = experience(*(x.float() for x in halves), mask, kl_coef=0.1, **SETTINGS)
    torch.testing.assert_close(result[:4], wanted[:4], rtol=0, atol=0)


@pytest.mark.usefixtures("small_blocks")
def test_packed_rows_equal_padded_ones_and_every_entry_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, tensors, mask = random_case(3, 40)
    lengths = [40, 0, 23]
    inside = torch.arange(40) < torch.tensor(lengths)[:, None]
    bootstrap = torch.randn(3, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"kl_coef": 0.1, "bootstrap": bootstrap, **SETTINGS}
    padded_step = torch.where(inside, tensors[3], math.nan)
    wanted = experience(scores, *tensors[:3], mask & inside, step_rewards=padded_step, **options)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **given: empty(*size, **given).fill_(math.nan))
    again = experience(scores, *tensors[:3], mask & inside, step_rewards=padded_step, **options)
    torch.testing.assert_close(again[:4], wanted[:4], rtol=0, atol=0)
    torch.testing.assert_close(tuple(again.moments), tuple(wanted.moments), rtol=0, atol=0)
    flat = [torch.cat((x[inside], x.new_ones(7))) for x in (*tensors, mask)]
    packed = experience(
        scores,
        *flat[:3],
        flat[4],
        step_rewards=flat[3],
        cu_seqlens=torch.tensor([0, 40, 40, 63], dtype=torch.int32),
        max_seqlen=40,
        **options,
    )
    for got, x in zip(packed[:4], wanted[:4], strict=True):
        torch.testing.assert_close(got, torch.cat((x[inside], torch.zeros(7))), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(tuple(packed.moments), tuple(wanted.moments), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_empty_tensors_give_empty_results(shape: tuple[int, int]) -> None:
    x = torch.zeros(shape)
    result = experience(torch.zeros(shape[0]), x, x, x, x.bool(), kl_coef=0.1, **SETTINGS)
    assert {y.shape for y in result[:4]} == {shape}
    assert [m.item() for m in result.moments] == [0, 0, 0]


def test_results_are_constants() -> None:
    scores, (logprobs, ref, values, _), mask = random_case(2, 5)
    result = experience(scores, logprobs.requires_grad_(), ref, values.requires_grad_(), mask, kl_coef=0.1, **SETTINGS)
    assert not any(x.requires_grad for x in (*result[:4], *result.moments))


def test_compiles_as_one_graph_and_is_a_sound_operator() -> None:
    scores, tensors, mask = random_case(2, 9)

    def call(*given: Tensor) -> TokenExperience:
        return experience(*given, mask, kl_coef=0.1, **SETTINGS)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(scores, *tensors[:3])
    eager = call(scores, *tensors[:3])
    torch.testing.assert_close(compiled[:4], eager[:4], rtol=0, atol=0)
    torch.testing.assert_close(tuple(compiled.moments), tuple(eager.moments), rtol=0, atol=0)
    options = (0.1, "k1", 1.0, 0.9, None, None, None, None, None)
    torch.library.opcheck(experience_file._experience, (scores, *tensors[:3], mask, *options))


def test_wrong_arguments_name_the_function() -> None:
    scores, (logprobs, ref, values, _), mask = random_case(3, 4)
    with pytest.raises(ValueError, match="experience: response_mask"):
        experience(scores[:2], logprobs, ref, values, mask, kl_coef=0.1, **SETTINGS)
    with pytest.raises(ValueError, match="experience: values"):
        experience(scores, logprobs, ref, values[:, :3], mask, kl_coef=0.1, **SETTINGS)
