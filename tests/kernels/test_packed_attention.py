"""The C kernel of attention over packed sequences, against torch's attention in fp64, one sequence at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck
from torch.nn.functional import scaled_dot_product_attention

from ppomax.kernels import native
from ppomax.kernels import packed_attention as module
from ppomax.kernels.packed_attention import can_attend, packed_attention

pytestmark = [
    pytest.mark.one_version,
    pytest.mark.skipif(native.load() is None, reason="there is no C compiler"),
]
LENGTHS = [5, 1, 0, 80, 47, 48, 49, 97, 0, 200]


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


def heads_of(lengths: list[int], heads: int, groups: int, d: int, seed: int = 0) -> list[Tensor]:
    """query, key, value; the last two lie in one tensor, as they do behind a projection."""
    noise = torch.Generator().manual_seed(seed)
    query = torch.randn(sum(lengths), heads, d, generator=noise)
    mixed = torch.randn(sum(lengths), groups, 2 * d, generator=noise)
    return [query, mixed[:, :, :d], mixed[:, :, d:]]


def attend(given: list[Tensor], lengths: list[int]) -> Tensor:
    return packed_attention(*given, starts(lengths), max(lengths))


def expected(given: list[Tensor], lengths: list[int]) -> Tensor:
    parts = zip(*(x.double().split(lengths) for x in given), strict=True)
    outputs = [
        scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in part), is_causal=True, enable_gqa=True)
        for part in parts
        if len(part[0])
    ]
    return torch.cat([output[0].transpose(0, 1) for output in outputs])


def gradients(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(output.dtype)
    return list(torch.autograd.grad(output, leaves, upstream))


def assert_close(got: Tensor, wanted: Tensor, tolerance: float = 3e-6) -> None:
    assert (got.double() - wanted.double()).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize(("heads", "groups", "d"), [(4, 2, 32), (2, 2, 64), (3, 1, 128), (8, 2, 80), (2, 1, 16)])
def test_output_and_gradients_are_those_of_torch(heads: int, groups: int, d: int) -> None:
    given = heads_of(LENGTHS, heads, groups, d)
    ours, theirs = ([x.detach().requires_grad_() for x in given] for _ in range(2))
    output, wanted = attend(ours, LENGTHS), expected(theirs, LENGTHS)
    assert_close(output, wanted)
    for got, want in zip(gradients(output, ours), gradients(wanted, theirs), strict=True):
        assert_close(got, want)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 110), min_size=1, max_size=5), st.integers(0, 99), st.floats(0.01, 30))
def test_any_lengths_and_scales(lengths: list[int], seed: int, scale: float) -> None:
    if sum(lengths) == 0:
        return
    given = [x * scale for x in heads_of(lengths, 2, 1, 16, seed)]
    ours, theirs = ([x.detach().requires_grad_() for x in given] for _ in range(2))
    output, wanted = attend(ours, lengths), expected(theirs, lengths)
    # Large scores have large roundings; gradients of nearly one-hot weights are differences of nearly equal numbers.
    tolerance = 3e-6 * max(1.0, scale**2)
    assert_close(output, wanted, tolerance)
    for got, want in zip(gradients(output, ours), gradients(wanted, theirs), strict=True):
        assert (got.double() - want).abs().max() <= tolerance * max(want.abs().max(), scale)


def test_company_and_threads_change_no_bit() -> None:
    lengths = [60, 3, 140]
    given = [x.detach().requires_grad_() for x in heads_of(lengths, 4, 2, 32)]
    together = attend(given, lengths)
    grads = gradients(together, given)
    torch.set_num_threads(3)
    for got, want in zip([again := attend(given, lengths), *gradients(again, given)], [together, *grads], strict=True):
        assert got.equal(want)
    alone = [x.detach()[60:63].requires_grad_() for x in given]
    assert attend(alone, [3]).equal(together[60:63])


def test_a_sequence_of_nan_stays_alone() -> None:
    given = heads_of([4, 50, 60], 2, 1, 32)
    given[0][4:54] = torch.nan
    leaves = [x.detach().requires_grad_() for x in given]
    output = attend(leaves, [4, 50, 60])
    assert output[4:54].isnan().all()
    for x in (output, *gradients(output, leaves)):
        assert x[:4].isfinite().all()
        assert x[54:].isfinite().all()


def test_no_tokens_give_nothing() -> None:
    given = [x.detach().requires_grad_() for x in heads_of([0], 2, 1, 16)]
    output = attend(given, [0])
    assert output.shape == (0, 2, 16)
    assert [x.shape[0] for x in gradients(output, given)] == [0, 0, 0]


def test_the_operator_keeps_torchs_rules() -> None:
    given = [x.detach().requires_grad_() for x in heads_of([3, 20], 2, 1, 16)]
    opcheck(module._forward, (*given, starts([3, 20]), 20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(9, 1, 32)}, "heads"),
        ({"value": torch.zeros(8, 3, 32)}, "heads"),
        ({"query": torch.zeros(8, 2, 20)}, "16"),
        ({"query": torch.zeros(8, 2, 32).double()}, "float32"),
        ({"cu_seqlens": torch.tensor([0, 8])}, "int32"),
        ({"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}, "8 tokens"),
        ({"cu_seqlens": torch.tensor([0, 6, 2, 8], dtype=torch.int32)}, "ascending"),
        ({"max_seqlen": 7}, "longest"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    given = dict(zip(("query", "key", "value"), heads_of([8], 2, 1, 32), strict=True))
    arguments = {**given, "cu_seqlens": starts([8]), "max_seqlen": 8, **change}
    with pytest.raises(ValueError, match=message):
        packed_attention(**arguments)  # type: ignore[arg-type]


def test_other_types_and_sizes_are_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not can_attend(torch.empty(0), 64)  # PPOMAX_KERNELS=reference
    monkeypatch.setenv("PPOMAX_KERNELS", "cpu")
    assert can_attend(torch.empty(0), 64)
    assert not can_attend(torch.empty(0, dtype=torch.bfloat16), 64)
    assert not can_attend(torch.empty(0), 20)
