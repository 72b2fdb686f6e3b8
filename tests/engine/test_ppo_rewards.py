"""Running moments of scores, scaling and clipping (Eq. 18), and the KL coefficient."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ppomax.engine.config_ppo import PpoConfig
from ppomax.engine.ppo.rewards import KlController, RewardScaler

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "oracles" / "ppo_max_vectors.safetensors"
NORM = PpoConfig(reward_scaling="norm", reward_clip=None)
SCALE = PpoConfig(reward_scaling="scale", reward_clip=None)
NONE = PpoConfig(reward_scaling="none", reward_clip=None)


@pytest.mark.skipif(not VECTORS.exists(), reason="no ../shared/oracles beside the repository")
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("rm/scaled", SCALE),
        ("rm/normed", NORM),
        ("rm/normed_clip08", NORM.model_copy(update={"reward_clip": 0.8})),
    ],
)
def test_scaled_scores_and_moments_are_those_of_the_released_code(name: str, config: PpoConfig) -> None:
    vectors = load_file(VECTORS)
    scaler = RewardScaler()
    for scores, expected, stats in zip(vectors["rm/batches"], vectors[name], vectors["rm/stats"], strict=True):
        scaler = scaler.update(scores)
        torch.testing.assert_close(scaler.apply(scores, config), expected, rtol=1e-5, atol=1e-5)
        _, _, mean, _, std, count = stats.tolist()
        assert (scaler.mean, scaler.std, scaler.count) == pytest.approx((mean, std, count))


@pytest.mark.parametrize("sizes", [(1, 99), (50, 50), (33, 1, 66)])
def test_moments_of_parts_are_those_of_the_whole(sizes: tuple[int, ...]) -> None:
    scores = 1000 + torch.randn(100, generator=torch.Generator().manual_seed(1)).double()
    scaler = RewardScaler()
    for part in scores.split(sizes):
        scaler = scaler.update(part)
    assert scaler.mean == pytest.approx(float(scores.mean()), rel=1e-12)
    assert scaler.std == pytest.approx(float(scores.std()), rel=1e-9)


@pytest.mark.parametrize("scores", [torch.tensor([3.0]), torch.full((5,), -2.5)], ids=["one score", "equal scores"])
def test_scores_without_spread_are_not_blown_up(scores: Tensor) -> None:
    scaler = RewardScaler().update(scores)
    assert scaler.std == 1.0
    torch.testing.assert_close(scaler.apply(scores, NORM), torch.zeros_like(scores))
    torch.testing.assert_close(scaler.apply(scores, SCALE), scores)


def test_no_scores_change_nothing() -> None:
    scaler = RewardScaler().update(torch.tensor([1.0, 2.0]))
    assert scaler.update(torch.zeros(0)) == scaler


def test_scaling_keeps_the_mean_and_norm_takes_it_away() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0])  # standard deviation 1
    scaler = RewardScaler().update(scores)
    assert scaler.apply(scores, SCALE).tolist() == [1, 2, 3]
    assert scaler.apply(scores, NORM).tolist() == [-1, 0, 1]
    assert scaler.apply(scores, NONE).tolist() == [1, 2, 3]


def test_the_clip_works_on_scaled_scores() -> None:
    scores = torch.tensor([10.0, 20.0, 30.0])
    scaler = RewardScaler().update(scores)
    config = PpoConfig(reward_scaling="norm", reward_clip=0.5)
    assert scaler.apply(scores, config).tolist() == [-0.5, 0, 0.5]


def test_history_decides_the_scale_of_later_scores() -> None:
    scaler = RewardScaler().update(torch.tensor([0.0, 2.0])).update(torch.tensor([0.0, 2.0]))
    assert scaler.apply(torch.tensor([3.0]), NORM).item() == pytest.approx(2 / math.sqrt(4 / 3))


def test_a_fixed_coefficient_stays() -> None:
    assert KlController(0.1).update(9.0, 128, PpoConfig()).coef == 0.1


@pytest.mark.parametrize(
    ("mean_kl", "factor"),
    [(0.05, 1.0), (0.055, 1.001), (0.5, 1.002), (0.0, 0.998), (-1.0, 0.998)],
    ids=["on target", "10 % above", "far above", "far below", "negative"],
)
def test_the_adaptive_coefficient_follows_the_error_within_a_fifth(mean_kl: float, factor: float) -> None:
    config = PpoConfig(kl_controller="adaptive", kl_target=0.05, kl_horizon=10000)
    assert KlController(0.1).update(mean_kl, 100, config).coef == pytest.approx(0.1 * factor)
