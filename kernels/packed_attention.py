"""Causal attention over packed sequences by C kernels, for float32 on a CPU: rotary embedding included, no padding, no
scores in memory.

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


def packed_attention(mixed: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """softmax(q k / sqrt(d)) v over the tokens of the same sequence up to each, with q and k rotated (rope.py).

    mixed [N, groups, heads_per_group + 2, d] float32 on the CPU: query heads, key and value of each group, not yet
    rotated; d a multiple of LANES. cos, sin [N, d / 2] float32: of each token's position.
    cu_seqlens [n + 1] int32, ascending from 0 to N: where each sequence starts. max_seqlen: at least the longest one.
    Returns [N, groups * heads_per_group, d] contiguous; differentiable in mixed. The rows of a sequence are the same
    bits whatever is packed beside it.
    Raises ValueError where shapes, types or lengths do not fit.
    Source: scores are recomputed in the backward pass as by Dao et al. 2022 (FlashAttention).
    """
    if mixed.dim() != 4 or mixed.shape[2] < 3 or mixed.shape[3] % LANES:
        raise ValueError(
            f"packed_attention: mixed {tuple(mixed.shape)}; expected [N, groups, heads_per_group + 2, d], d a multiple "
            f"of {LANES}"
        )
    factors = (mixed.shape[0], mixed.shape[3] // 2)
    if cos.shape != factors or sin.shape != factors:
        raise ValueError(
            f"packed_attention: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be {factors}, [N, d / 2]"
        )
    if any(x.dtype != torch.float32 or x.is_cuda for x in (mixed, cos, sin)) or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"packed_attention: mixed {mixed.dtype} on {mixed.device}, cos {cos.dtype}, sin {sin.dtype}, cu_seqlens "
            f"{cu_seqlens.dtype}; expected float32 on the CPU, and int32"
        )
    return _forward(_packed(mixed), cos.contiguous(), sin.contiguous(), cu_seqlens.contiguous(), max_seqlen)[0]


def _packed(mixed: Tensor) -> Tensor:
    """mixed with the numbers of each token side by side."""
    return mixed if mixed[:1].is_contiguous() else mixed.contiguous()


@custom_op("ppomax::packed_attention", mutates_args=())
def _forward(mixed: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    num_tokens, groups, width, d = mixed.shape
    _check_lengths(cu_seqlens, max_seqlen, num_tokens)
    output = torch.empty(num_tokens, groups * (width - 2), d)
    totals = torch.empty(output.shape[:2])
    packing = (cu_seqlens, cu_seqlens.numel() - 1, max_seqlen)
    sizes = (groups, width - 2, d)
    call("attention", mixed, mixed.stride(0), cos, sin, *packing, output, totals, _space(max_seqlen, d), *sizes)
    return output, totals


@_forward.register_fake
def _(mixed: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    num_tokens, groups, width, d = mixed.shape
    heads = groups * (width - 2)
    return mixed.new_empty(num_tokens, heads, d), mixed.new_empty(num_tokens, heads)


@custom_op("ppomax::packed_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    mixed: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    output: Tensor,
    totals: Tensor,
) -> Tensor:
    _, groups, width, d = mixed.shape
    grad_mixed = torch.empty(mixed.shape)
    call(
        "attention_backward",
        grad.contiguous(),
        mixed,
        mixed.stride(0),
        cos,
        sin,
        cu_seqlens,
        cu_seqlens.numel() - 1,
        max_seqlen,
        output,
        totals,
        grad_mixed,
        _space(max_seqlen, d),
        groups,
        width - 2,
        d,
    )
    return grad_mixed


@_backward.register_fake
def _(
    grad: Tensor,
    mixed: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    output: Tensor,
    totals: Tensor,
) -> Tensor:
    return mixed.new_empty(mixed.shape)


def _check_lengths(cu_seqlens: Tensor, max_seqlen: int, num_tokens: int) -> None:
    starts = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(starts)]
    if not lengths or starts[0] != 0 or starts[-1] != num_tokens or min(lengths) < 0 or max(lengths) > max_seqlen:
        raise ValueError(
            f"packed_attention: cu_seqlens {starts[:8]}... and max_seqlen {max_seqlen} do not describe {num_tokens} "
            "tokens; expected ascending starts from 0 to the number of tokens, and the longest sequence"
        )


def _space(max_seqlen: int, d: int) -> Tensor:
    library = load()
    assert library is not None, "the C kernels are not there; see can_attend"
    return torch.empty(torch.get_num_threads(), library.space_size(max_seqlen, d))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.max_seqlen = inputs
    ctx.save_for_backward(*tensors, *output)


def _propagate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, output, totals = ctx.saved_tensors
    return _backward(grad, *inputs, ctx.max_seqlen, output, totals), None, None, None, None


_forward.register_autograd(_propagate, setup_context=_save)
