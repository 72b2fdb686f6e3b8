"""What holds for all operations: bool masks; memory order and autocast change nothing; bad arguments are named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ppomax.kernels.experience import experience
from ppomax.kernels.gae import gae
from ppomax.kernels.linear_full_kl import linear_full_kl
from ppomax.kernels.linear_logprobs import linear_logprobs
from ppomax.kernels.linear_policy_loss import linear_cross_entropy, linear_policy_loss
from ppomax.kernels.policy_loss import policy_loss
from ppomax.kernels.sampling import sample
from ppomax.kernels.token_rewards import token_rewards
from ppomax.kernels.value_head_loss import value_head_loss
from ppomax.kernels.value_loss import value_loss
from ppomax.kernels.whiten import masked_moments, whiten

B, T, H, V = 3, 5, 4, 9


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows(seed: int) -> Tensor:
    return normal(B, T, seed=seed)


MASK = normal(B, T, seed=9) > -0.5
SETTINGS: dict[str, Any] = {"kl_coef": 0.1, "gamma": 0.99, "lam": 0.95}
OF_ROWS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "gae": lambda f: gae(f(rows(1)), f(rows(2)), f(MASK), gamma=0.99, lam=0.95),
    "token_rewards": lambda f: token_rewards(normal(B), f(rows(1)), f(rows(2)), f(MASK), kl_coef=0.1),
    "experience": lambda f: experience(normal(B), f(rows(1)), f(rows(2)), f(rows(3)), f(MASK), **SETTINGS)[:4],
    "whiten": lambda f: (whiten(f(rows(1)), f(MASK)),),
    "policy_loss": lambda f: policy_loss(f(rows(1)), f(rows(2)), f(rows(3)), f(rows(4).abs()), clip=0.2),
    "value_loss": lambda f: value_loss(f(rows(1)), f(rows(2)), f(rows(3)), f(rows(4).abs()), clip=0.2),
}


def sequence_first(x: Tensor) -> Tensor:
    """The same [B, T] in memory of [T, B]."""
    return x.t().contiguous().t()


@pytest.mark.parametrize("call", OF_ROWS.values(), ids=OF_ROWS)
def test_memory_order_of_rows_changes_nothing_and_results_are_contiguous(call: Callable[..., Any]) -> None:
    wanted, got = call(lambda x: x), call(sequence_first)
    torch.testing.assert_close(tuple(got), tuple(wanted), rtol=0, atol=0)
    assert all(x.is_contiguous() for x in got)


@pytest.mark.parametrize(
    "call",
    [
        lambda mask: gae(rows(1), rows(2), mask, gamma=1.0, lam=0.9),
        lambda mask: token_rewards(normal(B), rows(1), rows(2), mask, kl_coef=0.1),
        lambda mask: experience(normal(B), rows(1), rows(2), rows(3), mask, **SETTINGS),
        lambda mask: whiten(rows(1), mask),
        lambda mask: masked_moments(rows(1), mask),
        lambda mask: linear_full_kl(normal(B, H), normal(V, H), normal(B, H), normal(V, H), mask[:, 0]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
@pytest.mark.one_version
def test_mask_that_is_not_bool_is_refused_and_left_alone(call: Callable[[Tensor], Any], dtype: torch.dtype) -> None:
    mask = MASK.to(dtype)
    with pytest.raises(ValueError, match="bool"):
        call(mask)
    assert mask.equal(MASK.to(dtype))


def test_packed_rows_may_be_none_at_all() -> None:
    flat, none = torch.zeros(4), torch.zeros(0)
    packing: dict[str, Any] = {"cu_seqlens": torch.tensor([0]), "max_seqlen": 3}
    mask = torch.ones(4, dtype=torch.bool)
    results = (
        *token_rewards(none, flat, flat, mask, kl_coef=0.1, **packing),
        *gae(flat, flat, mask, gamma=1.0, lam=0.9, **packing),
        *experience(none, flat, flat, flat, mask, **SETTINGS, **packing)[:4],
    )
    assert all(x.equal(flat) for x in results)


@pytest.mark.parametrize("gamma", [0.99, 0.9999])
def test_long_rows_lose_nothing_where_gamma_is_near_one(gamma: float) -> None:
    num_tokens = 3000
    ones, mask = torch.ones(1, num_tokens), torch.ones(1, num_tokens, dtype=torch.bool)
    advantages, _ = gae(ones, torch.zeros(1, num_tokens), mask, gamma=gamma, lam=1.0)
    left = num_tokens - torch.arange(num_tokens, dtype=torch.float64)
    wanted = (1 - gamma**left) / (1 - gamma)
    torch.testing.assert_close(advantages[0].double(), wanted, rtol=5e-7, atol=0)


def linear_case() -> tuple[Tensor, ...]:
    vectors = (normal(B), normal(B, seed=2), normal(B, seed=3).abs())
    return normal(B, H), normal(V, H, seed=1), torch.tensor([1, -1, 8]), *vectors


def test_float64_per_token_inputs_do_not_widen_a_float32_loss() -> None:
    hidden, weight, labels, *vectors = linear_case()
    wide = [x.double() for x in vectors]
    got = linear_policy_loss(hidden, weight, labels, *wide, clip=0.2, lm_weights=wide[2], importance_weights=wide[2])
    options: dict[str, Any] = {"lm_weights": vectors[2], "importance_weights": vectors[2]}
    wanted = linear_policy_loss(hidden, weight, labels, *vectors, clip=0.2, **options)
    assert all(x.dtype == torch.float32 for x in got)
    torch.testing.assert_close(tuple(got), tuple(wanted), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_reach_into_the_operations(dtype: torch.dtype) -> None:
    hidden, weight, labels, *vectors = linear_case()
    hidden, weight = hidden.to(dtype), weight.to(dtype)

    def results() -> list[Tensor]:
        main_grad = torch.zeros(V, H)
        leaf = hidden.clone().requires_grad_()
        loss = linear_policy_loss(leaf, weight, labels, *vectors, clip=0.2, main_grad=main_grad).loss
        value = value_head_loss(leaf, weight[0], *vectors, clip=0.2)
        logprobs = linear_logprobs(leaf, weight, labels)[0].sum()
        grads = [torch.autograd.grad(x, leaf)[0] for x in (loss, value.loss, logprobs)]
        return [loss, main_grad, *value, logprobs, *grads]

    wanted = results()
    with torch.autocast("cpu", torch.bfloat16):
        got = results()
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.one_version
def test_bad_arguments_are_named() -> None:
    hidden, weight, labels, *vectors = linear_case()
    with pytest.raises(ValueError, match="float64 goes with float64"):
        linear_logprobs(hidden.double(), weight, labels)
    with pytest.raises(ValueError, match="chunk_rows -1"):
        linear_logprobs(hidden, weight, labels, chunk_rows=-1)
    with pytest.raises(ValueError, match=r"rows_mask \(4,\)"):
        linear_full_kl(hidden, weight, hidden, weight, torch.ones(B + 1, dtype=torch.bool))
    with torch.no_grad(), pytest.raises(ValueError, match="main_grad"):
        linear_cross_entropy(hidden, weight, labels, vectors[2], main_grad=torch.zeros(V, H))
    with pytest.raises(ValueError, match="nan"):
        policy_loss(*vectors[:2], *vectors[1:], clip=float("nan"))
    settings: dict[str, Any] = {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "seen": None}
    seeds = torch.zeros(B, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"temperature 1e-08 must be 0 or at least 0.0001"):
        sample(normal(B, V), temperature=1e-8, seeds=seeds, **settings)
    with pytest.raises(ValueError, match="int32"):
        sample(normal(B, V), temperature=1.0, seeds=seeds.int(), **settings)


def test_linear_operations_write_every_entry_of_what_they_allocate(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels, *vectors = linear_case()

    def results() -> list[Tensor]:
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = linear_policy_loss(*leaves, labels, *vectors, clip=0.2, entropy_coef=0.1, chunk_rows=2, vocab_size=9)
        logprobs, entropy = linear_logprobs(*leaves, labels, chunk_rows=2, vocab_size=9)
        kl = linear_full_kl(hidden, weight, hidden + 1, weight, labels >= 0, chunk_rows=2, vocab_size=9)
        grads = [torch.autograd.grad(x, leaves) for x in (loss.loss, (logprobs + entropy).sum())]
        return [*loss, logprobs, entropy, kl, *grads[0], *grads[1]]

    wanted = results()
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _original=original, **k: _original(*a, **k).fill_(float("nan")))
    torch.testing.assert_close(results(), wanted, rtol=0, atol=0)
