"""Causal attention over packed sequences by C kernels, for float32 on a CPU: no padding, and no scores in memory.

GPUs have flash-attn and torch's own kernels for this (engine/models/attention.py).
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ppomax.kernels.dispatch import use_c
from ppomax.kernels.native import call, load

LANES = 16
"""Sizes of heads are multiples of it (LANES in cpu_vectors.h)."""


def can_attend(x: Tensor, head_dim: int) -> bool:
    """Whether `packed_attention` takes tensors of x's type and device with heads of this size."""
    return use_c(x) and x.dtype == torch.float32 and head_dim % LANES == 0


def packed_attention(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Attention of each token to those of its own sequence up to itself, softmax(q k / sqrt(d)) v.

    query [N, heads, d], key and value [N, groups, d] float32 on the CPU, heads a multiple of groups, d one of LANES.
    cu_seqlens [n + 1] int32, ascending from 0 to N: where each sequence starts. max_seqlen: at least the longest one.
    Returns [N, heads, d] contiguous; differentiable in query, key and value. The rows of a sequence are the same bits
    whatever is packed beside it.
    Raises ValueError where shapes, types or lengths do not fit.
    Source: scores are recomputed in the backward pass as by Dao et al. 2022 (FlashAttention).
    """
    num_tokens, heads, d = query.shape
    groups = key.shape[1]
    if key.shape != (num_tokens, groups, d) or value.shape != key.shape or heads % groups or d % LANES:
        raise ValueError(
            f"packed_attention: query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}; "
            f"expected [N, heads, d] and twice [N, groups, d], heads a multiple of groups, d of {LANES}"
        )
    if any(x.dtype != torch.float32 or x.is_cuda for x in (query, key, value)) or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"packed_attention: query {query.dtype}, key {key.dtype}, value {value.dtype} on {query.device}, "
            f"cu_seqlens {cu_seqlens.dtype}; expected float32 on the CPU, and int32"
        )
    return _forward(*map(_rows, (query, key, value)), cu_seqlens.contiguous(), max_seqlen)[0]


def _rows(x: Tensor) -> Tensor:
    """x with the numbers of each head side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


@custom_op("ppomax::packed_attention", mutates_args=())
def _forward(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    _check_lengths(cu_seqlens, max_seqlen, query.shape[0])
    output, totals = torch.empty(query.shape), torch.empty(query.shape[:2])
    if query.numel() == 0:
        return output, totals
    space = _space(max_seqlen, query.shape[2])
    strides = (part for x in (query, key, value) for part in (x, *x.stride()[:2]))
    call("attention", *strides, *_packing(cu_seqlens, max_seqlen), output, totals, space, *_sizes(query, key))
    return output, totals


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:2])


@custom_op("ppomax::packed_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    output: Tensor,
    totals: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.empty(query.shape), torch.empty(key.shape), torch.empty(value.shape)
    if query.numel() == 0:
        return grads
    space = _space(max_seqlen, query.shape[2])
    strides = (part for x in (_rows(grad), query, key, value) for part in (x, *x.stride()[:2]))
    packing = _packing(cu_seqlens, max_seqlen)
    call("attention_backward", *strides, *packing, output, totals, *grads, space, *_sizes(query, key))
    return grads


@_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    output: Tensor,
    totals: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _check_lengths(cu_seqlens: Tensor, max_seqlen: int, num_tokens: int) -> None:
    starts = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(starts)]
    if not lengths or starts[0] != 0 or starts[-1] != num_tokens or min(lengths) < 0 or max(lengths) > max_seqlen:
        raise ValueError(
            f"packed_attention: cu_seqlens {starts[:8]}... and max_seqlen {max_seqlen} do not describe {num_tokens} "
            "tokens; expected ascending starts from 0 to the number of tokens, and the longest sequence"
        )


def _packing(cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, int, int]:
    return cu_seqlens, cu_seqlens.numel() - 1, max_seqlen


def _sizes(query: Tensor, key: Tensor) -> tuple[int, int, int, float]:
    return query.shape[1], key.shape[1], query.shape[2], query.shape[2] ** -0.5


def _space(max_seqlen: int, d: int) -> Tensor:
    library = load()
    assert library is not None, "the C kernels are not there; see can_attend"
    return torch.empty(torch.get_num_threads(), library.space_size(max_seqlen, d))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, cu_seqlens, ctx.max_seqlen = inputs
    ctx.save_for_backward(query, key, value, cu_seqlens, *output)


def _propagate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, cu_seqlens, output, totals = ctx.saved_tensors
    grads = _backward(grad, query, key, value, cu_seqlens, ctx.max_seqlen, output, totals)
    return *grads, None, None


_forward.register_autograd(_propagate, setup_context=_save)
