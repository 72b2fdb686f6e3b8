"""Running reward moments against the released code's vectors and hand-worked cases; the KL coefficient."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ppomax.engine.config import PpoConfig
from ppomax.engine.ppo.rewards import KlController, RewardScaler, penalise_unfinished

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "oracles" / "ppo_max_vectors.safetensors"
needs_vectors = pytest.mark.skipif(not VECTORS.exists(), reason="no ../shared/oracles beside the repository")

SCALE = PpoConfig(reward_scaling="scale", reward_clip=None)
NORM = PpoConfig(reward_scaling="norm", reward_clip=None)
NORM_CLIP = PpoConfig(reward_scaling="norm", reward_clip=0.8)


@pytest.fixture(scope="module")
def vectors() -> dict[str, Tensor]:
    return load_file(VECTORS)


@needs_vectors
def test_moments_equal_the_released_code(vectors: dict[str, Tensor]) -> None:
    scaler = RewardScaler()
    for batch, expected in zip(vectors["rm/batches"], vectors["rm/stats"].tolist(), strict=True):
        scaler = scaler.update(batch)
        found = [
            float(batch.double().mean()),
            float(batch.double().std()),
            scaler.mean,
            scaler.m2 / scaler.count,
            scaler.std,
            scaler.count,
        ]
        # The released code counts from 1e-24 instead of 0, and keeps its batches in float32.
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)


@needs_vectors
@pytest.mark.parametrize(
    ("name", "config"),
    [("scaled", SCALE), ("normed", NORM), ("normed_clip08", NORM_CLIP)],
    ids=["scaled", "normed", "normed_clip"],
)
def test_scaled_scores_equal_the_released_code(vectors: dict[str, Tensor], name: str, config: PpoConfig) -> None:
    scaler = RewardScaler()
    for batch, expected in zip(vectors["rm/batches"], vectors[f"rm/{name}"], strict=True):
        scaler = scaler.update(batch)
        torch.testing.assert_close(scaler.apply(batch, config), expected, rtol=1e-5, atol=1e-6)


def test_moments_are_those_of_all_scores_at_once() -> None:
    scores = 100 + torch.randn(50, generator=torch.Generator().manual_seed(0))
    whole, parts = RewardScaler().update(scores), RewardScaler()
    for part in scores.split([1, 20, 29]):
        parts = parts.update(part)
    assert parts.count == whole.count == 50
    assert parts.mean == pytest.approx(float(scores.double().mean()), rel=1e-12)
    assert parts.std == pytest.approx(float(scores.double().std()), rel=1e-9)


def test_no_score_changes_nothing() -> None:
    scaler = RewardScaler().update(torch.tensor([1.0, 2.0]))
    assert scaler.update(torch.zeros(0)) == scaler


@pytest.mark.parametrize("scores", [[3.0], [3.0, 3.0, 3.0], [1e6 / 3] * 5], ids=["one", "equal", "large_equal"])
@pytest.mark.parametrize("config", [SCALE, NORM], ids=["scale", "norm"])
def test_without_a_spread_scores_are_not_divided(scores: list[float], config: PpoConfig) -> None:
    batch = torch.tensor(scores)
    scaler = RewardScaler().update(batch)
    assert scaler.std == 1.0
    expected = batch if config is SCALE else torch.zeros_like(batch)
    torch.testing.assert_close(scaler.apply(batch, config), expected, rtol=0, atol=0)


def test_responses_without_eos_lose_the_penalty() -> None:
    scores = penalise_unfinished(torch.tensor([1.0, 2.0]), torch.tensor([True, False]), PpoConfig(no_eos_penalty=0.5))
    assert scores.tolist() == [1.0, 1.5]


def test_a_fixed_kl_coefficient_stays() -> None:
    assert KlController(0.1).update(9.0, 128, PpoConfig(kl_controller="fixed")).coef == 0.1


@pytest.mark.parametrize(
    ("mean_kl", "factor"),
    [
        (0.05, 1.0),
        (0.055, 1 + 0.1 * 0.0128),
        (0.5, 1 + 0.2 * 0.0128),
        (0.0, 1 - 0.2 * 0.0128),
        (-1.0, 1 - 0.2 * 0.0128),
    ],
    ids=["on_target", "above", "far_above", "below", "negative"],
)
def test_an_adaptive_kl_coefficient_follows_its_target(mean_kl: float, factor: float) -> None:
    config = PpoConfig(kl_controller="adaptive", kl_target=0.05, kl_horizon=10000)
    assert KlController(0.1).update(mean_kl, 128, config).coef == pytest.approx(0.1 * factor, rel=1e-12)
