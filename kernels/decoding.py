"""The operations that generation makes of a layer: forward only, chosen once for a device and a type, not at each call.

On CUDA and in Triton's interpreter they are those of training and the paged cache. On a CPU they are C kernels where a
compiler is found (native.py), else the torch references.
"""

from collections.abc import Callable
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
    """

    matrix: Callable[[Tensor], Matrix]
    product: Callable[[Tensor, Matrix], Tensor]
    add_product: Callable[[Tensor, Tensor, Matrix], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    swiglu: Callable[[Tensor], Tensor]
    rope_store: Callable[..., Tensor]
    paged_attention: Callable[..., Tensor]


def decoding_ops(weight: Tensor, *, head_dim: int, heads_per_group: int) -> DecodingOps:
    """For weights of this device and type, and heads of this size."""
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
        )
    norm, gate, rotation = (implementation(op, weight) for op in ("rms_norm", "swiglu", "rope_store"))

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm.forward(x, weight, eps=eps)[0]

    return DecodingOps(
        torch.t, torch.matmul, _add_product, rms_norm, gate.forward, rotation.rope_store, paged_attention
    )


def _add_product(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return y.addmm_(x, weight) if y.dtype == torch.float32 else y.add_(x @ weight)
