"""Rotary position embedding in Triton: a program takes several heads of one token and loads its angles once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppomax.kernels.numerics_triton import accumulation_type

PAIRS = 1024
"""Pairs of entries that a program holds at most: 8 a thread of 4 warps."""


@triton.jit
def _rotate_kernel(
    X,
    stride_token,
    stride_head,
    COS,
    stride_cos,
    SIN,
    stride_sin,
    Y,
    heads,
    half,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ACC: tl.constexpr,
):
    """(a, b) -> (a cos - b sin, b cos + a sin), a and b the two halves of a head; INVERSE by the negative angle."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    is_column = column < half
    inside = (head < heads) & is_column
    cos = tl.load(COS + token * stride_cos + column, mask=is_column, other=0.0).to(ACC)
    sin = tl.load(SIN + token * stride_sin + column, mask=is_column, other=0.0).to(ACC)
    if INVERSE:
        sin = -sin
    source = X + token * stride_token + head * stride_head + column
    a = tl.load(source, mask=inside, other=0.0).to(ACC)
    b = tl.load(source + half, mask=inside, other=0.0).to(ACC)
    target = Y + (token * heads + head) * 2 * half + column
    tl.store(target, a * cos - b * sin, mask=inside)
    tl.store(target + half, b * cos + a * sin, mask=inside)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool) -> Tensor:
    """See rope_reference.rotate; the entries of a head, and the angles of a token, are neighbours in memory."""
    N, heads, D = x.shape
    y = torch.empty((N, heads, D), dtype=x.dtype, device=x.device)
    if y.numel() > 0:
        block = triton.next_power_of_2(D // 2)
        heads_block = min(triton.next_power_of_2(heads), max(1, PAIRS // block))
        _rotate_kernel[(N, triton.cdiv(heads, heads_block))](
            x,
            x.stride(0),
            x.stride(1),
            cos,
            cos.stride(0),
            sin,
            sin.stride(0),
            y,
            heads,
            D // 2,
            INVERSE=inverse,
            HEADS=heads_block,
            HALF=block,
            ACC=accumulation_type(x, cos),
            num_warps=max(1, heads_block * block // 256),
        )
    return y
