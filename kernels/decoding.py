"""The operations that generation makes of a layer: forward only, chosen once for a device and a type, not at each call.

On CUDA and in Triton's interpreter they are those of training and the paged cache. On a CPU they are C kernels where a
compiler is found (native.py), else the torch references. flash-attn attends where it can: see `takes_flash_attention`.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppomax.kernels import decoding_c
from ppomax.kernels.dispatch import implementation, use_c
from ppomax.kernels.paged_attention import paged_attention

Matrix = Any
"""A weight as `DecodingOps.matrix` keeps it: for the torch products a view of it, [inputs, outputs]."""


class DecodingOps(NamedTuple):
    """matrix(weight [outputs, inputs]) -> Matrix; product(x [N, inputs], matrix) -> x weight^T, [N, outputs];
    add_product(y, x, matrix) adds that to y, in place, and returns y (in 16 bits rounded before, as in training).

    rms_norm(x [N, H], weight [H], eps) -> [N, H]; swiglu(gate_up [N, 2F]) -> [N, F]: as the operations of these
    names, for rows whose entries are neighbours.

    rope_store, paged_attention: as the operations of these names, without `scale`; slots are int32.

    takes_whole_layers: decoding_c.decode does all of these in one call, for steps of few tokens.
    """

    matrix: Callable[[Tensor], Matrix]
    product: Callable[[Tensor, Matrix], Tensor]
    add_product: Callable[[Tensor, Tensor, Matrix], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    swiglu: Callable[[Tensor], Tensor]
    rope_store: Callable[..., Tensor]
    paged_attention: Callable[..., Tensor]
    takes_whole_layers: bool = False


FLASH_PAGE_SIZE = 256
"""flash-attn 2 takes pages of multiples of so many tokens."""


def takes_flash_attention(weight: Tensor, page_size: int) -> bool:
    """Whether flash-attn attends in decoding steps: installed, 16 bits, on CUDA, and pages as it wants them.

    Its sums depend on the batch: a token that is a near tie may then depend on the company of its request.
    """
    fits = weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16) and page_size % FLASH_PAGE_SIZE == 0
    return fits and find_spec("flash_attn") is not None


def decoding_ops(weight: Tensor, *, head_dim: int, heads_per_group: int, page_size: int) -> DecodingOps:
    """For weights of this device and type, heads of this size and pages of so many tokens."""
    if use_c(weight):
        fits = head_dim % decoding_c.LANES == 0 and heads_per_group <= decoding_c.MAX_HEADS_PER_GROUP
        attention = decoding_c.paged_attention if fits else paged_attention
        return DecodingOps(
            decoding_c.Panels,
            decoding_c.product,
            decoding_c.add_product,
            decoding_c.rms_norm,
            decoding_c.swiglu,
            decoding_c.rope_store,
            attention,
            takes_whole_layers=fits,
        )
    norm, gate, rotation = (implementation(op, weight) for op in ("rms_norm", "swiglu", "rope_store"))

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm.forward(x, weight, eps=eps)[0]

    attention = flash_attention if takes_flash_attention(weight, page_size) else paged_attention
    return DecodingOps(torch.t, torch.matmul, _add_product, rms_norm, gate.forward, rotation.rope_store, attention)


def flash_attention(
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
    """paged_attention by flash-attn where every request has one query; pieces of prompts stay with ours."""
    if max_query > 1 or len(query) != len(context_lengths):
        own = (query, key_pages, value_pages, page_tables, context_lengths, cu_queries)
        return paged_attention(*own, max_query=max_query, max_context=max_context)
    from flash_attn import flash_attn_with_kvcache

    lengths = {"cache_seqlens": context_lengths, "block_table": page_tables}
    return flash_attn_with_kvcache(query[:, None], key_pages, value_pages, **lengths, causal=True)[:, 0]


def _add_product(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return y.addmm_(x, weight) if y.dtype == torch.float32 else y.add_(x @ weight)
