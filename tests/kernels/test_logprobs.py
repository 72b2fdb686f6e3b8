"""Log-probability and entropy from logits, against torch.distributions in fp64 and autograd."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.distributions import Categorical

from ppomax.kernels.dispatch import implementation
from ppomax.kernels.logprobs import token_logprobs

HAS_C = True
NAN, INF = math.nan, math.inf


def random_case(N: int, V: int, *, scale: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits [N, V] float64 and labels [N]."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(N, V, generator=generator, dtype=torch.float64)
    return logits, torch.randint(V, (N,), generator=generator)


def expected(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The same in fp64 by torch.distributions, differentiable."""
    distribution = Categorical(logits=logits.double() / temperature)
    return distribution.log_prob(labels), distribution.entropy()


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 1.3])
@pytest.mark.parametrize(("N", "V"), [(1, 2), (3, 37), (7, 1000), (16, 4097)])
def test_values_equal_fp64(N: int, V: int, temperature: float) -> None:
    logits, labels = random_case(N, V)
    logits = logits.float()
    for got, wanted in zip(
        token_logprobs(logits, labels, temperature=temperature), expected(logits, labels, temperature), strict=True
    ):
        assert got.dtype == torch.float32
        scale = max(1.0, logits.abs().max().item() / temperature / 10)
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)])
def test_gradients_equal_fp64_autograd(dtype: torch.dtype, tolerance: float, temperature: float) -> None:
    logits, labels = random_case(7, 37)
    logits = logits.to(dtype)
    factors = torch.randn(2, 7, generator=torch.Generator().manual_seed(1))

    def gradient(x: Tensor, outputs: tuple[Tensor, Tensor]) -> Tensor:
        return torch.autograd.grad((outputs[0] * factors[0] + outputs[1] * factors[1]).sum(), x)[0]

    x, y = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got = gradient(x, token_logprobs(x, labels, temperature=temperature))
    wanted = gradient(y, expected(y, labels, temperature))
    assert got.dtype == dtype
    assert (got.double() - wanted).norm() <= tolerance * wanted.norm()


def test_gradcheck_passes_with_masked_rows() -> None:
    logits, labels = random_case(4, 9)
    labels[2] = -1
    assert gradcheck(lambda x: token_logprobs(x, labels, temperature=0.7), (logits.requires_grad_(),))


@pytest.mark.parametrize("output", [0, 1], ids=["logprobs", "entropy"])
def test_gradient_of_one_output_alone_is_right(output: int) -> None:
    logits, labels = random_case(3, 11)
    x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    token_logprobs(x, labels)[output].sum().backward()
    expected(y, labels)[output].sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_gradient_does_not_change_the_total_of_a_row() -> None:
    logits, labels = random_case(5, 23)
    logits.requires_grad_()
    logprobs, entropy = token_logprobs(logits, labels)
    (grad,) = torch.autograd.grad((logprobs + 0.3 * entropy).sum(), logits)
    assert grad.sum(dim=1).abs().max() < 1e-14


@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
def test_masked_row_is_not_read(garbage: float) -> None:
    logits, labels = random_case(4, 9)
    logits[1] = garbage
    labels[1] = -100
    logits.requires_grad_()
    logprobs, entropy = token_logprobs(logits, labels)
    (grad,) = torch.autograd.grad((logprobs + entropy).sum(), logits)
    assert logprobs[1] == 0
    assert entropy[1] == 0
    assert (grad[1] == 0).all()
    others = torch.tensor([0, 2, 3])
    torch.testing.assert_close(logprobs[others], expected(logits[others], labels[others])[0])


def test_nan_upstream_of_a_masked_row_does_not_reach_the_gradient() -> None:
    logits, labels = random_case(3, 5)
    labels[0] = -1
    logits.requires_grad_()
    logprobs, _ = token_logprobs(logits, labels)
    (grad,) = torch.autograd.grad(logprobs, logits, torch.tensor([NAN, 1.0, 1.0], dtype=torch.float64))
    assert (grad[0] == 0).all()
    assert grad.isfinite().all()


