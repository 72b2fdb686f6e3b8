"""Learning-rate schedules, AdamW, and the clip over one or two models."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ppomax.engine.config import ArchitectureConfig, ModelConfig, OptimConfig, RunConfig
from ppomax.engine.models.roles import Role, make_role, random_reader
from ppomax.engine.models.shape import ModelShape
from ppomax.engine.optim import AdamW, clip_and_step, learning_rate_factor, set_learning_rate, warmup_steps
from ppomax.engine.parallel.device import start
from ppomax.engine.parallel.groups import make_groups
from ppomax.engine.parallel.layout import ParallelLayout

VECTORS = Path(__file__).resolve().parents[3] / "shared" / "oracles" / "ppo_max_vectors.safetensors"


@pytest.mark.skipif(not VECTORS.exists(), reason="no ../shared/oracles beside the repository")
def test_inverse_sqrt_equals_the_released_code() -> None:
    expected = load_file(VECTORS)["lr/multiplier_w100"].tolist()
    config = OptimConfig(schedule="inverse_sqrt", warmup_steps=100)
    found = [learning_rate_factor(config, step, 10_000) for step in range(len(expected))]
    assert found == pytest.approx(expected, rel=1e-12)


def test_cosine_warms_up_to_the_peak_and_ends_at_a_tenth() -> None:
    config = OptimConfig(schedule="cosine", warmup_fraction=0.1)
    factors = [learning_rate_factor(config, step, 1000) for step in range(1000)]
    assert factors[:100] == pytest.approx([(step + 1) / 100 for step in range(100)])
    assert factors[100] == 1.0
    assert factors[100:] == sorted(factors[100:], reverse=True)
    assert factors[-1] == pytest.approx(0.1)
    middle = (100 + 999) / 2
    assert factors[int(middle)] == pytest.approx(0.55, abs=1e-3)


def test_constant_stays_at_the_peak_after_the_warm_up() -> None:
    config = OptimConfig(schedule="constant", warmup_steps=4)
    assert [learning_rate_factor(config, step, 8) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["inverse_sqrt", "cosine", "constant"])
def test_without_a_warm_up_the_first_step_has_the_peak(schedule: str) -> None:
    config = OptimConfig.model_validate({"schedule": schedule, "warmup_steps": 0})
    assert learning_rate_factor(config, 0, 10) == 1.0


def test_a_number_of_warm_up_steps_overrides_the_fraction() -> None:
    assert warmup_steps(OptimConfig(warmup_fraction=0.1), 250) == 25
    assert warmup_steps(OptimConfig(warmup_fraction=0.1, warmup_steps=3), 250) == 3


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_torchs(weight_decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(5, 3, generator=generator), torch.randn(7, generator=generator)]
    ours, theirs = ([torch.nn.Parameter(value.clone()) for value in values] for _ in range(2))
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    optimizers = AdamW(ours, **settings), torch.optim.AdamW(theirs, **settings)  # type: ignore[arg-type]
    for _ in range(10):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


SHAPE = ModelShape(
    vocab_size=11,
    hidden_size=8,
    num_layers=1,
    num_heads=2,
    num_query_groups=1,
    head_dim=4,
    ffn_hidden_size=12,
    max_position_embeddings=16,
    rope_theta=10000.0,
    norm_eps=1e-6,
    tie_embeddings=False,
)
LR = 1e-2


@pytest.fixture
def roles() -> list[Role]:
    """Two trained models whose gradients are all 0.01 and all 0.03."""
    torch.set_num_threads(1)
    start(60)
    config = RunConfig(model=ModelConfig(init=ArchitectureConfig(init_std=0.1)))
    groups = make_groups({"policy": ParallelLayout(1, 1, 1)})["policy"]
    made = [
        make_role(name, SHAPE, random_reader(SHAPE, config), config, groups, source="random", trained=True)
        for name in ("policy", "critic")
    ]
    for role, gradient in zip(made, (0.01, 0.03), strict=True):
        assert role.optimizer is not None
        set_learning_rate(role.optimizer, LR)
        role.module.zero_grad_buffer()
        for parameter in role.stage.parameters():
            parameter.main_grad.fill_(gradient)
    return made


def step(roles: list[Role], *, max_norm: float, joint: bool) -> list[float] | None:
    optimizers = [role.optimizer for role in roles if role.optimizer is not None]
    return clip_and_step(optimizers, max_norm=max_norm, joint=joint)


def used_norm(role: Role) -> float:
    """The norm of the gradient that the first step used: Adam's first moment is (1 - beta1) times it."""
    assert role.optimizer is not None
    moments = [state["exp_avg"] for state in role.optimizer.optimizer.state.values()]
    return float(torch.cat([moment.flatten() for moment in moments]).norm()) / 0.1


NORMS = [gradient * math.sqrt(SHAPE.num_parameters()) for gradient in (0.01, 0.03)]


def test_weight_decay_leaves_norms_alone() -> None:
    torch.set_num_threads(1)
    start(60)
    model = ModelConfig(init=ArchitectureConfig(init_std=0.1))
    config = RunConfig(model=model, optim=OptimConfig(weight_decay=0.1))
    groups = make_groups({"policy": ParallelLayout(1, 1, 1)})["policy"]
    role = make_role("policy", SHAPE, random_reader(SHAPE, config), config, groups, source="random", trained=True)
    before = {name: weight.detach().clone() for name, weight in role.stage.named_parameters()}
    assert role.optimizer is not None
    set_learning_rate(role.optimizer, LR)
    role.module.zero_grad_buffer()
    clip_and_step([role.optimizer], max_norm=1.0, joint=True)
    for name, weight in role.stage.named_parameters():
        factor = 1.0 if weight.dim() == 1 else 1 - LR * 0.1
        torch.testing.assert_close(weight.detach(), before[name] * factor, msg=name)


def test_a_joint_clip_keeps_the_ratio_of_both_models(roles: list[Role]) -> None:
    joint = math.hypot(*NORMS)
    assert step(roles, max_norm=0.1, joint=True) == pytest.approx([joint], rel=1e-6)
    assert [used_norm(role) for role in roles] == pytest.approx([0.1 * norm / joint for norm in NORMS], rel=1e-4)


def test_separate_clips_limit_each_model(roles: list[Role]) -> None:
    assert step(roles, max_norm=0.5, joint=False) == pytest.approx(NORMS, rel=1e-6)
    assert [used_norm(role) for role in roles] == pytest.approx([min(norm, 0.5) for norm in NORMS], rel=1e-4)


def test_a_limit_of_zero_does_not_clip(roles: list[Role]) -> None:
    step(roles, max_norm=0, joint=True)
    assert [used_norm(role) for role in roles] == pytest.approx(NORMS, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_leaves_both_models_alone(roles: list[Role], bad: float) -> None:
    before = [parameter.clone() for role in roles for parameter in role.stage.parameters()]
    next(roles[1].stage.parameters()).main_grad.view(-1)[3] = bad
    assert step(roles, max_norm=1.0, joint=True) is None
    after = [parameter for role in roles for parameter in role.stage.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
