"""The C kernel of attention over packed sequences, against torch's attention in fp64, one sequence at a time."""

from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class Given:
    mixed: Tensor
    cos: Tensor
    sin: Tensor
    lengths: list[int]

    def leaf(self) -> "Given":
        return replace(self, mixed=self.mixed.detach().requires_grad_())


def make(lengths: list[int], heads: int, groups: int, d: int, seed: int = 0) -> Given:
    """Rows lie apart, as they do in a part of a larger tensor; angles are of any kind."""
    noise = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    mixed = torch.randn(tokens, groups + 1, heads // groups + 2, d, generator=noise)[:, :groups]
    angles = torch.rand(tokens, d // 2, generator=noise) * 6
    return Given(mixed, angles.cos(), angles.sin(), lengths)


def attend(given: Given) -> Tensor:
    return packed_attention(given.mixed, given.cos, given.sin, starts(given.lengths), max(given.lengths))


def expected(given: Given) -> Tensor:
    mixed, cos, sin = given.mixed.double(), given.cos.double(), given.sin.double()
    queries, keys, values = mixed[:, :, :-2].flatten(1, 2), mixed[:, :, -2], mixed[:, :, -1]
    parts = zip(
        *(x.split(given.lengths) for x in (rotated(queries, cos, sin), rotated(keys, cos, sin), values)), strict=True
    )
    outputs = [
        scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in part), is_causal=True, enable_gqa=True)
        for part in parts
        if len(part[0])
    ]
    return torch.cat([output[0].transpose(0, 1) for output in outputs])


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(cos, sin)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


def gradient(output: Tensor, given: Given) -> Tensor:
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(output.dtype)
    return torch.autograd.grad(output, given.mixed, upstream)[0]


def assert_close(got: Tensor, wanted: Tensor, tolerance: float = 3e-6) -> None:
    assert (got.double() - wanted.double()).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize(("heads", "groups", "d"), [(4, 2, 32), (2, 2, 64), (3, 1, 128), (8, 2, 80), (2, 1, 16)])
def test_output_and_gradients_are_those_of_torch(heads: int, groups: int, d: int) -> None:
    ours, theirs = (make(LENGTHS, heads, groups, d).leaf() for _ in range(2))
    output, wanted = attend(ours), expected(theirs)
    assert_close(output, wanted)
    assert_close(gradient(output, ours), gradient(wanted, theirs))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 110), min_size=1, max_size=5), st.integers(0, 99), st.floats(0.01, 30))
def test_any_lengths_and_scales(lengths: list[int], seed: int, scale: float) -> None:
    if sum(lengths) == 0:
        return
    made = make(lengths, 2, 1, 16, seed)
    ours, theirs = (replace(made, mixed=made.mixed * scale).leaf() for _ in range(2))
    output, wanted = attend(ours), expected(theirs)
    # Large scores have large roundings; gradients of nearly one-hot weights are differences of nearly equal numbers.
    tolerance = 3e-6 * max(1.0, scale**2)
    assert_close(output, wanted, tolerance)
    got, want = gradient(output, ours), gradient(wanted, theirs)
    assert (got.double() - want).abs().max() <= tolerance * max(want.abs().max(), scale)


def test_company_and_threads_change_no_bit() -> None:
    given = make([60, 3, 140], 4, 2, 32).leaf()
    together = attend(given)
    grad = gradient(together, given)
    torch.set_num_threads(3)
    again = attend(given)
    assert again.equal(together)
    assert gradient(again, given).equal(grad)
    alone = Given(given.mixed.detach()[60:63], given.cos[60:63], given.sin[60:63], [3])
    assert attend(alone).equal(together[60:63])


def test_a_sequence_of_nan_stays_alone() -> None:
    given = make([4, 50, 60], 2, 1, 32)
    given.mixed[4:54] = torch.nan
    given = given.leaf()
    output = attend(given)
    assert output[4:54].isnan().all()
    for x in (output, gradient(output, given)):
        assert x[:4].isfinite().all()
        assert x[54:].isfinite().all()


def test_no_tokens_give_nothing() -> None:
    given = make([0], 2, 1, 16).leaf()
    output = attend(given)
    assert output.shape == (0, 2, 16)
    assert gradient(output, given).shape == (0, 1, 4, 16)


def test_the_operator_keeps_torchs_rules() -> None:
    given = make([3, 20], 2, 1, 16)
    mixed = given.mixed.contiguous().requires_grad_()
    opcheck(module._forward, (mixed, given.cos, given.sin, starts([3, 20]), 20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixed": torch.zeros(8, 4, 32)}, "heads"),
        ({"mixed": torch.zeros(8, 1, 2, 32)}, "heads"),
        ({"mixed": torch.zeros(8, 1, 4, 20)}, "16"),
        ({"mixed": torch.zeros(8, 1, 4, 32).double()}, "float32"),
        ({"cos": torch.zeros(8, 32)}, "d / 2"),
        ({"sin": torch.zeros(7, 16)}, "d / 2"),
        ({"cu_seqlens": torch.tensor([0, 8])}, "int32"),
        ({"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}, "8 tokens"),
        ({"cu_seqlens": torch.tensor([0, 6, 2, 8], dtype=torch.int32)}, "ascending"),
        ({"max_seqlen": 7}, "longest"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    made = make([8], 2, 1, 32)
    given = {"mixed": made.mixed, "cos": made.cos, "sin": made.sin, "cu_seqlens": starts([8]), "max_seqlen": 8}
    with pytest.raises(ValueError, match=message):
        packed_attention(**(given | change))  # type: ignore[arg-type]


def test_other_types_and_sizes_are_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not can_attend(torch.empty(0), 64)  # PPOMAX_KERNELS=reference
    monkeypatch.setenv("PPOMAX_KERNELS", "cpu")
    assert can_attend(torch.empty(0), 64)
    assert not can_attend(torch.empty(0, dtype=torch.bfloat16), 64)
    assert not can_attend(torch.empty(0), 20)