def test_all_rows_masked_gives_zeros() -> None:
    logits = torch.full((3, 5), NAN, requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.full((3,), -1))
    (logprobs.sum() + entropy.sum()).backward()
    assert (logprobs == 0).all()
    assert (entropy == 0).all()
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_no_rows_give_empty_results() -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.zeros(0, dtype=torch.int64))
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert logits.grad is not None
    assert logits.grad.shape == (0, 5)


def test_padding_columns_have_no_probability_and_no_gradient() -> None:
    logits, labels = random_case(6, 13)
    x, y = logits.clone(), logits.clone().requires_grad_()
    x[:, 10:] = torch.tensor([NAN, INF, 1e30], dtype=torch.float64)
    x.requires_grad_()
    labels = labels % 10
    got, wanted = token_logprobs(x, labels, vocab_size=10), expected(y[:, :10], labels)
    torch.testing.assert_close(got, wanted)
    (got[0] + got[1]).sum().backward()
    (wanted[0] + wanted[1]).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("offset", [-1e4, -500.0, -118.0, 88.0, 1e4])
def test_large_offsets_do_not_matter(offset: float) -> None:
    logits, labels = random_case(5, 37)
    shifted = (logits + offset).float()
    got = token_logprobs(shifted, labels)
    wanted = expected(shifted, labels)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=3e-6)


def test_minus_infinity_logits_are_impossible_tokens() -> None:
    logits, labels = random_case(4, 9)
    labels[:] = 3
    logits[:, [0, 8]] = -INF
    x = logits.clone().requires_grad_()
    logprobs, entropy = token_logprobs(x, labels)
    kept = logits[:, 1:8].clone().requires_grad_()
    wanted = expected(kept, labels - 1)
    torch.testing.assert_close((logprobs, entropy), wanted)
    (grad,) = torch.autograd.grad((logprobs + entropy).sum(), x)
    (wanted_grad,) = torch.autograd.grad((wanted[0] + wanted[1]).sum(), kept)
    torch.testing.assert_close(grad[:, 1:8], wanted_grad)
    assert (grad[:, [0, 8]] == 0).all()


def test_impossible_label_has_a_huge_finite_negative_logprob() -> None:
    logprobs, _ = token_logprobs(torch.tensor([[0.0, -INF, 1.0]]), torch.tensor([1]))
    assert -2e30 < logprobs.item() < -1e29


def test_one_hot_row_is_certain() -> None:
    logits = torch.zeros(1, 50)
    logits[0, 7] = 1e4
    logprobs, entropy = token_logprobs(logits, torch.tensor([7]))
    assert logprobs.item() == 0
    assert entropy.item() == 0


@pytest.mark.parametrize("garbage", [NAN, INF])
def test_bad_logit_of_a_kept_row_shows(garbage: float) -> None:
    logprobs, _ = token_logprobs(torch.tensor([[0.0, garbage, 1.0]]), torch.tensor([0]))
    assert logprobs.isnan().all()


def test_strided_logits_are_read_correctly() -> None:
    logits, labels = random_case(9, 12)
    strided = torch.stack((logits, -logits), dim=2)[::2, :, 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(token_logprobs(strided, labels[::2]), expected(logits[::2], labels[::2]))


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4])
def test_shards_of_the_vocabulary_fold_to_the_whole(num_shards: int) -> None:
    logits, labels = random_case(6, 24, scale=20.0)
    labels[0], labels[1] = 0, 23
    compute = implementation("logprobs", logits)
    columns = 24 // num_shards
    shards = torch.stack(
        [
            compute.shard_statistics(shard, labels, temperature=0.7, first=rank * columns, num_real=columns)
            for rank, shard in enumerate(logits.split(columns, dim=1))
        ]
    )
    logprobs, entropy, _, _ = compute.combine_statistics(shards, labels, temperature=0.7)
    torch.testing.assert_close((logprobs, entropy), expected(logits, labels, 0.7))


