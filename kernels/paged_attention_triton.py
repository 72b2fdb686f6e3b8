"""Attention over a paged cache in Triton: one kernel for single queries, split over the context, one for many.

A program works for all query heads of one group, so that their keys are read once, for tensor cores at least 16 rows.
It walks through a context in blocks from its start, `last` being the position up to which a row sees: what a block
holds behind it changes nothing, not even a bit. Scores are in units of log2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppomax.kernels.numerics import wide_dtype
from ppomax.kernels.numerics_triton import accumulation_type

TILE_BYTES = 8192
"""Of keys in a block of the decode kernel, and as much of values: several programs share a multiprocessor."""
MAX_KEYS = 128
MIN_SPLIT = 256
"""Tokens that a program of the decode kernel sees at least; more where the bound of the context is above 8192."""
MAX_SPLITS = 32
QUERY_ROWS = 128
"""Pairs of query and head in a program of the prefill kernel."""
NUM_STAGES = 5
"""Blocks are loaded through page numbers that are loaded too: this gives two in flight, where 3 gives one."""
COPY_ENTRIES = 4096
SEARCH_BLOCK = 128

LOG2_E = 1.4426950408889634


@triton.jit
def _attend_keys(
    q,
    last,
    KEYS,
    VALUES,
    TABLE,
    begin,
    end,
    stride_page,
    stride_token,
    scale,
    column,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):
    """(maximum m of the scores, sum of 2^(score - m), values weighted by it) of each row over keys begin .. end - 1."""
    m = tl.full((q.shape[0],), float("-inf"), dtype=ACC)
    total = tl.zeros((q.shape[0],), dtype=ACC)
    acc = tl.zeros((q.shape[0], q.shape[1]), dtype=ACC)
    for start in range(begin, end, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        inside = position < end
        page = tl.load(TABLE + position // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
        at = (page * stride_page + (position % PAGE_SIZE) * stride_token)[:, None] + column[None, :]
        held = inside[:, None] & (column[None, :] < D)
        k = tl.load(KEYS + at, mask=held, other=0.0)
        v = tl.load(VALUES + at, mask=held, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC) * scale
        scores = tl.where(position[None, :] <= last[:, None], scores, float("-inf"))
        top = tl.maximum(m, tl.max(scores, axis=1))
        shrink = tl.exp2(m - top)
        p = tl.exp2(scores - top[:, None])
        total = total * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None]
        acc += tl.dot(p.to(v.dtype), v, input_precision="ieee", out_dtype=ACC)
        m = top
    return m, total, acc


@triton.jit
def _decode_kernel(
    Q,
    KEYS,
    VALUES,
    TABLES,
    CONTEXTS,
    CU_QUERIES,
    MAXIMA,
    SUMS,
    PARTS,
    stride_table,
    stride_page,
    stride_token,
    stride_group,
    num_heads,
    num_splits,
    split_size,
    scale,
    REP: tl.constexpr,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """One split of the context of a request with one query, for the REP heads of a group."""
    request = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    query = tl.load(CU_QUERIES + request).to(tl.int64)
    context = tl.load(CONTEXTS + request).to(tl.int32)
    begin = split * split_size
    if (tl.load(CU_QUERIES + request + 1) - query != 1) | (begin >= context):
        return
    end = tl.minimum(begin + split_size, context)
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    head = group * REP + row
    inside = (row < REP)[:, None] & (column < D)[None, :]
    q = tl.load(Q + (query * num_heads + head)[:, None] * D + column[None, :], mask=inside, other=0.0)
    m, total, acc = _attend_keys(
        q,
        tl.zeros((BLOCK_M,), dtype=tl.int32) + (end - 1),
        KEYS + group * stride_group,
        VALUES + group * stride_group,
        TABLES + request * stride_table,
        begin,
        end,
        stride_page,
        stride_token,
        scale,
        column,
        D,
        PAGE_SIZE,
        BLOCK_N,
        ACC,
    )
    part = (request * num_heads + head) * num_splits + split
    tl.store(MAXIMA + part, m, mask=row < REP)
    tl.store(SUMS + part, total, mask=row < REP)
    tl.store(PARTS + part[:, None] * D + column[None, :], acc, mask=inside)


@triton.jit
def _combine_splits_kernel(
    MAXIMA,
    SUMS,
    PARTS,
    CONTEXTS,
    CU_QUERIES,
    OUT,
    num_heads,
    num_splits,
    split_size,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """One head of a request with one query: its splits, weighted by 2^maximum."""
    request = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    query = tl.load(CU_QUERIES + request).to(tl.int64)
    if tl.load(CU_QUERIES + request + 1) - query != 1:
        return
    split = tl.arange(0, BLOCK_S)
    column = tl.arange(0, BLOCK_D)
    is_used = split * split_size < tl.load(CONTEXTS + request)
    part = (request * num_heads + head) * num_splits + split
    m = tl.load(MAXIMA + part, mask=is_used, other=float("-inf"))
    weight = tl.exp2(m - tl.max(m, axis=0))
    total = tl.sum(weight * tl.load(SUMS + part, mask=is_used, other=0.0), axis=0)
    inside = is_used[:, None] & (column < D)[None, :]
    parts = tl.load(PARTS + part[:, None] * D + column[None, :], mask=inside, other=0.0)
    result = tl.sum(weight[:, None] * parts, axis=0) / total
    tl.store(OUT + (query * num_heads + head) * D + column, result, mask=column < D)


@triton.jit
def _prefill_kernel(
    Q,
    KEYS,
    VALUES,
    TABLES,
    CONTEXTS,
    CU_QUERIES,
    OUT,
    stride_table,
    stride_page,
    stride_token,
    stride_group,
    num_requests,
    num_heads,
    scale,
    REP: tl.constexpr,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SEARCH: tl.constexpr,
    ACC: tl.constexpr,
):
    """A tile of BLOCK_M // REP queries of a request that has more than one, for the REP heads of a group.

    Request r has the tiles from CU_QUERIES[r] // (BLOCK_M // REP) + r on, at least as many as it needs.
    """
    QUERIES: tl.constexpr = BLOCK_M // REP
    tile = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    num_before = tl.full((), 0, dtype=tl.int32)
    for start in range(0, num_requests, SEARCH):
        candidate = start + tl.arange(0, SEARCH)
        is_request = candidate < num_requests
        first_tile = tl.load(CU_QUERIES + candidate, mask=is_request, other=0) // QUERIES + candidate
        num_before += tl.sum((is_request & (first_tile <= tile)).to(tl.int32), axis=0)
    request = (num_before - 1).to(tl.int64)
    first = tl.load(CU_QUERIES + request).to(tl.int64)
    count = (tl.load(CU_QUERIES + request + 1) - first).to(tl.int32)
    context = tl.load(CONTEXTS + request).to(tl.int32)
    skipped = ((tile - first // QUERIES - request) * QUERIES).to(tl.int32)
    if (count <= 1) | (skipped >= count):
        return
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    query = skipped + row // REP
    head = group * REP + row % REP
    is_query = (row < QUERIES * REP) & (query < count)
    inside = is_query[:, None] & (column < D)[None, :]
    at = ((first + query) * num_heads + head)[:, None] * D + column[None, :]
    q = tl.load(Q + at, mask=inside, other=0.0)
    last = tl.minimum(context - count + query, context - 1)
    end = tl.minimum(context - count + skipped + QUERIES, context)
    _, total, acc = _attend_keys(
        q,
        last,
        KEYS + group * stride_group,
        VALUES + group * stride_group,
        TABLES + request * stride_table,
        0,
        end,
        stride_page,
        stride_token,
        scale,
        column,
        D,
        PAGE_SIZE,
        BLOCK_N,
        ACC,
    )
    tl.store(OUT + at, acc / total[:, None], mask=inside)


@triton.jit
def _store_pages_kernel(
    KEY,
    VALUE,
    KEYS,
    VALUES,
    SLOTS,
    stride_key,
    stride_key_group,
    stride_value,
    stride_value_group,
    stride_page,
    stride_token,
    stride_group,
    num_groups,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token, BLOCK_G of its groups."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(SLOTS + token).to(tl.int64)
    if slot < 0:
        return
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = (group < num_groups)[:, None] & (column < D)
    group = group.to(tl.int64)[:, None]
    key = tl.load(KEY + token * stride_key + group * stride_key_group + column, mask=inside)
    value = tl.load(VALUE + token * stride_value + group * stride_value_group + column, mask=inside)
    at = slot // PAGE_SIZE * stride_page + slot % PAGE_SIZE * stride_token + group * stride_group + column
    tl.store(KEYS + at, key, mask=inside)
    tl.store(VALUES + at, value, mask=inside)


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
    scale: float,
) -> Tensor:
    """See paged_attention.paged_attention."""
    output = torch.zeros_like(query)
    if query.numel() == 0 or 0 in (context_lengths.numel(), max_query, max_context):
        return output
    lengths = (page_tables, context_lengths, cu_queries)
    if max_query > 1:
        _launch_prefill(query, key_pages, value_pages, *lengths, output, scale)
    _launch_decode(query, key_pages, value_pages, *lengths, output, max_context, scale)
    return output


def _launch_prefill(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_tables: Tensor,
    context_lengths: Tensor,
    cu_queries: Tensor,
    output: Tensor,
    scale: float,
) -> None:
    """Of the requests with more than one query."""
    (num_tokens, num_heads, D), num_requests = query.shape, context_lengths.numel()
    page_size, groups = key_pages.shape[1:3]
    REP, BLOCK_D = num_heads // groups, max(16, triton.next_power_of_2(D))
    if query.element_size() == 2:
        # Registers hold half of the rows where heads are wide.
        rows, tile_bytes = QUERY_ROWS if BLOCK_D <= 128 else QUERY_ROWS // 2, 2 * TILE_BYTES
    else:
        rows, tile_bytes = 16, TILE_BYTES
    rows = max(rows, triton.next_power_of_2(REP))
    _prefill_kernel[(triton.cdiv(num_tokens, rows // REP) + num_requests, groups)](
        query,
        key_pages,
        value_pages,
        page_tables,
        context_lengths,
        cu_queries,
        output,
        page_tables.stride(0),
        *key_pages.stride()[:3],
        num_requests,
        num_heads,
        scale * LOG2_E,
        REP=REP,
        D=D,
        PAGE_SIZE=page_size,
        BLOCK_M=rows,
        BLOCK_N=_keys_in(tile_bytes, BLOCK_D, query),
        BLOCK_D=BLOCK_D,
        SEARCH=SEARCH_BLOCK,
        ACC=accumulation_type(query),
        num_warps=8,
        num_stages=NUM_STAGES,
    )


def _launch_decode(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_tables: Tensor,
    context_lengths: Tensor,
    cu_queries: Tensor,
    output: Tensor,
    max_context: int,
    scale: float,
) -> None:
    """Of the requests with one query."""
    (_, num_heads, D), num_requests = query.shape, context_lengths.numel()
    page_size, groups = key_pages.shape[1:3]
    REP, BLOCK_D = num_heads // groups, max(16, triton.next_power_of_2(D))
    split_size = max(MIN_SPLIT, triton.next_power_of_2(triton.cdiv(max_context, MAX_SPLITS)))
    num_splits = triton.cdiv(max_context, split_size)
    rows = max(16, triton.next_power_of_2(REP))
    acc = accumulation_type(query)
    parts = torch.empty(num_requests, num_heads, num_splits, D, dtype=wide_dtype(query), device=query.device)
    maxima, sums = parts.new_empty(2, num_requests, num_heads, num_splits)
    _decode_kernel[(num_requests, groups, num_splits)](
        query,
        key_pages,
        value_pages,
        page_tables,
        context_lengths,
        cu_queries,
        maxima,
        sums,
        parts,
        page_tables.stride(0),
        *key_pages.stride()[:3],
        num_heads,
        num_splits,
        split_size,
        scale * LOG2_E,
        REP=REP,
        D=D,
        PAGE_SIZE=page_size,
        BLOCK_M=rows,
        BLOCK_N=_keys_in(TILE_BYTES, BLOCK_D, query),
        BLOCK_D=BLOCK_D,
        ACC=acc,
        num_warps=8 if rows > 32 or BLOCK_D > 128 else 4,
        num_stages=NUM_STAGES,
    )
    _combine_splits_kernel[(num_requests, num_heads)](
        maxima,
        sums,
        parts,
        context_lengths,
        cu_queries,
        output,
        num_heads,
        num_splits,
        split_size,
        D=D,
        BLOCK_S=MAX_SPLITS,
        BLOCK_D=BLOCK_D,
        ACC=acc,
        num_warps=4,
    )


def _keys_in(num_bytes: int, BLOCK_D: int, x: Tensor) -> int:
    """Keys in a block of about this size, which must not depend on page or batch: it fixes the order of sums."""
    return max(16, min(MAX_KEYS, num_bytes // (BLOCK_D * x.element_size())))


def store_pages(key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor) -> None:
    """See paged_attention.store_pages."""
    num_tokens, groups, D = key.shape
    if key.numel() == 0:
        return
    BLOCK_D = triton.next_power_of_2(D)
    BLOCK_G = min(triton.next_power_of_2(groups), max(1, COPY_ENTRIES // BLOCK_D))
    _store_pages_kernel[(num_tokens, triton.cdiv(groups, BLOCK_G))](
        key,
        value,
        key_pages,
        value_pages,
        slots,
        *key.stride()[:2],
        *value.stride()[:2],
        *key_pages.stride()[:3],
        groups,
        D=D,
        PAGE_SIZE=key_pages.shape[1],
        BLOCK_G=BLOCK_G,
        BLOCK_D=BLOCK_D,
        num_warps=4,
    )
