"""Log-probabilities from hidden states, against the same with stored logits in fp64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.distributions import Categorical

from ppomax.kernels import linear
from ppomax.kernels.linear_logprobs import linear_logprobs

HAS_C = True
NAN = math.nan


def random_case(N: int, H: int, V: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, H] and weight [V, H] float64, labels [N]."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64)
    return hidden, weight, torch.randint(V, (N,), generator=generator)


def leaf(x: Tensor) -> Tensor:
    """A copy of x to differentiate by."""
    return x.clone().requires_grad_()


def expected(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    distribution = Categorical(logits=hidden.double() @ weight.double().T / temperature)
    return distribution.log_prob(labels), distribution.entropy()


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 100, None])
def test_values_and_gradients_equal_stored_logits(chunk_rows: int | None) -> None:
    hidden, weight, labels = random_case(7, 8, 37)
    leaves = leaf(hidden), leaf(weight)
    twins = leaf(hidden), leaf(weight)
    got = linear_logprobs(*leaves, labels, temperature=0.7, chunk_rows=chunk_rows)
    wanted = expected(*twins, labels, temperature=0.7)
    torch.testing.assert_close(got, wanted)
    factors = torch.randn(2, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for outputs in (got, wanted):
        (torch.stack(outputs) * factors).sum().backward()
    for x, twin in zip(leaves, twins, strict=True):
        torch.testing.assert_close(x.grad, twin.grad)


def test_gradcheck_passes_with_masked_rows_and_padding_columns() -> None:
    hidden, weight, labels = random_case(5, 3, 8)
    labels %= 6
    labels[1] = -1
    inputs = (hidden.requires_grad_(), weight.requires_grad_())
    assert gradcheck(lambda h, w: linear_logprobs(h, w, labels, vocab_size=6, chunk_rows=2), inputs)


def test_logits_of_bf16_inputs_are_not_rounded() -> None:
    hidden, weight, labels = random_case(16, 256, 100)
    hidden, weight = (hidden / 4).bfloat16(), (weight / 4).bfloat16()
    got = linear_logprobs(hidden, weight, labels)
    wanted = expected(hidden, weight, labels)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() < 1e-5


def test_gradients_of_bf16_inputs_are_accurate_to_bf16() -> None:
    hidden, weight, labels = random_case(64, 16, 40)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    leaves = leaf(hidden), leaf(weight)
    twins = leaf(hidden.double()), leaf(weight.double())
    linear_logprobs(*leaves, labels, chunk_rows=5)[0].sum().backward()
    expected(*twins, labels)[0].sum().backward()
    for x, twin in zip(leaves, twins, strict=True):
        assert x.grad is not None
        assert twin.grad is not None
        assert x.grad.dtype == torch.bfloat16
        assert (x.grad.double() - twin.grad).norm() < 6e-3 * twin.grad.norm()


def test_chunks_do_not_change_hidden_gradients_beyond_rounding() -> None:
    hidden, weight, labels = (x.float() if x.is_floating_point() else x for x in random_case(12, 8, 37))
    results = []
    for chunk_rows in (12, 5):
        x = leaf(hidden)
        linear_logprobs(x, weight, labels, chunk_rows=chunk_rows)[0].sum().backward()
        results.append(x.grad)
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)


def test_masked_rows_are_not_read() -> None:
    hidden, weight, labels = random_case(6, 4, 9)
    hidden[2], labels[2] = NAN, -1
    leaves = leaf(hidden), leaf(weight)
    logprobs, entropy = linear_logprobs(*leaves, labels, chunk_rows=4)
    grad_hidden, grad_weight = torch.autograd.grad((logprobs + entropy).sum(), leaves)
    assert logprobs[2] == 0
    assert entropy[2] == 0
    assert (grad_hidden[2] == 0).all()
    assert grad_weight.isfinite().all()


@pytest.mark.parametrize("garbage", [NAN, math.inf])
def test_padding_rows_of_the_head_are_not_read(garbage: float) -> None:
    hidden, weight, labels = random_case(5, 4, 12)
    labels %= 9
    twins = leaf(hidden), leaf(weight)
    weight[9:] = garbage
    leaves = leaf(hidden), leaf(weight)
    for outputs in (linear_logprobs(*leaves, labels, vocab_size=9), expected(twins[0], twins[1][:9], labels)):
        torch.stack(outputs).sum().backward()
    for x, twin in zip(leaves, twins, strict=True):
        torch.testing.assert_close(x.grad, twin.grad)


def test_no_rows_give_empty_results_and_no_gradient() -> None:
    hidden, weight, labels = random_case(0, 4, 9)
    leaves = leaf(hidden), leaf(weight)
    logprobs, _ = linear_logprobs(*leaves, labels)
    assert logprobs.shape == (0,)
    grad_hidden, grad_weight = torch.autograd.grad(logprobs.sum(), leaves)
    assert grad_hidden.shape == (0, 4)
    assert (grad_weight == 0).all()


@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden frozen", "weight frozen"])
def test_frozen_input_gets_no_gradient(frozen: int) -> None:
    hidden, weight, labels = random_case(4, 3, 9)
    leaves, twins = (hidden.clone(), weight.clone()), (hidden.clone(), weight.clone())
    leaves[1 - frozen].requires_grad_()
    twins[1 - frozen].requires_grad_()
    linear_logprobs(*leaves, labels)[0].sum().backward()
    expected(*twins, labels)[0].sum().backward()
    assert leaves[frozen].grad is None
    torch.testing.assert_close(leaves[1 - frozen].grad, twins[1 - frozen].grad)


@pytest.mark.one_version
def test_default_chunks_fit_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(linear.CHUNK_BYTES, "cpu", 4 * 100 * 7 + 3)
    assert linear.rows_per_chunk(torch.empty(100, 1)) == 7
    assert linear.rows_per_chunk(torch.empty(10_000, 1)) == 1


@pytest.mark.one_version
@given(num_rows=st.integers(0, 2000), chunk_rows=st.integers(1, 700))
def test_chunks_cover_the_rows_evenly(num_rows: int, chunk_rows: int) -> None:
    chunks = linear.row_chunks(num_rows, chunk_rows)
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(num_rows))
    sizes = [chunk.stop - chunk.start for chunk in chunks]
    unit = 128 if chunk_rows >= 128 else 1
    assert all(0 < size <= chunk_rows for size in sizes)
    assert all(size == sizes[0] and size % unit == 0 for size in sizes[:-1])
    assert len(sizes) <= -(-num_rows // (chunk_rows // unit * unit))


@pytest.mark.parametrize("N", [1, 5])
def test_compiled_function_has_the_same_values_and_gradients(N: int) -> None:
    hidden, weight, labels = random_case(N, 6, 19)
    results = []
    for function in (
        linear_logprobs,
        torch.compile(linear_logprobs, fullgraph=True, backend="aot_eager", dynamic=False),
    ):
        leaves = leaf(hidden), leaf(weight)
        outputs = function(*leaves, labels, chunk_rows=2)
        results.append((*outputs, *torch.autograd.grad(torch.stack(outputs).sum(), leaves)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_shapes_that_do_not_fit_are_named() -> None:
    hidden, weight, labels = random_case(5, 4, 12)
    with pytest.raises(ValueError, match=r"expected \[N, H\] and \[V/tp, H\]"):
        linear_logprobs(hidden[:, :3], weight, labels)
