"""The vectors computed with the paper's released code (../shared/oracles): values, losses and gradients must agree.

What each vector is: ppo_max_vectors.json beside them. rm/* and lr/* belong to the engine's tests.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ppomax.kernels.gae import gae
from ppomax.kernels.logprobs import token_logprobs
from ppomax.kernels.policy_loss import PolicyLoss, policy_loss
from ppomax.kernels.sampling_reference import filtered
from ppomax.kernels.value_loss import ValueLoss, value_loss
from ppomax.kernels.whiten import whiten

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "oracles" / "ppo_max_vectors.safetensors"
pytestmark = pytest.mark.skipif(not VECTORS.exists(), reason="no ../shared/oracles beside the repository")

# Position of the metrics that the kernels return in crit/*/metrics.
PG_LOSS, VF_LOSS, PG_CLIP, VF_CLIP, APPROX_KL, RATIO = 1, 2, 3, 4, 5, 10


@pytest.fixture(scope="module")
def vectors() -> dict[str, Tensor]:
    return load_file(VECTORS)


@pytest.mark.parametrize(
    ("case", "gamma", "lam"),
    [("g1_l095", 1, 0.95), ("g1_l09", 1, 0.9), ("g1_l0", 1, 0), ("g1_l1", 1, 1), ("g099_l09", 0.99, 0.9)],
)
def test_gae_equals_the_released_code(vectors: dict[str, Tensor], case: str, gamma: float, lam: float) -> None:
    rewards, values, lengths = vectors["gae/rewards"], vectors["gae/values"], vectors["gae/lengths"]
    mask = torch.arange(rewards.shape[1]) < lengths[:, None]
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    expected = vectors[f"gae/{case}/advantages"], vectors[f"gae/{case}/returns"]
    torch.testing.assert_close(advantages.double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(returns.double(), torch.where(mask, expected[1], 0), rtol=1e-6, atol=1e-6)


def test_logprobs_and_entropies_equal_the_released_code(vectors: dict[str, Tensor]) -> None:
    logprobs, entropy = token_logprobs(vectors["tok/logits"].flatten(0, 1), vectors["tok/labels"].flatten())
    torch.testing.assert_close(logprobs, vectors["tok/logprobs"].flatten(), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(entropy, vectors["tok/entropy"].flatten(), rtol=1e-6, atol=2e-6)


def test_logprobs_of_bf16_logits_are_the_released_codes_before_its_rounding(vectors: dict[str, Tensor]) -> None:
    logits = vectors["tok/logits"].bfloat16().flatten(0, 1)
    logprobs, _ = token_logprobs(logits, vectors["tok/labels"].flatten())
    expected = vectors["tok/logprobs_bf16"].flatten().float()
    torch.testing.assert_close(logprobs, expected, rtol=2**-7, atol=1e-3)
    exact = vectors["tok/logits"].bfloat16().double().log_softmax(-1)
    exact = exact.gather(-1, vectors["tok/labels"][..., None]).flatten()
    assert (logprobs - exact).abs().max() < 2e-6 < (expected - exact).abs().max()


@pytest.mark.parametrize(("name", "shift_mean"), [("whiten/out", True), ("whiten/out_noshift", False)])
def test_whitening_equals_the_released_code_inside_the_mask(
    vectors: dict[str, Tensor], name: str, shift_mean: bool
) -> None:
    mask = vectors["whiten/mask"]
    out = whiten(vectors["whiten/xs"], mask, shift_mean=shift_mean)
    torch.testing.assert_close(out[mask], vectors[name][mask], rtol=1e-5, atol=1e-6)
    assert (out[~mask] == 0).all()


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
def test_top_p_keeps_what_the_released_code_keeps(vectors: dict[str, Tensor], top_p: float) -> None:
    out = filtered(vectors["topp/probs"].log(), top_k=0, top_p=top_p).softmax(dim=1)
    expected = vectors[f"topp/out_{top_p}"]
    assert ((out > 0) == (expected > 0)).all()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-7)


def losses(
    vectors: dict[str, Tensor], *, clip: float | None, value_clip: float | None, advantage_norm: bool
) -> tuple[PolicyLoss, ValueLoss, Tensor, Tensor]:
    """The two losses of the crit/* batch, and the leaves (logits, values) that they can be differentiated by."""
    logits = vectors["crit/in/policy_logits"].clone().requires_grad_()
    values = vectors["crit/in/values"].clone().requires_grad_()
    mask = vectors["crit/in/loss_mask"][:, 1:]
    B, T = mask.shape
    labels = torch.where(mask, vectors["crit/in/text_vec"][:, 1:], -1)
    logprobs, _ = token_logprobs(logits[:, :-1].flatten(0, 1), labels.flatten())
    advantages = vectors["crit/in/advantages"]
    if advantage_norm:
        advantages = whiten(advantages, mask)
    weights = mask / mask.sum()
    policy = policy_loss(
        logprobs.view(B, T), vectors["crit/in/old_logprobs"], advantages, weights, clip=clip, dual_clip=None
    )
    value = value_loss(
        values[:, :-1], vectors["crit/in/old_values"], vectors["crit/in/returns"], weights, clip=value_clip
    )
    return policy, value, logits, values


@pytest.mark.parametrize(
    ("case", "clip", "value_clip", "advantage_norm"),
    [("script", 0.2, 0.2, False), ("noclip", None, None, False), ("advnorm", 0.2, 0.2, True)],
)
def test_losses_and_gradients_equal_the_released_code(
    vectors: dict[str, Tensor], case: str, clip: float | None, value_clip: float | None, advantage_norm: bool
) -> None:
    policy, value, logits, values = losses(vectors, clip=clip, value_clip=value_clip, advantage_norm=advantage_norm)
    loss = policy.loss + value.loss
    loss.backward()
    torch.testing.assert_close(loss, vectors[f"crit/{case}/loss"], rtol=1e-5, atol=1e-6)
    assert logits.grad is not None
    assert values.grad is not None
    torch.testing.assert_close(logits.grad, vectors[f"crit/{case}/grad_policy_logits"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(values.grad, vectors[f"crit/{case}/grad_values"], rtol=1e-5, atol=1e-7)
    metrics = vectors[f"crit/{case}/metrics"]
    torch.testing.assert_close(policy.loss.double(), metrics[PG_LOSS], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(value.loss.double(), metrics[VF_LOSS], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(policy.approx_kl.double(), metrics[APPROX_KL], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(policy.mean_ratio.double(), metrics[RATIO], rtol=1e-5, atol=1e-6)
    if clip is not None:
        torch.testing.assert_close(policy.clip_fraction.double(), metrics[PG_CLIP], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(value.clip_fraction.double(), metrics[VF_CLIP], rtol=1e-5, atol=1e-6)


def test_every_vector_for_kernels_is_tested(vectors: dict[str, Tensor]) -> None:
    cases = {name.split("/")[1] for name in vectors if name.startswith("crit/")}
    assert cases == {"in", "script", "noclip", "advnorm"}
    groups = {name.split("/")[0] for name in vectors}
    assert groups == {"gae", "tok", "whiten", "topp", "crit", "rm", "lr"}