@settings(max_examples=20, deadline=None)
@given(V=st.integers(2, 40), seed=st.integers(0, 1000), scale=st.sampled_from([0.0, 1.0, 30.0]))
def test_probabilities_of_all_labels_sum_to_one_and_entropy_is_bounded(V: int, seed: int, scale: float) -> None:
    logits, _ = random_case(1, V, scale=scale, seed=seed)
    logprobs, entropy = token_logprobs(logits.expand(V, V), torch.arange(V))
    assert abs(logprobs.exp().sum().item() - 1) < 1e-12
    assert -1e-12 <= entropy[0].item() <= math.log(V) + 1e-12
    torch.testing.assert_close(-(logprobs.exp() * logprobs).sum(), entropy[0])
    if scale == 0:
        assert entropy[0].item() == pytest.approx(math.log(V))


@settings(max_examples=20, deadline=None)
@given(shift=st.floats(-1e3, 1e3), seed=st.integers(0, 1000))
def test_adding_a_constant_to_a_row_changes_nothing(shift: float, seed: int) -> None:
    logits, labels = random_case(3, 17, seed=seed)
    torch.testing.assert_close(
        token_logprobs(logits + shift, labels), token_logprobs(logits, labels), rtol=0, atol=1e-11
    )


@pytest.mark.parametrize(("V", "padded"), [(32000, 32000), (32002, 32128), (128256, 128256), (151936, 152064)])
def test_vocabularies_of_real_models(V: int, padded: int) -> None:
    logits, labels = random_case(3, padded)
    labels %= V
    labels[1] = V - 1
    logits = logits.bfloat16()
    logits[:, V:] = NAN
    x = logits.clone().requires_grad_()
    y = logits[:, :V].double().requires_grad_()
    got, wanted = token_logprobs(x, labels, vocab_size=V), expected(y, labels)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=4e-6)
    (grad,) = torch.autograd.grad((got[0] + 0.5 * got[1]).sum(), x)
    (wanted_grad,) = torch.autograd.grad((wanted[0] + 0.5 * wanted[1]).sum(), y)
    assert (grad[:, :V].double() - wanted_grad).norm() < 4e-3 * wanted_grad.norm()
    assert (grad[:, V:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", [-1e4, -500.0, 88.0, 1e4])
def test_rows_far_from_zero_are_as_exact_as_rows_near_it(level: float, dtype: torch.dtype) -> None:
    logits, labels = random_case(4, 300)
    logits = (logits + level).to(dtype)  # what this rounds is rounded on both sides
    for got, wanted in zip(token_logprobs(logits, labels), expected(logits, labels), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=2e-6)


def test_gradient_may_be_written_over_the_logits() -> None:
    for result_dtype in (torch.float32, torch.bfloat16):
        logits, labels = random_case(5, 9000)
        logits, labels[2] = logits.float(), -1
        compute = implementation("logprobs", logits)
        shard: dict[str, Any] = {"temperature": 1.0, "first": 0, "num_real": 8990}
        statistics = compute.shard_statistics(logits, labels, **shard)
        _, entropy, row_max, log_sum = compute.combine_statistics(statistics[None], labels, temperature=1.0)
        grads = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
        constants = (labels, row_max, log_sum, entropy, grads[0], grads[1])
        wanted = compute.logits_gradient(logits, *constants, **shard, out=torch.empty_like(logits, dtype=result_dtype))
        buffer = logits.clone()
        out = buffer.view(result_dtype)[:, :9000]
        compute.logits_gradient(buffer, *constants, **shard, out=out)
        torch.testing.assert_close(out, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("num_real", [1, 5, 37, 2500])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.1, 3.0, 40.0]))
