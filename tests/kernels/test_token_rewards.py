"""KL penalty and score as token rewards: hand-worked rows and a loop over tokens in fp64."""

import math
import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ppomax.kernels import token_rewards as token_rewards_file
from ppomax.kernels.token_rewards import KlEstimator, token_rewards

NAN = math.nan


def test_hand_worked_row() -> None:
    rewards, kl = token_rewards(
        torch.tensor([2.0]),
        torch.tensor([[9.0, -1.0, -2.0, 9.0]]),
        torch.tensor([[7.0, -1.5, -1.0, 7.0]]),
        torch.tensor([[False, True, True, False]]),
        kl_coef=0.1,
    )
    torch.testing.assert_close(kl, torch.tensor([[0.0, 0.5, -1.0, 0.0]]))
    torch.testing.assert_close(rewards, torch.tensor([[0.0, -0.05, 2.1, 0.0]]))


def estimate(d: float, estimator: str) -> float:
    """The estimators of KL from d = ref_logprob - logprob, in python floats."""
    clamped = max(-20.0, min(20.0, d))
    return {"k1": -d, "k2": d * d / 2, "k3": math.expm1(clamped) - clamped}[estimator]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 2), (8, 50)])
def test_equals_a_loop_over_tokens(B: int, T: int, estimator: KlEstimator) -> None:
    generator = torch.Generator().manual_seed(B)
    scores, step = torch.randn(B, generator=generator), torch.randn(B, T, generator=generator)
    logprobs, ref = torch.randn(2, B, T, generator=generator)
    mask = torch.rand(B, T, generator=generator) < 0.6
    rewards, kl = token_rewards(scores, logprobs, ref, mask, kl_coef=0.3, kl_estimator=estimator, step_rewards=step)
    for b in range(B):
        kept = [t for t in range(T) if mask[b, t]]
        for t in range(T):
            wanted_kl = estimate((ref[b, t] - logprobs[b, t]).item(), estimator) if t in kept else 0.0
            wanted = -0.3 * wanted_kl + (step[b, t].item() if t in kept else 0.0)
            wanted += scores[b].item() if kept and t == kept[-1] else 0.0
            assert kl[b, t].item() == pytest.approx(wanted_kl, rel=1e-5, abs=1e-6)
            assert rewards[b, t].item() == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("d", [0.0, 1e-4, -1e-4, 1e-3, -0.2499, 0.2501, 1.0, -3.0, 19.9, 20.0, 35.0, -60.0])
def test_k3_keeps_its_relative_precision_in_fp32(d: float) -> None:
    ref = torch.tensor([[d]])
    _, kl = token_rewards(
        torch.zeros(1), torch.zeros(1, 1), ref, torch.ones(1, 1, dtype=torch.bool), kl_coef=1.0, kl_estimator="k3"
    )
    clamped = max(-20.0, min(20.0, ref.item()))
    # expm1(d) - d in fp64 keeps 8 digits at 1e-4. Just above the series' limit, exp(d) - 1 - d makes the rounding of
    # exp(d) e^d / kl = 38 times larger, and the interpreter's exp is not torch's.
    rel = 4e-6 if d == 0.2501 and os.environ.get("PPOMAX_KERNELS") != "reference" else 1e-6
    assert kl.item() == pytest.approx(math.expm1(clamped) - clamped, rel=rel, abs=0)


def test_full_kl_is_taken_as_given() -> None:
    mask = torch.tensor([[True, True, False]])
    given_kl = torch.tensor([[0.5, 0.25, NAN]])
    rewards, kl = token_rewards(
        torch.zeros(1),
        torch.full((1, 3), NAN),
        torch.full((1, 3), NAN),
        mask,
        kl_coef=2.0,
        kl_estimator="full",
        kl=given_kl,
    )
    torch.testing.assert_close(kl, torch.tensor([[0.5, 0.25, 0.0]]))
    torch.testing.assert_close(rewards, torch.tensor([[-1.0, -0.5, 0.0]]))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("garbage", [NAN, math.inf, -math.inf])
def test_nothing_outside_the_mask_is_read(garbage: float, estimator: KlEstimator) -> None:
    mask = torch.tensor([[True, False, True], [False, False, False]])
    clean = torch.where(mask, torch.rand(2, 3), 0.0)
    dirty = torch.where(mask, clean, garbage)
    scores = torch.tensor([1.0, garbage])
    got = token_rewards(scores, dirty, -dirty, mask, kl_coef=0.5, kl_estimator=estimator, step_rewards=dirty)
    wanted = token_rewards(
        torch.tensor([1.0, 0.0]), clean, -clean, mask, kl_coef=0.5, kl_estimator=estimator, step_rewards=clean
    )
    torch.testing.assert_close(got, wanted)
    for result in got:
        assert (result[~mask] == 0).all()


