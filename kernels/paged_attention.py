"""Attention over a paged key / value cache, and writing to it (Kwon et al. 2023, section 4). No gradients.

Pages hold `page_size` tokens each; a request's page table names its pages in order. Which request gets which page is
decided by the caller.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from ppomax.kernels.dispatch import implementation


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
    scale: float | None = None,
) -> Tensor:
    """Causal attention of the newest tokens of R requests over all that the cache holds of each.

    query [N, heads, d] float: packed, request after request; the keys and values of these tokens are in the cache.
    key_pages, value_pages [num_pages, page_size, groups, d] in query's dtype: head h reads group h // (heads / groups).
    page_tables [R, P] int32: page numbers of each request in order; those behind its context may be anything.
    context_lengths [R] int32: tokens in the cache, those of query included; never fewer than these.
    cu_queries [R + 1] int32: where each request's queries start, and their number; rows of query behind are padding.
    max_query, max_context: no request has more queries, or a longer context; they are not checked against the tensors.
    scale: multiplied to the scores; unset: 1 / sqrt(d).
    Query i of request r stands at position context_lengths[r] - (its number of queries) + i and sees all up to itself.
    Nothing that no query sees is used, whatever stands there. Softmax in fp32, rounded once in 16-bit types.
    Returns [N, heads, d] in query's dtype; padding is 0. Triton gives a request the same bits whatever else is in the
    batch, its page size and max_query; those of a single query change with max_context above 8192 (by powers of two).
    The reference gives them up to rounding. Results differ by rounding between a chunk of one query and larger ones.
    Never waits for the device. Raises ValueError on shapes, types or strides that do not fit.
    Source: online softmax split over the context (Dao et al. 2023, "Flash-Decoding").
    """
    _check_pages("paged_attention", key_pages, value_pages, query.dtype)
    page_size, groups, head_dim = key_pages.shape[1:]
    if query.dim() != 3 or query.shape[2] != head_dim or groups == 0 or query.shape[1] % groups != 0:
        raise ValueError(
            f"paged_attention: query {tuple(query.shape)} must be [N, heads, {head_dim}], heads a multiple of {groups}"
        )
    num_requests, num_columns = page_tables.shape
    if context_lengths.shape != (num_requests,) or cu_queries.shape != (num_requests + 1,):
        raise ValueError(
            f"paged_attention: page_tables {tuple(page_tables.shape)}, context_lengths {tuple(context_lengths.shape)}, "
            f"cu_queries {tuple(cu_queries.shape)}; expected [R, P], [R], [R + 1]"
        )
    if max_context > num_columns * page_size:
        raise ValueError(
            f"paged_attention: {num_columns} pages of {page_size} tokens are too few for max_context {max_context}"
        )
    return _paged_attention(
        query.detach().contiguous(),
        key_pages,
        value_pages,
        page_tables.contiguous(),
        context_lengths.contiguous(),
        cu_queries.contiguous(),
        max_query,
        max_context,
        head_dim**-0.5 if scale is None else scale,
    )


def store_pages(key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor) -> None:
    """Writes keys and values of new tokens to their places in the cache.

    key, value [N, groups, d] float. key_pages, value_pages [num_pages, page_size, groups, d] of the same dtype.
    slots [N] int: page * page_size + offset of each token, no two alike; a token with slot < 0 is skipped.
    Never waits for the device. Raises ValueError on shapes, types or strides that do not fit.
    """
    _check_pages("store_pages", key_pages, value_pages, key.dtype)
    expected = (*slots.shape, *key_pages.shape[2:])
    if slots.dim() != 1 or key.shape != expected or value.shape != expected or value.dtype != key.dtype:
        raise ValueError(
            f"store_pages: key {tuple(key.shape)} {key.dtype}, value {tuple(value.shape)} {value.dtype}, slots "
            f"{tuple(slots.shape)}; expected [N, {key_pages.shape[2]}, {key_pages.shape[3]}] twice and [N]"
        )
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key.detach(), value.detach()))
    _store_pages(key, value, key_pages, value_pages, slots.contiguous())


def _check_pages(name: str, key_pages: Tensor, value_pages: Tensor, dtype: torch.dtype) -> None:
    if key_pages.dim() != 4 or value_pages.shape != key_pages.shape:
        raise ValueError(
            f"{name}: key_pages {tuple(key_pages.shape)} and value_pages {tuple(value_pages.shape)} must be "
            "[num_pages, page_size, groups, d] both"
        )
    if key_pages.dtype != dtype or value_pages.dtype != dtype:
        raise ValueError(f"{name}: pages of {key_pages.dtype} and {value_pages.dtype}; expected {dtype}, as the tokens")
    if key_pages.stride() != value_pages.stride() or key_pages.stride(-1) != 1:
        raise ValueError(
            f"{name}: strides of pages {key_pages.stride()} and {value_pages.stride()} must be equal and end with 1"
        )


@custom_op("ppomax::paged_attention", mutates_args=())
def _paged_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_tables: Tensor,
    context_lengths: Tensor,
    cu_queries: Tensor,
    max_query: int,
    max_context: int,
    scale: float,
) -> Tensor:
    return implementation("paged_attention", query, key_pages).paged_attention(
        query,
        key_pages,
        value_pages,
        page_tables,
        context_lengths,
        cu_queries,
        max_query=max_query,
        max_context=max_context,
        scale=scale,
    )


@_paged_attention.register_fake
def _(query: Tensor, *others: Tensor | float) -> Tensor:
    return torch.empty_like(query)


@custom_op("ppomax::store_pages", mutates_args=("key_pages", "value_pages"))
def _store_pages(key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor) -> None:
    implementation("paged_attention", key, key_pages).store_pages(key, value, key_pages, value_pages, slots)