def test_float32_rows_of_every_kind_equal_fp64(num_real: int, temperature: float, seed: int, scale: float) -> None:
    """Masked rows, labels elsewhere, impossible tokens, padding and gaps between rows at once, over the logits."""
    N, V, first = 9, num_real + 3, 100
    logits, labels = random_case(N, V, scale=scale, seed=seed)
    labels = labels % num_real + first
    labels[1], labels[2], labels[3] = -1, first - 1, first + num_real
    logits[:, num_real:], logits[1] = NAN, NAN
    if num_real > 2:
        logits[4:6, :2] = -INF
        labels[4], labels[5] = first + 2, first
    buffer = torch.full((N, V + 5), NAN)
    x = buffer[:, :V].copy_(logits)
    logits = x.double()
    compute, exact = implementation("logprobs", x), implementation("logprobs", logits)
    shard: dict[str, Any] = {"temperature": temperature, "first": first, "num_real": num_real}
    grads = torch.randn(2, N, generator=torch.Generator().manual_seed(seed))
    grads[:, 1] = NAN
    statistics = compute.shard_statistics(x, labels, **shard)
    wanted = exact.shard_statistics(logits, labels, **shard)
    got_outputs = compute.combine_statistics(statistics[None], labels, temperature=temperature)
    wanted_outputs = exact.combine_statistics(wanted[None], labels, temperature=temperature)
    for got, right in zip(got_outputs[:2], wanted_outputs[:2], strict=True):
        torch.testing.assert_close(got.double(), right, rtol=3e-6, atol=3e-6)
    for chosen in ((grads[0], None), (None, grads[1]), (grads[0], grads[1])):
        over = buffer.clone()[:, :V]
        _, entropy, row_max, log_sum = got_outputs
        got = compute.logits_gradient(over, labels, row_max, log_sum, entropy, *chosen, **shard, out=over)
        double = [None if grad is None else grad.double() for grad in chosen]
        _, entropy, row_max, log_sum = wanted_outputs
        out = torch.empty_like(logits)
        right = exact.logits_gradient(logits, labels, row_max, log_sum, entropy, *double, **shard, out=out)
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=2e-6 * max(1.0, scale))


def test_every_entry_of_the_results_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = random_case(6, 100)
    labels[1] = -1
    x = logits.float().requires_grad_()
    wanted = token_logprobs(x, labels, vocab_size=90)
    (wanted_grad,) = torch.autograd.grad(sum(y.sum() for y in wanted), x)
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _original=original, **k: _original(*a, **k).fill_(NAN))
    got = token_logprobs(x, labels, vocab_size=90)
    (grad,) = torch.autograd.grad(sum(y.sum() for y in got), x)
    torch.testing.assert_close((*got, grad), (*wanted, wanted_grad), rtol=0, atol=0)


def test_compiled_function_has_the_same_values_and_gradients() -> None:
    logits, labels = random_case(5, 40)
    labels[1] = -1
    results = []
    for function in (token_logprobs, torch.compile(token_logprobs, fullgraph=True, backend="aot_eager")):
        x = logits.clone().requires_grad_()
        outputs = function(x, labels, temperature=0.7)
        results.append((*outputs, *torch.autograd.grad(torch.stack(outputs).sum(), x)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_operator_is_declared_correctly() -> None:
    logits, labels = random_case(3, 10)
    torch.library.opcheck(torch.ops.ppomax.token_logprobs, (logits.requires_grad_(), labels, 1.0, None, None))


@pytest.mark.parametrize(
    ("logits", "labels", "temperature", "match"),
    [
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), 1.0, r"\[N, columns\]"),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int32), 1.0, "int64"),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), 0.0, "must be at least"),
    ],
    ids=["shapes", "label dtype", "temperature"],
)
def test_wrong_arguments_are_named(logits: Tensor, labels: Tensor, temperature: float, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        token_logprobs(logits, labels, temperature=temperature)
