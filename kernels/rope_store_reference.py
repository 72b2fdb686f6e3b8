"""Rotary embedding and the way into the cache, in torch: `rope`, then `store_pages`."""

from torch import Tensor

from ppomax.kernels.paged_attention_reference import store_pages
from ppomax.kernels.rope_reference import rotate


def rope_store(
    mixed: Tensor, cos: Tensor, sin: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor
) -> Tensor:
    """See rope_store.rope_store."""
    query, key, value = mixed.split([mixed.shape[2] - 2, 1, 1], dim=2)
    key = rotate(key.squeeze(2), cos, sin, inverse=False)
    store_pages(key, value.squeeze(2), key_pages, value_pages, slots)
    return rotate(query.flatten(1, 2), cos, sin, inverse=False)
