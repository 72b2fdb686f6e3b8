"""Rotary embedding and the way into the cache in Triton: a program takes groups of heads of one token."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppomax.kernels.numerics_triton import accumulation_type

PAIRS = 512
"""Pairs of entries that a program takes at least, where there are groups enough: 16 a thread of a warp."""


@triton.jit
def _rope_store_kernel(
    MIXED,
    COS,
    SIN,
    QUERY,
    KEYS,
    VALUES,
    SLOTS,
    stride_page,
    stride_token,
    stride_group,
    groups,
    heads,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ACC: tl.constexpr,
):
    """GROUPS times HEADS rows of (a, b) -> (a cos - b sin, b cos + a sin): query heads and, as the last, the key."""
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * GROUPS
    row = tl.arange(0, GROUPS * HEADS)[:, None]
    group, head = first + row // HEADS, row % HEADS
    column = tl.arange(0, HALF)[None, :]
    is_column = column < D // 2
    inside = (group < groups) & (head <= heads) & is_column
    cos = tl.load(COS + token * (D // 2) + column, mask=is_column, other=0.0).to(ACC)
    sin = tl.load(SIN + token * (D // 2) + column, mask=is_column, other=0.0).to(ACC)
    source = MIXED + ((token * groups + group) * (heads + 2) + head) * D + column
    a = tl.load(source, mask=inside, other=0.0).to(ACC)
    b = tl.load(source + D // 2, mask=inside, other=0.0).to(ACC)
    rotated_a, rotated_b = a * cos - b * sin, b * cos + a * sin
    target = QUERY + ((token * groups + group) * heads + head) * D + column
    tl.store(target, rotated_a, mask=inside & (head < heads))
    tl.store(target + D // 2, rotated_b, mask=inside & (head < heads))
    slot = tl.load(SLOTS + token).to(tl.int64)
    if slot >= 0:
        place = slot // PAGE_SIZE * stride_page + slot % PAGE_SIZE * stride_token
        key = KEYS + place + group * stride_group + column
        tl.store(key, rotated_a, mask=inside & (head == heads))
        tl.store(key + D // 2, rotated_b, mask=inside & (head == heads))
        own = first + tl.arange(0, GROUPS)[:, None]
        entry = tl.arange(0, 2 * HALF)[None, :]
        is_own = (own < groups) & (entry < D)
        value = tl.load(MIXED + ((token * groups + own) * (heads + 2) + heads + 1) * D + entry, mask=is_own)
        tl.store(VALUES + place + own * stride_group + entry, value, mask=is_own)


def rope_store(
    mixed: Tensor, cos: Tensor, sin: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor
) -> Tensor:
    """See rope_store.rope_store; everything contiguous but the pages."""
    num_tokens, groups, width, D = mixed.shape
    query = torch.empty(num_tokens, groups * (width - 2), D, dtype=mixed.dtype, device=mixed.device)
    if num_tokens > 0:
        HEADS, HALF = triton.next_power_of_2(width - 1), triton.next_power_of_2(D // 2)
        GROUPS = min(triton.next_power_of_2(groups), max(1, PAIRS // (HEADS * HALF)))
        _rope_store_kernel[(num_tokens, triton.cdiv(groups, GROUPS))](
            mixed,
            cos,
            sin,
            query,
            key_pages,
            value_pages,
            slots,
            *key_pages.stride()[:3],
            groups,
            width - 2,
            D=D,
            PAGE_SIZE=key_pages.shape[1],
            GROUPS=GROUPS,
            HEADS=HEADS,
            HALF=HALF,
            ACC=accumulation_type(mixed, cos),
            num_warps=min(8, max(1, GROUPS * HEADS * HALF // 256)),
        )
    return query
