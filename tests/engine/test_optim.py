"""Learning-rate schedules of the paper and clipping by the joint norm of several models."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ppomax.engine.config import OptimConfig, RunConfig
from ppomax.engine.models.roles import Role, load_role, role_groups
from ppomax.engine.optim import clip_and_step, learning_rate_factor, set_learning_rate, warmup_steps
from ppomax.engine.parallel.device import start, stop

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "oracles" / "ppo_max_vectors.safetensors"
LR, EPS = 0.1, 1e-3


@pytest.mark.skipif(not VECTORS.exists(), reason="no ../shared/oracles beside the repository")
def test_inverse_square_root_is_the_schedule_of_the_released_code() -> None:
    expected = load_file(VECTORS)["lr/multiplier_w100"].tolist()
    config = OptimConfig(schedule="inverse_sqrt", warmup_steps=100)
    assert [learning_rate_factor(config, step, 2001) for step in range(2001)] == pytest.approx(expected)


def test_cosine_warms_up_and_ends_at_a_tenth() -> None:
    config = OptimConfig(schedule="cosine", warmup_fraction=0.1, min_lr_ratio=0.1)
    factors = [learning_rate_factor(config, step, 101) for step in range(101)]
    assert factors[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert factors[10] == pytest.approx(1.0)
    assert factors[55] == pytest.approx(0.55)  # half way down
    assert factors[100] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[10:]))


def test_constant_stays_at_the_peak() -> None:
    config = OptimConfig(schedule="constant", warmup_steps=2)
    assert [learning_rate_factor(config, step, 9) for step in range(5)] == [0.5, 1, 1, 1, 1]


@pytest.mark.parametrize("schedule", ["inverse_sqrt", "cosine", "constant"])
def test_every_schedule_works_without_warm_up_and_for_one_step(schedule: str) -> None:
    config = OptimConfig.model_validate({"schedule": schedule, "warmup_steps": 0})
    assert learning_rate_factor(config, 0, 1) == 1.0


def test_warm_up_steps_overrule_the_fraction() -> None:
    assert warmup_steps(OptimConfig(warmup_fraction=0.1), 250) == 25
    assert warmup_steps(OptimConfig(warmup_fraction=0.1, warmup_steps=7), 250) == 7


@pytest.fixture
def roles(tiny: Any) -> Iterator[list[Role]]:
    """A trained policy and a trained critic, whose gradients are all 0."""
    start(60)
    config = RunConfig(optim=OptimConfig(betas=(0.0, 0.0), eps=EPS))
    groups = role_groups(config)
    made = []
    for name in ("policy", "critic"):
        role = load_role(name, tiny.model(name), config, groups[name], scalar=name == "critic", trained=True, eps=EPS)
        role.module.zero_grad_buffer()
        made.append(role)
    yield made
    stop()


def set_gradient(role: Role, norm: float) -> torch.nn.Parameter:
    """Gives one weight of the role a gradient of this norm, in one entry; returns the weight."""
    weight = role.stage.embedding.word_embeddings.weight
    weight.main_grad[5, 3] = norm
    return weight


def applied_gradient(old: torch.Tensor, new: torch.Tensor) -> float:
    """The clipped gradient g, from the step that it made: without momentum, LR * g / (|g| + EPS)."""
    share = float((old - new)[5, 3]) / LR
    return EPS * share / (1 - share)


@pytest.mark.parametrize(
    ("joint", "norms", "gradients"),
    [(True, [0.5], [0.006, 0.008]), (False, [0.3, 0.4], [0.01, 0.01])],
    ids=["joint", "each"],
)
def test_clipping_is_by_the_joint_norm_or_each_by_its_own(
    roles: list[Role], joint: bool, norms: list[float], gradients: list[float]
) -> None:
    weights = [set_gradient(role, norm) for role, norm in zip(roles, (0.3, 0.4), strict=True)]
    before = [weight.detach().clone() for weight in weights]
    optimizers = []
    for role in roles:
        assert role.optimizer is not None
        set_learning_rate(role.optimizer, LR)
        optimizers.append(role.optimizer)
    assert clip_and_step(optimizers, max_norm=0.01, joint=joint) == pytest.approx(norms)
    applied = [applied_gradient(old, new.detach()) for old, new in zip(before, weights, strict=True)]
    assert applied == pytest.approx(gradients, rel=1e-3)


def test_a_gradient_that_is_not_finite_changes_no_weight_of_any_model(roles: list[Role]) -> None:
    weights = [set_gradient(role, norm) for role, norm in zip(roles, (0.3, math.nan), strict=True)]
    before = [weight.detach().clone() for weight in weights]
    optimizers = [role.optimizer for role in roles if role.optimizer is not None]
    assert clip_and_step(optimizers, max_norm=1.0, joint=True) is None
    assert all(torch.equal(old, new) for old, new in zip(before, weights, strict=True))
