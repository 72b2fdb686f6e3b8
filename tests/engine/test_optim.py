"""Learning-rate schedules, AdamW, and the clip over one or two models."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ppomax.engine.config import RunConfig
from ppomax.engine.config_models import ArchitectureConfig, ModelConfig, OptimConfig
from ppomax.engine.models.roles import Role, make_role, random_reader
from ppomax.engine.models.shape import ModelShape
from ppomax.engine.optim import FlatAdamW, clip_and_step, learning_rate_factor, set_learning_rate, warmup_steps
from ppomax.engine.parallel.device import start
from ppomax.engine.parallel.groups import make_groups
from ppomax.engine.parallel.layout import ParallelLayout
from ppomax.engine.steps import parameter_norms

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


def trained_roles(*names: str, weight_decay: float = 0.0, dtype: str = "fp32") -> list[Role]:
    """Models with the same random weights, whose gradients are all 0."""
    torch.set_num_threads(1)
    start(60)
    model = ModelConfig.model_validate({"init": ArchitectureConfig(init_std=0.1), "dtype": dtype})
    config = RunConfig(model=model, optim=OptimConfig(weight_decay=weight_decay))
    groups = make_groups({"policy": ParallelLayout(1, 1, 1)})["policy"]
    reader = random_reader(SHAPE, config)
    roles = [make_role(name, SHAPE, reader, config, groups, source="random", trained=True) for name in names]
    for role in roles:
        assert role.optimizer is not None
        set_learning_rate(role.optimizer, LR)
        role.modules[0].zero_grad_buffer()
    return roles


@pytest.fixture
def roles() -> list[Role]:
    """Two trained models whose gradients are all 0.01 and all 0.03."""
    made = trained_roles("policy", "critic")
    for role, gradient in zip(made, (0.01, 0.03), strict=True):
        for parameter in role.stage.parameters():
            parameter.main_grad.fill_(gradient)
    return made


def step(roles: list[Role], *, max_norm: float, joint: bool) -> list[float] | None:
    optimizers = [role.optimizer for role in roles if role.optimizer is not None]
    groups, memories = [role.groups for role in roles], [role.memory for role in roles]
    return clip_and_step(optimizers, groups, memories, max_norm=max_norm, joint=joint)


def used_norm(role: Role) -> float:
    """The norm of the gradient that the first step used: Adam's first moment is (1 - beta1) times it."""
    assert role.optimizer is not None
    moments = [state["exp_avg"] for state in role.optimizer.optimizer.state.values()]
    return float(torch.cat([moment.flatten() for moment in moments]).norm()) / 0.1


NORMS = [gradient * math.sqrt(SHAPE.num_parameters()) for gradient in (0.01, 0.03)]


def test_weight_decay_leaves_norms_alone() -> None:
    roles = trained_roles("policy", weight_decay=0.1)
    before = {name: weight.detach().clone() for name, weight in roles[0].stage.named_parameters()}
    step(roles, max_norm=1.0, joint=True)
    for name, weight in roles[0].stage.named_parameters():
        factor = 1.0 if weight.dim() == 1 else 1 - LR * 0.1
        torch.testing.assert_close(weight.detach(), before[name] * factor, msg=name)