def test_rewards_are_constants() -> None:
    logprobs = torch.zeros(1, 2, requires_grad=True)
    rewards, kl = token_rewards(
        torch.ones(1), logprobs, torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), kl_coef=0.1
    )
    assert not rewards.requires_grad
    assert not kl.requires_grad


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), T=st.integers(1, 12))
def test_rewards_of_a_sequence_sum_to_score_minus_penalty(seed: int, T: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, generator=generator)
    logprobs, ref = torch.randn(2, 3, T, generator=generator)
    mask = torch.rand(3, T, generator=generator) < 0.5
    rewards, kl = token_rewards(scores, logprobs, ref, mask, kl_coef=0.2)
    wanted = torch.where(mask.any(dim=1), scores, 0) - 0.2 * kl.sum(dim=1)
    torch.testing.assert_close(rewards.sum(dim=1), wanted, rtol=1e-5, atol=1e-5)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a few dozen tokens take several blocks."""
    if os.environ.get("PPOMAX_KERNELS") != "reference":
        from ppomax.kernels import token_rewards_triton

        monkeypatch.setattr(token_rewards_triton, "FEW_ROWS_BLOCK", 16)


def long_case() -> tuple[list[Tensor], Tensor]:
    """scores [3], logprobs, ref_logprobs [3, 37] and mask with gaps [3, 37]; step_rewards [3, 37]."""
    generator = torch.Generator().manual_seed(5)
    logprobs, ref, step = torch.randn(3, 3, 37, generator=generator)
    mask = torch.rand(3, 37, generator=generator) < 0.4
    mask[0] = torch.arange(37) == 2  # the last kept token is not in the last block
    mask[1] = False
    return [torch.randn(3, generator=generator), logprobs, ref, mask], step


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.usefixtures("small_blocks")
def test_fp64_rows_of_several_blocks(estimator: KlEstimator) -> None:
    tensors, step = long_case()
    scores, logprobs, ref, mask = (x if x.dtype == torch.bool else x.double() for x in tensors)
    rewards, kl = token_rewards(
        scores, logprobs, ref, mask, kl_coef=0.1, kl_estimator=estimator, step_rewards=step.double()
    )
    d = ref - logprobs
    wanted = {"k1": -d, "k2": d * d / 2, "k3": torch.expm1(d) - d}[estimator]
    torch.testing.assert_close(kl, torch.where(mask, wanted, 0), rtol=1e-9, atol=1e-9)
    wanted_rewards = torch.where(mask, step.double() - 0.1 * wanted, 0)
    for b in (0, 2):
        wanted_rewards[b, mask[b].nonzero()[-1]] += scores[b]
    torch.testing.assert_close(rewards, wanted_rewards, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_give_fp32_results(dtype: torch.dtype) -> None:
    tensors, step = long_case()
    halves = [x if x.dtype == torch.bool else x.to(dtype) for x in tensors]
    got = token_rewards(*halves, kl_coef=0.1, step_rewards=step.to(dtype))
    floats = [x if x.dtype == torch.bool else x.float() for x in halves]
    torch.testing.assert_close(
        got, token_rewards(*floats, kl_coef=0.1, step_rewards=step.to(dtype).float()), rtol=0, atol=0
    )


@pytest.mark.usefixtures("small_blocks")
def test_rows_may_be_apart_and_columns_too() -> None:
    (scores, logprobs, ref, mask), _ = long_case()
    wide = torch.nn.functional.pad(ref, (5, 6), value=NAN)
    got = token_rewards(scores, logprobs.t().contiguous().t(), wide[:, 5:42], mask, kl_coef=0.1)
    torch.testing.assert_close(got, token_rewards(scores, logprobs, ref, mask, kl_coef=0.1), rtol=0, atol=0)


@pytest.mark.usefixtures("small_blocks")
def test_packed_rows_equal_padded_ones_and_every_entry_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    (scores, logprobs, ref, mask), step = long_case()
    wanted = token_rewards(scores, logprobs, ref, mask, kl_coef=0.1, step_rewards=step)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(NAN))
    again = token_rewards(scores, logprobs, ref, mask, kl_coef=0.1, step_rewards=step)
    torch.testing.assert_close(again, wanted, rtol=0, atol=0)
    flat = [torch.cat((x.flatten(), torch.full((9,), 1).to(x.dtype))) for x in (logprobs, ref, mask, step)]
    got = token_rewards(
        scores,
        *flat[:3],
        kl_coef=0.1,
        step_rewards=flat[3],
        cu_seqlens=torch.tensor([0, 37, 74, 111]),
        max_seqlen=37,
    )
    for packed, padded in zip(got, wanted, strict=True):
        torch.testing.assert_close(packed, torch.cat((padded.flatten(), torch.zeros(9))), rtol=0, atol=0)


def test_compiles_as_one_graph_and_is_a_sound_operator() -> None:
    tensors, _ = long_case()

    def call(*given: Tensor) -> tuple[Tensor, Tensor]:
        return token_rewards(*given, kl_coef=0.1, kl_estimator="k3")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), call(*tensors), rtol=0, atol=0)
    torch.library.opcheck(token_rewards_file._token_rewards, (*tensors, 0.1, "k1", None, None, None, None))


def call(kl_estimator: Any, kl: Tensor | None, columns: int = 3) -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    token_rewards(
        torch.zeros(2), torch.zeros(2, columns), torch.zeros(2, 3), mask, kl_coef=0.1, kl_estimator=kl_estimator, kl=kl
    )


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match='kl is missing with kl_estimator "full"'):
        call("full", None)
    with pytest.raises(ValueError, match='kl is given with kl_estimator "k1"'):
        call("k1", torch.zeros(2, 3))
    with pytest.raises(ValueError, match="kl_estimator 'k4'"):
        call("k4", None)
    with pytest.raises(ValueError, match=r"expected scores \[B\] and the others \[B, T\]"):
        call("k1", None, columns=4)
