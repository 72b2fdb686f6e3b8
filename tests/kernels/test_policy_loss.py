"""PPO's policy losses against the formula written with torch operations in fp64 and differentiated by autograd."""

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.library import opcheck

from ppomax.kernels.policy_loss import policy_loss, policy_settings
from ppomax.kernels.whiten import Moments

NAN = math.nan


def random_case(*shape: int, spread: float = 0.4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, old_logprobs, advantages, weights (one in four 0), float64."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    logprobs = old + spread * torch.randn(shape, generator=generator, dtype=torch.float64)
    advantages = torch.randn(shape, generator=generator, dtype=torch.float64)
    weights = torch.rand(shape, generator=generator, dtype=torch.float64)
    weights = torch.where(torch.rand(shape, generator=generator) < 0.25, 0.0, weights)
    return logprobs, old, advantages, weights


def expected(logprobs: Tensor, old: Tensor, advantages: Tensor, weights: Tensor, **options: Any) -> Tensor:
    """The weighted loss, by the equations of the paper and of dual clip; autograd gives its gradient."""
    clip, dual_clip = options["clip"], options.get("dual_clip")
    bound = options.get("advantage_clip") or math.inf
    if options.get("moments") is not None:
        count, mean, m2 = options["moments"]
        variance = m2 / (count - int(options.get("unbiased", False)))
        advantages = (advantages - mean) / (variance + options.get("whiten_eps", 1e-6)).sqrt()
        advantages = advantages if options.get("shift_mean", True) else advantages + mean
    advantages = advantages.clamp(-bound, bound)
    ratio = (logprobs - old).clamp(-20, 20).exp()
    if options.get("objective") == "penalty":
        loss = -ratio * advantages + options["penalty_beta"] * (ratio - 1 - ratio.log())
    else:
        low, high = clip if isinstance(clip, tuple) else (clip, clip)
        clipped = ratio if clip is None else ratio.clamp(1 - low, 1 + high)
        surrogate = torch.min(ratio * advantages, clipped * advantages)
        if dual_clip is not None:
            surrogate = torch.where(advantages < 0, torch.max(surrogate, dual_clip * advantages), surrogate)
        loss = -surrogate
    importance = options.get("importance_weights")
    return (weights * loss * (1 if importance is None else importance)).sum()


def moments(count: float, mean: float, std: float) -> Moments:
    return Moments(*(torch.tensor(x, dtype=torch.float64) for x in (count, mean, count * std**2)))


def use_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 tokens and partial sums 2 at a time, so that a few tokens already span several of both."""
    monkeypatch.setattr(import_module("ppomax.kernels.policy_loss_triton"), "BLOCK", 16)
    monkeypatch.setattr(import_module("ppomax.kernels.partial_sums_triton"), "BLOCK", 2)


def loss_and_gradient(call: Callable[..., Any], logprobs: Tensor, *others: Tensor, **options: Any) -> list[Tensor]:
    leaf = logprobs.detach().clone().requires_grad_()
    result = call(leaf, *others, **options)
    loss = result if isinstance(result, Tensor) else result.loss
    return [loss.detach(), *torch.autograd.grad(loss, leaf)]


OPTIONS: dict[str, dict[str, Any]] = {
    "symmetric": {"clip": 0.2},
    "asymmetric": {"clip": (0.1, 0.3)},
    "unclipped": {"clip": None},
    "dual": {"clip": 0.2, "dual_clip": 1.5},
    "bounded advantages": {"clip": 0.2, "advantage_clip": 0.5},
    "importance": {"clip": 0.2, "importance_weights": torch.linspace(0, 2, 60, dtype=torch.float64).view(5, 12)},
    "penalty": {"clip": 0.2, "objective": "penalty", "penalty_beta": 0.7},
    "whitened": {"clip": 0.2, "moments": moments(9, 0.3, 2), "advantage_clip": 0.5},
    "whitened around its mean": {"clip": 0.2, "moments": moments(9, 0.3, 2), "shift_mean": False, "unbiased": True},
}


@pytest.mark.parametrize("spread", [1e-3, 0.4, 3.0, 30.0])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_loss_and_gradient_equal_autograd(options: dict[str, Any], spread: float) -> None:
    logprobs, *others = random_case(5, 12, spread=spread)
    leaf, twin = logprobs.clone().requires_grad_(), logprobs.clone().requires_grad_()
    got, wanted = policy_loss(leaf, *others, **options).loss, expected(twin, *others, **options)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    (3 * got).backward()
    (3 * wanted).backward()
    torch.testing.assert_close(leaf.grad, twin.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_gradcheck_passes(options: dict[str, Any]) -> None:
    logprobs, *others = random_case(5, 12)
    assert gradcheck(lambda x: policy_loss(x, *others, **options).loss, (logprobs.requires_grad_(),), fast_mode=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 4e-3)])
def test_narrow_inputs_give_fp32_scalars_and_their_own_gradient_type(dtype: torch.dtype, tolerance: float) -> None:
    narrow = [x.to(dtype) for x in random_case(200)]
    leaf, twin = narrow[0].clone().requires_grad_(), narrow[0].double().requires_grad_()
    got = policy_loss(leaf, *narrow[1:], clip=0.2)
    wanted = expected(twin, *(x.double() for x in narrow[1:]), clip=0.2)
    assert {x.dtype for x in got} == {torch.float32}
    torch.testing.assert_close(got.loss.double(), wanted, rtol=1e-6, atol=2e-6)
    (leaf_grad,), (twin_grad,) = torch.autograd.grad(got.loss, leaf), torch.autograd.grad(wanted, twin)
    assert leaf_grad.dtype == dtype
    assert (leaf_grad.double() - twin_grad).norm() <= tolerance * twin_grad.norm()


@pytest.mark.parametrize("shape", [(1,), (15,), (16,), (17,), (3, 21)])
def test_blocks_add_up_and_their_edges_are_right(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)
    case = random_case(*shape)
    got, wanted = (loss_and_gradient(call, *case, clip=0.2) for call in (policy_loss, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_long_sums_keep_fp32_precision() -> None:
    logprobs, old, advantages, weights = case = [x.float() for x in random_case(5000)]
    got, wanted = policy_loss(*case, clip=0.2), policy_loss(*(x.double() for x in case), clip=0.2)
    torch.testing.assert_close([x.double() for x in got[1:4]], list(wanted[1:4]), rtol=1e-6, atol=0)
    magnitude = expected(logprobs, old, advantages.abs(), weights, clip=None).abs()
    assert (got.loss.double() - wanted.loss).abs() <= 1e-6 * magnitude


def test_inputs_may_have_gaps_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)
    case = random_case(7, 10)
    importance = torch.linspace(0, 2, 10, dtype=torch.float64).expand(7, 10)
    leaves = [torch.full((10, 7, 3), NAN, dtype=torch.float64, requires_grad=i == 0) for i in range(4)]
    views = [leaf[..., 1].t() for leaf in leaves]
    with torch.no_grad():
        for view, x in zip(views, case, strict=True):
            view.copy_(x)
    got = policy_loss(*views, clip=0.2, importance_weights=importance).loss
    (grad,) = torch.autograd.grad(got, leaves[0])
    wanted = loss_and_gradient(expected, *case, clip=0.2, importance_weights=importance)
    torch.testing.assert_close([got.detach(), grad[..., 1].t()], wanted)
    assert (grad[..., ::2] == 0).all()


def test_every_entry_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)
    case = random_case(5, 13)
    wanted = loss_and_gradient(expected, *case, clip=0.2)

    def poisoned(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: original(*args, **kwargs).fill_(NAN)

    for holder, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(holder, name, poisoned(getattr(holder, name)))
    torch.testing.assert_close(loss_and_gradient(policy_loss, *case, clip=0.2), wanted, rtol=1e-12, atol=1e-12)


def test_two_runs_agree_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)
    case = [x.float() for x in random_case(5, 13)]
    first, second = (policy_loss(*case, clip=0.2, dual_clip=1.5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    grads = [loss_and_gradient(policy_loss, *case, clip=0.2)[1] for _ in range(2)]
    assert torch.equal(*grads)


def test_compiled_whole_it_gives_the_same() -> None:
    case = random_case(5, 13)
    options: dict[str, Any] = {"clip": 0.2, "dual_clip": 1.5, "moments": moments(9, 0.3, 2), "advantage_clip": 1.0}
    compiled = torch.compile(policy_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        loss_and_gradient(compiled, *case, **options), loss_and_gradient(policy_loss, *case, **options), rtol=0, atol=0
    )


def test_operator_keeps_pytorchs_rules() -> None:
    case = random_case(3, 5)
    settings = policy_settings(clip=0.2, dual_clip=3.0)
    arguments = (*case, case[3], list(moments(9, 0.3, 2)), *settings)
    opcheck(torch.ops.ppomax.policy_loss.default, arguments)


@pytest.mark.parametrize("mean", [0.0, 3.0, -1e4])
@pytest.mark.parametrize("std", [1e-3, 1.0, 1e6])
def test_whitening_on_the_fly_keeps_fp32_precision(mean: float, std: float) -> None:
    logprobs, old, advantages, weights = (x.float() for x in random_case(50))
    advantages = (mean + std * advantages.double()).float()
    options: dict[str, Any] = {"clip": 0.2, "moments": moments(1e8, mean + std / 7, std)}
    got = loss_and_gradient(policy_loss, logprobs, old, advantages, weights, **options)
    wanted = loss_and_gradient(expected, *(x.double() for x in (logprobs, old, advantages, weights)), **options)
    assert (got[1].double() - wanted[1]).norm() <= 1e-6 * wanted[1].norm()


def test_moments_of_nothing_give_zero_loss() -> None:
    result = policy_loss(*random_case(4)[:3], torch.zeros(4), clip=0.2, moments=moments(0, 0, 0))
    assert all(scalar == 0 for scalar in result)


def test_metrics_equal_their_definitions() -> None:
    logprobs, old, advantages, weights = random_case(40)
    got = policy_loss(logprobs.requires_grad_(), old, advantages, weights, clip=0.2, dual_clip=1.5)
    ratio = (logprobs - old).exp()
    clipped = torch.where(advantages >= 0, ratio > 1.2, ratio < 0.8)
    held = (advantages < 0) & (ratio > 1.5)
    wanted = [(weights * x).sum() for x in (clipped, ratio - 1 - ratio.log(), ratio, held)]
    torch.testing.assert_close(list(got[1:]), wanted)
    assert not any(metric.requires_grad for metric in got[1:])


def test_clipping_does_not_apply_to_the_penalty() -> None:
    case = random_case(40)
    options: dict[str, Any] = {"objective": "penalty", "penalty_beta": 0.5}
    got = policy_loss(*case, clip=0.01, dual_clip=1.01, **options)
    torch.testing.assert_close(got, policy_loss(*case, clip=None, **options))
    assert got.clip_fraction == 0
    assert got.dual_clip_fraction == 0


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("garbage", [NAN, math.inf, -math.inf])
def test_tokens_of_weight_zero_are_not_read(garbage: float, options: dict[str, Any]) -> None:
    logprobs, old, advantages, weights = random_case(5, 12)
    is_kept = weights != 0
    leaf, dirty_old, dirty_advantages = (torch.where(is_kept, x, garbage) for x in (logprobs, old, advantages))
    leaf.requires_grad_()
    dirty_options = dict(options)
    if "importance_weights" in options:
        dirty_options["importance_weights"] = torch.where(is_kept, options["importance_weights"], garbage)
    got = policy_loss(leaf, dirty_old, dirty_advantages, weights, **dirty_options)
    torch.testing.assert_close(got, policy_loss(logprobs, old, advantages, weights, **options))
    (grad,) = torch.autograd.grad(got.loss, leaf)
    assert (grad[~is_kept] == 0).all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0,), (2, 0), (3,)])
def test_nothing_to_keep_gives_zero_loss_and_gradient(shape: tuple[int, ...]) -> None:
    x = torch.full(shape, NAN, requires_grad=True)
    result = policy_loss(x, x.detach(), x.detach(), torch.zeros(shape), clip=0.2)
    assert all(scalar == 0 for scalar in result)
    result.loss.backward()
    assert x.grad is not None
    assert (x.grad == 0).all()


@pytest.mark.parametrize("options", [OPTIONS["dual"], OPTIONS["penalty"], OPTIONS["whitened"]], ids=lambda o: "")
@pytest.mark.parametrize("broken", [0, 1, 2, 3])
def test_nan_of_a_kept_token_shows_in_the_loss(broken: int, options: dict[str, Any]) -> None:
    case = [torch.zeros(2), torch.zeros(2), torch.ones(2), torch.ones(2)]
    case[broken][0] = NAN
    assert policy_loss(*case, **options).loss.isnan()


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_tiny_and_huge_numbers_stay_finite(scale: float) -> None:
    logprobs, old, advantages, weights = random_case(30)
    case = [x.float() for x in (logprobs * scale, old * scale, advantages * scale, weights / scale)]
    got = loss_and_gradient(policy_loss, *case, clip=0.2)
    wanted = loss_and_gradient(expected, *(x.double() for x in case), clip=0.2)
    torch.testing.assert_close([x.double() for x in got], wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("gap", [20.5, 1e4, -20.5, -1e4])
def test_log_ratio_is_held_at_twenty_with_zero_gradient(gap: float) -> None:
    x = torch.tensor([gap], requires_grad=True)
    result = policy_loss(x, torch.zeros(1), -torch.ones(1), torch.ones(1), clip=None)
    assert result.loss.item() == pytest.approx(math.exp(math.copysign(20.0, gap)), rel=1e-6)
    result.loss.backward()
    assert x.grad is not None
    assert x.grad.item() == 0


def test_unchanged_policy_has_gradient_minus_weighted_advantage() -> None:
    logprobs, _, advantages, weights = random_case(30)
    leaf = logprobs.clone().requires_grad_()
    result = policy_loss(leaf, logprobs, advantages, weights, clip=0.2)
    result.loss.backward()
    torch.testing.assert_close(leaf.grad, -weights * advantages)
    torch.testing.assert_close(result.mean_ratio, weights.sum())
    assert result.approx_kl == 0
    assert result.clip_fraction == 0


@settings(max_examples=30, deadline=None)
@given(
    gap=st.floats(-2, 2),
    advantage=st.floats(-2, 2).filter(lambda a: abs(a) > 1e-3),
    clip=st.sampled_from([0.2, (0.1, 0.5)]),
    dual_clip=st.sampled_from([None, 1.5, 3.0]),
)
def test_gradient_vanishes_exactly_where_the_ratio_is_clipped(
    gap: float, advantage: float, clip: float | tuple[float, float], dual_clip: float | None
) -> None:
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    x = torch.tensor([gap], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, dtype=torch.float64)
    result = policy_loss(x, 0 * one, advantage * one, one, clip=clip, dual_clip=dual_clip)
    (grad,) = torch.autograd.grad(result.loss, x)
    ratio = math.exp(gap)
    is_free = ratio <= 1 + high if advantage > 0 else ratio >= 1 - low
    is_held = advantage < 0 and dual_clip is not None and ratio > dual_clip
    assert (grad.item() != 0) == (is_free and not is_held)
    assert result.dual_clip_fraction.item() == is_held
    if advantage < 0 and dual_clip is not None:
        assert result.loss.item() <= dual_clip * -advantage + 1e-12


def test_parts_of_a_batch_add_up() -> None:
    case = random_case(40)
    whole = policy_loss(*case, clip=0.2)
    parts = [policy_loss(*(x[rows] for x in case), clip=0.2) for rows in (slice(0, 13), slice(13, 40))]
    for total, *terms in zip(whole, *parts, strict=True):
        torch.testing.assert_close(total, sum(terms))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), left=st.integers(0, 3), right=st.integers(0, 3))
def test_order_and_padding_of_tokens_do_not_matter(seed: int, left: int, right: int) -> None:
    case = random_case(2, 5, seed=seed)
    loss, grad = loss_and_gradient(policy_loss, *case, clip=0.2)
    rows = torch.tensor([1, 0])
    moved = [torch.nn.functional.pad(x[rows], (left, right), value=0.0 if i == 3 else NAN) for i, x in enumerate(case)]
    moved_loss, moved_grad = loss_and_gradient(policy_loss, *moved, clip=0.2)
    torch.testing.assert_close(moved_loss, loss)
    assert torch.equal(moved_grad[:, left : left + 5], grad[rows])
    assert (moved_grad[:, :left] == 0).all()
    assert (moved_grad[:, left + 5 :] == 0).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"clip": 0.0}, "must be positive"),
        ({"clip": (0.2, -0.1)}, "must be positive"),
        ({"clip": 0.2, "advantage_clip": 0.0}, "must be positive"),
        ({"clip": 0.2, "dual_clip": 1.0}, "must be above 1"),
        ({"clip": 0.2, "objective": "trpo"}, "objective 'trpo'"),
        ({"clip": 0.2, "importance_weights": torch.ones(2)}, "must have one shape"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_wrong_arguments_are_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        policy_loss(*random_case(4), **options)
