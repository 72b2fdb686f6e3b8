"""The fused linear losses, against autograd through stored logits and the formulas written out, in fp64."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.distributions import Categorical

from ppomax.kernels.linear_policy_loss import LinearLoss, linear_cross_entropy, linear_policy_loss
from ppomax.kernels.whiten import masked_moments

HAS_C = True
NAN = math.nan
OPTIONS: dict[str, dict[str, Any]] = {
    "clip": {"clip": 0.2},
    "everything": {"clip": (0.1, 0.3), "dual_clip": 1.5, "entropy_coef": 0.1, "advantage_clip": 0.8},
    "entropy penalty": {"clip": 0.2, "entropy_coef": -0.2},
    "kl penalty": {"clip": None, "objective": "penalty", "penalty_beta": 0.4},
}


class Case:
    """N rows, some masked by their label and some by their weights; row 2 is a language-model row."""

    def __init__(self, N: int, H: int, V: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden, self.weight = normal(N, H), normal(V, H) / H**0.5
        self.labels = torch.randint(V, (N,), generator=generator)
        self.old_logprobs = normal(N) / 2 - math.log(V)
        self.advantages = normal(N)
        row = torch.arange(N)
        self.labels[row % 7 == 5] = -1
        self.weights = torch.where((row % 5 == 3) | (row == 2), 0.0, 1 / max(1, N)).to(dtype)
        self.lm_weights = torch.where(row == 2, 0.7, 0.0).to(dtype)
        self.importance_weights = normal(N).abs()

    def vectors(self) -> tuple[Tensor, ...]:
        return self.labels, self.old_logprobs, self.advantages, self.weights


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def loss_of(case: Case, leaves: tuple[Tensor, Tensor], **options: Any) -> LinearLoss:
    extra = {"lm_weights": case.lm_weights, "importance_weights": case.importance_weights}
    return linear_policy_loss(*leaves, *case.vectors(), **extra, **options)


def expected(
    case: Case,
    leaves: tuple[Tensor, Tensor],
    *,
    clip: float | tuple[float, float] | None,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    advantage_clip: float | None = None,
    objective: str = "clip",
    penalty_beta: float = 0.0,
    moments: Any = None,
) -> dict[str, Tensor]:
    """loss, surrogate, entropy and lm_loss by the equations, differentiable through stored logits."""
    kept = (case.labels >= 0) & ((case.weights != 0) | (case.lm_weights != 0))
    distribution = Categorical(logits=leaves[0][kept].double() @ leaves[1].double().T)
    logprobs, entropy = distribution.log_prob(case.labels[kept]), distribution.entropy()
    advantages, weights = case.advantages[kept].double(), case.weights[kept].double()
    if moments is not None:
        advantages = (advantages - moments.mean) / (moments.m2 / moments.count + 1e-6).sqrt()
    if advantage_clip is not None:
        advantages = advantages.clamp(-advantage_clip, advantage_clip)
    log_ratio = logprobs - case.old_logprobs[kept].double()
    ratio = log_ratio.exp()
    if objective == "penalty":
        terms = -ratio * advantages + penalty_beta * (ratio - 1 - log_ratio)
    else:
        low, high = clip if isinstance(clip, tuple) else (clip, clip)
        assert low is not None
        assert high is not None
        terms = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))
        if dual_clip is not None:
            terms = torch.where(advantages < 0, torch.minimum(terms, -advantages * dual_clip), terms)
    surrogate = (weights * case.importance_weights[kept].double() * terms).sum()
    mean_entropy = (weights * entropy).sum()
    lm_loss = -(case.lm_weights[kept].double() * logprobs).sum()
    loss = surrogate - entropy_coef * mean_entropy + lm_loss
    return {"loss": loss, "surrogate": surrogate, "entropy": mean_entropy, "lm_loss": lm_loss}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("chunk_rows", [1, 4, None])
def test_values_and_gradients_equal_stored_logits(chunk_rows: int | None, options: dict[str, Any]) -> None:
    case = Case(11, 6, 37)
    leaves, twins = (leaf(case.hidden), leaf(case.weight)), (leaf(case.hidden), leaf(case.weight))
    got, wanted = loss_of(case, leaves, chunk_rows=chunk_rows, **options), expected(case, twins, **options)
    for name, value in wanted.items():
        torch.testing.assert_close(getattr(got, name), value, rtol=1e-10, atol=1e-12)
    got_grads = torch.autograd.grad(got.loss * 3, leaves)
    wanted_grads = torch.autograd.grad(wanted["loss"] * 3, twins)
    torch.testing.assert_close(got_grads, wanted_grads, rtol=1e-9, atol=1e-12)


def test_advantages_are_whitened_on_the_fly() -> None:
    case = Case(11, 6, 37)
    moments = masked_moments(case.advantages * 3 + 1, torch.ones(11, dtype=torch.bool))
    leaves, twins = (leaf(case.hidden), leaf(case.weight)), (leaf(case.hidden), leaf(case.weight))
    got = loss_of(case, leaves, clip=0.2, moments=moments, advantage_clip=0.5)
    wanted = expected(case, twins, clip=0.2, moments=moments, advantage_clip=0.5)
    torch.testing.assert_close(got.loss, wanted["loss"], rtol=1e-10, atol=1e-12)
    grads = torch.autograd.grad(got.loss, leaves), torch.autograd.grad(wanted["loss"], twins)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_gradcheck_passes() -> None:
    case = Case(6, 2, 5)
    inputs = leaf(case.hidden), leaf(case.weight)
    assert gradcheck(lambda *leaves: loss_of(case, leaves, clip=0.5, entropy_coef=0.1, chunk_rows=4).loss, inputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_gradients_are_as_accurate_as_their_dtype(dtype: torch.dtype, tolerance: float) -> None:
    case = Case(23, 48, 301, dtype=dtype)
    leaves, twins = (leaf(case.hidden), leaf(case.weight)), (leaf(case.hidden), leaf(case.weight))
    options = OPTIONS["everything"]
    got, wanted = loss_of(case, leaves, chunk_rows=8, **options), expected(case, twins, **options)
    assert got.loss.dtype == torch.float32
    torch.testing.assert_close(got.loss.double(), wanted["loss"], rtol=1e-5, atol=1e-6)
    pairs = zip(torch.autograd.grad(got.loss, leaves), torch.autograd.grad(wanted["loss"], twins), strict=True)
    for grad, exact in pairs:
        assert grad.dtype == dtype
        assert (grad.double() - exact.double()).norm() <= tolerance * exact.double().norm()


@settings(max_examples=6, deadline=None)
@given(chunk_rows=st.integers(1, 12), seed=st.integers(0, 100))
def test_loss_and_hidden_gradients_do_not_depend_on_chunks(chunk_rows: int, seed: int) -> None:
    case = Case(12, 8, 33, seed=seed, dtype=torch.float32)
    results = []
    for size in (12, chunk_rows):
        leaves = leaf(case.hidden), leaf(case.weight)
        loss = loss_of(case, leaves, chunk_rows=size, **OPTIONS["everything"]).loss
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(results[0], results[1], rtol=2e-6, atol=2e-7)


def test_permuting_rows_permutes_hidden_gradients() -> None:
    case, order = Case(9, 5, 17), torch.tensor([3, 1, 8, 0, 2, 7, 4, 6, 5])
    plain, permuted = leaf(case.hidden), leaf(case.hidden[order])
    loss_of(case, (plain, case.weight), clip=0.2).loss.backward()
    for name in ("labels", "old_logprobs", "advantages", "weights", "lm_weights", "importance_weights"):
        setattr(case, name, getattr(case, name)[order])
    loss_of(case, (permuted, case.weight), clip=0.2).loss.backward()
    assert plain.grad is not None
    torch.testing.assert_close(permuted.grad, plain.grad[order])


@pytest.mark.parametrize("garbage", [NAN, math.inf])
def test_rows_without_weight_or_label_and_padding_of_the_head_are_not_read(garbage: float) -> None:
    case = Case(11, 6, 40)
    case.labels %= 37
    unread = (case.labels < 0) | ((case.weights == 0) & (case.lm_weights == 0))
    assert unread.any()
    twins = leaf(case.hidden), leaf(case.weight[:37])
    wanted = expected(case, twins, clip=0.2, entropy_coef=0.1)
    dirty = case.hidden.clone()
    dirty[unread], case.old_logprobs[unread], case.advantages[unread] = garbage, garbage, garbage
    case.importance_weights[unread] = garbage
    head = case.weight.clone()
    head[37:] = garbage
    leaves = leaf(dirty), leaf(head)
    got = loss_of(case, leaves, clip=0.2, entropy_coef=0.1, vocab_size=37, chunk_rows=4)
    grad_hidden, grad_weight = torch.autograd.grad(got.loss, leaves)
    wanted_hidden, wanted_weight = torch.autograd.grad(wanted["loss"], twins)
    torch.testing.assert_close(got.loss, wanted["loss"])
    torch.testing.assert_close(grad_hidden, wanted_hidden)
    torch.testing.assert_close(grad_weight[:37], wanted_weight)
    assert (grad_hidden[unread] == 0).all()
    assert (grad_weight[37:] == 0).all()
    assert (got.logprobs[unread] == 0).all()


@pytest.mark.parametrize("N", [0, 1])
def test_few_or_only_masked_rows_give_zero(N: int) -> None:
    case = Case(N, 4, 9)
    case.labels[:] = -1
    leaves = leaf(case.hidden), leaf(case.weight)
    got = loss_of(case, leaves, clip=0.2, entropy_coef=0.1)
    grads = torch.autograd.grad(got.loss, leaves)
    assert all((x == 0).all() for x in (*got, *grads))


def test_main_grad_is_added_to_and_weight_gets_none() -> None:
    case = Case(11, 6, 37, dtype=torch.float32)
    options = OPTIONS["everything"]
    leaves, twins = (leaf(case.hidden), leaf(case.weight)), (leaf(case.hidden), leaf(case.weight))
    wanted = torch.autograd.grad(loss_of(case, twins, **options).loss, twins)
    main_grad = torch.ones_like(case.weight)
    loss_of(case, leaves, main_grad=main_grad, chunk_rows=4, **options).loss.backward()
    assert leaves[1].grad is None
    torch.testing.assert_close(leaves[0].grad, wanted[0])
    torch.testing.assert_close(main_grad - 1, wanted[1], rtol=1e-5, atol=1e-6)


def test_main_grad_in_fp32_keeps_what_bf16_would_lose() -> None:
    case = Case(11, 6, 37, dtype=torch.bfloat16)
    main_grad = torch.zeros(case.weight.shape)
    loss_of(case, (leaf(case.hidden), case.weight), main_grad=main_grad, clip=0.2)
    assert (main_grad != main_grad.bfloat16()).any()


def test_scaling_a_loss_with_main_grad_is_an_error() -> None:
    case = Case(5, 4, 9)
    loss = loss_of(case, (leaf(case.hidden), case.weight), main_grad=torch.zeros_like(case.weight), clip=0.2).loss
    with pytest.raises(RuntimeError, match="scaled after it"):
        (loss * 2).backward()


def test_two_runs_are_bitwise_equal() -> None:
    case = Case(23, 16, 301, dtype=torch.bfloat16)
    runs = []
    for _ in range(2):
        leaves = leaf(case.hidden), leaf(case.weight)
        got = loss_of(case, leaves, chunk_rows=8, **OPTIONS["everything"])
        runs.append((*got, *torch.autograd.grad(got.loss, leaves)))
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


@pytest.mark.parametrize("with_main_grad", [False, True])
def test_compiled_function_has_the_same_values_and_gradients(with_main_grad: bool) -> None:
    case = Case(11, 6, 37)

    def gradients(hidden: Tensor, weight: Tensor, main_grad: Tensor | None) -> Tensor:
        return loss_of(case, (hidden, weight), chunk_rows=4, main_grad=main_grad, **OPTIONS["everything"]).loss

    results = []
    for function in (gradients, torch.compile(gradients, fullgraph=True, backend="aot_eager")):
        leaves = leaf(case.hidden), leaf(case.weight)
        main_grad = torch.zeros_like(case.weight) if with_main_grad else None
        loss = function(*leaves, main_grad)
        loss.backward()
        results.append((loss, leaves[0].grad, main_grad if with_main_grad else leaves[1].grad))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_cross_entropy_is_torchs() -> None:
    case = Case(9, 5, 21)
    leaves, twins = (leaf(case.hidden), leaf(case.weight)), (leaf(case.hidden), leaf(case.weight))
    kept = case.labels >= 0
    got = linear_cross_entropy(*leaves, case.labels, kept / kept.sum(), chunk_rows=4)
    wanted = torch.nn.functional.cross_entropy(twins[0] @ twins[1].T, case.labels, ignore_index=-1)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(wanted, twins))


@pytest.mark.one_version
def test_wrong_shapes_are_named() -> None:
    case = Case(5, 4, 9)
    with pytest.raises(ValueError, match=r"weights.*expected \(5,\)"):
        linear_policy_loss(case.hidden, case.weight, *case.vectors()[:3], torch.ones(4), clip=0.2)
    with pytest.raises(ValueError, match="main_grad"):
        loss_of(case, (case.hidden, case.weight), clip=0.2, main_grad=torch.zeros(9, 5))


@pytest.mark.parametrize("vocab_size", [277, 280])
def test_bf16_gradients_are_those_of_fp32_whatever_the_vocabulary(vocab_size: int) -> None:
    """The product for them takes a matrix with gaps between its rows, of which a CPU's product may read too much."""
    num_tokens = 100
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 32, generator=generator).bfloat16() for n in (num_tokens, vocab_size))
    labels = torch.randint(vocab_size, (num_tokens,), generator=generator)
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        leaf = hidden.to(dtype).requires_grad_()
        loss = linear_cross_entropy(leaf, weight.to(dtype), labels, torch.full((num_tokens,), 1 / num_tokens))
        gradients.append(torch.autograd.grad(loss, leaf)[0].float())
    torch.testing.assert_close(*gradients, rtol=0.02, atol=1e-3)
