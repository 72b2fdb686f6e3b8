"""Rotary embedding and the way into the cache, for every version, against complex multiplication in fp64."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from ppomax.kernels import rope_store_reference
from ppomax.kernels.decoding import DecodingOps, decoding_ops
from ppomax.kernels.rope_store import rope_store

HAS_C = True


def ops_for(d: int, heads: int) -> DecodingOps:
    return decoding_ops(torch.zeros(1), head_dim=d, heads_per_group=heads, page_size=4)


def normal(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("groups", "heads", "d"), [(1, 1, 8), (2, 3, 16), (4, 1, 32), (2, 2, 6)])
def test_rope_store_rotates_and_stores(groups: int, heads: int, d: int) -> None:
    n, page_size = 5, 4
    mixed = normal(n, groups, heads + 2, d)
    angles = normal(n, d // 2, seed=1) * 10
    keys, values = torch.full((2, 3, page_size, groups, d), torch.nan)
    slots = torch.tensor([7, 0, -1, 11, 4], dtype=torch.int32)
    query = ops_for(d, heads).rope_store(mixed, angles.cos(), angles.sin(), keys, values, slots)

    turn = torch.polar(torch.ones(n, 1, 1, d // 2, dtype=torch.float64), angles.double()[:, None, None])
    real, imaginary = mixed.double().chunk(2, dim=-1)
    rotated = torch.view_as_real(torch.complex(real, imaginary) * turn).transpose(-1, -2).flatten(-2)
    torch.testing.assert_close(query.double(), rotated[:, :, :heads].reshape(n, -1, d), atol=3e-6, rtol=0)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            stored_key, stored_value = (x[slot // page_size, slot % page_size] for x in (keys, values))
            torch.testing.assert_close(stored_key.double(), rotated[token, :, heads], atol=3e-6, rtol=0)
            assert torch.equal(stored_value, mixed[token, :, heads + 1])
    assert keys.isnan().sum() == values.isnan().sum() == (3 * page_size - 4) * groups * d


def test_the_operator_checks_and_does_the_same() -> None:
    mixed, cos, sin = normal(5, 2, 4, 8), normal(5, 4), normal(5, 4)
    keys, values = torch.zeros(2, 3, 4, 2, 8)
    slots = torch.tensor([7, 0, -1, 11, 4])
    expected = torch.zeros(2, 3, 4, 2, 8)
    queries = rope_store_reference.rope_store(mixed, cos, sin, *expected, slots)
    torch.testing.assert_close(rope_store(mixed, cos, sin, keys, values, slots), queries)
    torch.testing.assert_close(torch.stack([keys, values]), expected)
    opcheck(torch.ops.ppomax.rope_store, (mixed, cos, sin, keys, values, slots))
    for arguments in (
        (mixed, cos[:4], sin, keys, values, slots),
        (mixed, cos, sin, keys, values[:, :, :1], slots),
        (mixed, cos, sin, keys.double(), values, slots),
        (mixed, cos, sin, keys, values, slots[:3]),
        (mixed[:, :, :2], cos, sin, keys, values, slots),
    ):
        with pytest.raises(ValueError, match=r"rope_store: .* expected"):
            rope_store(*arguments)