def draw_gradients(role: Role, seed: int) -> dict[str, Tensor]:
    """Fills the gradient buffers with random numbers, and gives copies by parameter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in role.stage.parameters():
        parameter.main_grad.normal_(generator=generator)
    return {name: parameter.main_grad.clone() for name, parameter in role.stage.named_parameters()}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_steps_equal_torchs_adamw_and_clipping(dtype: str, weight_decay: float) -> None:
    (role,) = trained_roles("policy", weight_decay=weight_decay, dtype=dtype)
    twins = {name: torch.nn.Parameter(p.detach().float()) for name, p in role.stage.named_parameters()}
    settings = {"lr": LR, "betas": OptimConfig().betas, "eps": 1e-8}
    groups = [
        {
            "params": [p for p in twins.values() if (p.dim() == 1) == is_norm],
            "weight_decay": 0 if is_norm else weight_decay,
        }
        for is_norm in (False, True)
    ]
    theirs = torch.optim.AdamW(groups, **settings)  # type: ignore[arg-type]
    for seed in range(5):
        for name, gradient in draw_gradients(role, seed).items():
            twins[name].grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(twins.values(), 5.0 + 10 * seed)
        theirs.step()
        assert step([role], max_norm=5.0 + 10 * seed, joint=True) == pytest.approx([float(norm)] * 2, rel=1e-6)
        for name, parameter in role.stage.named_parameters():
            wanted = twins[name].detach()
            if dtype == "fp32":
                torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-5, atol=1e-6)
            else:
                torch.testing.assert_close(parameter.detach().float(), wanted, rtol=2**-8, atol=1e-6)
    assert role.optimizer is not None
    assert [group["step"] for group in role.optimizer.param_groups] == [5, 5]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_megatron_knows_are_views_of_the_flat_tensors(dtype: str) -> None:
    (role,) = trained_roles("policy", dtype=dtype)
    draw_gradients(role, 0)
    step([role], max_norm=1.0, joint=True)
    optimizer = role.optimizer
    assert optimizer is not None
    optimizer.load_state_dict(optimizer.state_dict())  # as loading a checkpoint begins
    (shard,) = optimizer.shards
    assert len(shard.places) == len(list(role.stage.parameters()))
    for parameter, main in mains(optimizer).items():
        begin, end = next(place[:2] for place in shard.places if place.main is main)
        assert torch.equal(main, shard.params[begin:end])
        state = {"params": main, **optimizer.optimizer.state[main]}
        assert set(state) == {"params", "exp_avg", "exp_avg_sq"}
        for name, tensor in state.items():
            assert tensor.data_ptr() == getattr(shard, name)[begin:].data_ptr()
            assert float(tensor.detach().abs().sum()) > 0
        weights = shard.params if shard.copies is None else shard.copies
        assert parameter.data_ptr() == weights[begin:].data_ptr()
        assert torch.equal(parameter.view(-1), main.to(parameter.dtype))
        assert parameter.main_grad.data_ptr() == shard.grads[begin:].data_ptr()
    covered = torch.zeros(shard.params.numel(), dtype=torch.bool)
    for place in shard.places:
        covered[place.begin : place.end] = True
    assert not covered.all()
    for padding in (shard.params, shard.grads, shard.exp_avg, shard.exp_avg_sq):
        assert (padding[~covered] == 0).all()


def mains(optimizer: FlatAdamW) -> dict[Tensor, Tensor]:
    """The main weights of each parameter of the model, as Megatron finds them."""
    indices = optimizer.model_param_group_index_map.items()
    return {p: optimizer.optimizer.param_groups[group]["params"][order] for p, (group, order) in indices}


@pytest.mark.parametrize(("weight_decay", "num_launches"), [(0.0, 1), (0.1, 2)])
def test_neighbours_with_the_same_settings_are_one_launch(
    monkeypatch: pytest.MonkeyPatch, weight_decay: float, num_launches: int
) -> None:
    (role,) = trained_roles("policy", weight_decay=weight_decay)
    calls = []
    monkeypatch.setattr("ppomax.engine.optim.adamw_step", lambda *lists, **_: calls.append(len(lists[0])))
    step([role], max_norm=1.0, joint=True)
    assert len(calls) == num_launches
    # One layer: two norms before its matrices and one behind.
    assert sum(calls) <= (1 if weight_decay == 0 else 7)


def test_the_norm_is_megatrons() -> None:
    (role,) = trained_roles("policy")
    optimizer = role.optimizer
    assert optimizer is not None
    draw_gradients(role, 0)
    first = next(iter(mains(optimizer).values()))
    for shared in (False, True):
        first.shared = shared  # type: ignore[attr-defined]
        optimizer.prepare_grads()
        assert float(optimizer.squared_grad_norm()) == pytest.approx(optimizer.get_grad_norm() ** 2, rel=1e-6)


def test_a_step_reads_the_norms_once_and_when_everything_is_launched(
    roles: list[Role], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            assert name not in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero"), name
            if name == "adamw_step":
                events.append(name)
            return func(*args, **(kwargs or {}))

    def start_reading(x: Tensor) -> Callable[[], list[float]]:
        events.append("copy")
        return lambda: events.append("read") or x.tolist()

    monkeypatch.setattr("ppomax.engine.optim._start_reading", start_reading)
    with Watch():
        step(roles, max_norm=1.0, joint=False)
    assert events == ["copy", "adamw_step", "adamw_step", "read"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_norm_of_the_weights_counts_each_once(dtype: str) -> None:
    roles = trained_roles("policy", "critic", dtype=dtype)
    found = parameter_norms(roles)
    for role in roles:
        weights = torch.cat([parameter.detach().double().flatten() for parameter in role.stage.parameters()])
        assert found[f"parameter_norm_{role.name}"] == pytest.approx(float(weights.norm()), rel=1e-6)


def test_a_joint_clip_keeps_the_ratio_of_both_models(roles: list[Role]) -> None:
    joint = math.hypot(*NORMS)
    assert step(roles, max_norm=0.1, joint=True) == pytest.approx([*NORMS, joint], rel=1e-6)
    assert [used_norm(role) for role in roles] == pytest.approx([0.1 * norm / joint for norm in NORMS], rel=1e-4)


def test_separate_clips_limit_each_model(roles: list[Role]) -> None:
    assert step(roles, max_norm=0.5, joint=False) == pytest.approx([*NORMS, math.hypot(*NORMS)], rel=1e-6)
    assert [used_norm(role) for role in roles] == pytest.approx([min(norm, 0.5) for norm in NORMS], rel=1e-4)


def test_a_limit_of_zero_does_not_clip(roles: list[Role]) -> None:
    step(roles, max_norm=0, joint=True)
    assert [used_norm(role) for role in roles] == pytest.approx(NORMS, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("joint", [False, True])
def test_a_gradient_that_is_not_finite_leaves_both_models_alone(roles: list[Role], bad: float, joint: bool) -> None:
    step(roles, max_norm=1.0, joint=joint)
    before = [x.clone() for role in roles for x in everything(role)]
    next(roles[1].stage.parameters()).main_grad.view(-1)[3] = bad
    assert step(roles, max_norm=1.0, joint=joint) is None
    after = [x for role in roles for x in everything(role)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert {group["step"] for role in roles if role.optimizer for group in role.optimizer.param_groups} == {1}


def everything(role: Role) -> list[Tensor]:
    """Weights, main weights and moments."""
    assert role.optimizer is not None
    state = [tensors for shard in role.optimizer.shards for tensors in (shard.params, shard.exp_avg, shard.exp_avg_sq)]
    return [*role.stage.parameters(), *state]
