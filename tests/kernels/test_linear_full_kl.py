"""Full KL from hidden states, against torch.distributions with stored logits in fp64."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from ppomax.kernels.linear_full_kl import linear_full_kl

NAN = math.nan


def random_case(N: int, H: int, V: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """hidden [N, H] and weight [V, H] float64."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64)
    return hidden, torch.randn(V, H, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("chunk_rows", [1, 4, None])
def test_full_kl_equals_torch_distributions(chunk_rows: int | None) -> None:
    hidden, weight = random_case(9, 5, 40)
    ref_hidden, ref_weight = random_case(9, 6, 40, seed=1)
    got = linear_full_kl(hidden, weight, ref_hidden, ref_weight, chunk_rows=chunk_rows)
    wanted = kl_divergence(Categorical(logits=hidden @ weight.T), Categorical(logits=ref_hidden @ ref_weight.T))
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-12)


def test_full_kl_of_close_distributions_does_not_cancel_in_fp32() -> None:
    hidden, weight = random_case(8, 16, 1000)
    hidden, weight = hidden.float(), weight.float()
    ref_hidden = hidden + 1e-4 * torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    got = linear_full_kl(hidden, weight, ref_hidden, weight)
    wanted = linear_full_kl(hidden.double(), weight.double(), ref_hidden.double(), weight.double())
    assert (got >= 0).all()
    torch.testing.assert_close(got.double(), wanted, rtol=2e-2, atol=0)


def test_full_kl_of_a_distribution_with_itself_is_zero() -> None:
    hidden, weight = random_case(4, 5, 40)
    assert (linear_full_kl(hidden, weight, hidden, weight) == 0).all()


def test_full_kl_does_not_read_masked_rows_or_padding_columns() -> None:
    hidden, weight = random_case(5, 4, 12)
    ref_hidden, ref_weight = random_case(5, 4, 12, seed=1)
    wanted = linear_full_kl(hidden, weight[:10], ref_hidden, ref_weight[:10])
    mask = torch.tensor([True, False, True, True, False])
    hidden[1], ref_hidden[4] = NAN, NAN
    weight[10:], ref_weight[11:] = math.inf, NAN
    got = linear_full_kl(hidden, weight, ref_hidden, ref_weight, mask, vocab_size=10, chunk_rows=2)
    torch.testing.assert_close(got[mask], wanted[mask])
    assert (got[~mask] == 0).all()


@pytest.mark.parametrize("N", [0, 1])
def test_full_kl_of_few_rows_has_their_number(N: int) -> None:
    hidden, weight = random_case(N, 4, 9)
    assert linear_full_kl(hidden, weight, hidden, weight).shape == (N,)


def test_impossible_tokens_of_both_add_nothing() -> None:
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [1.0], [-math.inf]])
    ref_weight = torch.tensor([[1.0], [0.5], [-math.inf]])
    wanted = kl_divergence(Categorical(logits=weight[:2, 0]), Categorical(logits=ref_weight[:2, 0]))
    torch.testing.assert_close(linear_full_kl(hidden, weight, hidden, ref_weight), wanted[None])


def test_compiled_function_has_the_same_values() -> None:
    hidden, weight = random_case(5, 4, 12)
    ref_hidden, ref_weight = random_case(5, 3, 12, seed=1)
    compiled = torch.compile(linear_full_kl, fullgraph=True, backend="aot_eager")
    case = (hidden, weight, ref_hidden, ref_weight)
    torch.testing.assert_close(compiled(*case), linear_full_kl(*case), rtol=0, atol=0)


def test_shapes_that_do_not_fit_are_named() -> None:
    hidden, weight = random_case(5, 4, 12)
    with pytest.raises(ValueError, match="equal rows"):
        linear_full_kl(hidden, weight, hidden[:4], weight)
