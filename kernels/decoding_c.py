"""The operations of decoding.py by the C kernels, for float32 on a CPU. Requests share no sum: each gets the same bits
in any batch, with any page size and number of threads.
"""

import torch
from torch import Tensor

from ppomax.kernels.native import call

LANES = 16
"""Sizes of heads are multiples of it (LANES in cpu_kernels.c)."""
MAX_HEADS_PER_GROUP = 64
"""ROWS in cpu_kernels.c."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = torch.empty(x.shape)
    call("rms_norm", x, x.stride(0), weight, y, *x.shape, eps)
    return y


def swiglu(gate_up: Tensor) -> Tensor:
    y = torch.empty(gate_up.shape[0], gate_up.shape[1] // 2)
    call("swiglu", gate_up, gate_up.stride(0), y, *y.shape)
    return y


def rope_store(
    mixed: Tensor, cos: Tensor, sin: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor
) -> Tensor:
    num_tokens, groups, width, d = mixed.shape
    mixed = mixed.contiguous()
    query = torch.empty(num_tokens, groups * (width - 2), d)
    call("rope_store", mixed, cos, sin, query, key_pages, value_pages, slots, num_tokens, groups, width - 2, d)
    return query


def paged_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_tables: Tensor,
    context_lengths: Tensor,
    cu_queries: Tensor,
    *,
    max_query: int,
    max_context: int,
) -> Tensor:
    """max_query and max_context are not needed: the lengths are at hand."""
    _, heads, d = query.shape
    page_size, groups = key_pages.shape[1:3]
    output = torch.zeros(query.shape)  # rows behind the last query are padding
    call(
        "paged_attention",
        query,
        key_pages,
        value_pages,
        page_tables,
        context_lengths,
        cu_queries,
        output,
        *page_tables.shape,
        groups,
        heads // groups,
        d,
        page_size,
        *key_pages.stride()[:3],
        d**-0.5,
    )
    return output
