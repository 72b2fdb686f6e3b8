"""What the functions that include the vocabulary head share: chunks of rows, their logits, and products of matrices.

Logits are fp32 whatever the dtype of hidden states and weights, and exist for one chunk of rows at a time, in one
buffer; the gradient of a chunk's logits is written over them.
"""

import torch
from torch import Tensor

from ppomax.kernels.numerics import keep, wide, wide_dtype

CHUNK_BYTES = {"cpu": 2**28, "cuda": 2**31}
"""Bytes of fp32 logits that exist at the same time by default, by type of device.

2 GiB is 4185 rows of a 128,256-token vocabulary: every chunk adds to the whole gradient of the weight once, which 4096
rows of products outweigh. A CPU works from its caches: 256 MiB is 2097 rows of a 32,000-token vocabulary.
"""

ROW_UNIT = 128
"""Chunks start and end at multiples of this where they can: matrix products and wide loads want it."""


def check_head(function: str, hidden: Tensor, weight: Tensor) -> None:
    """Raises ValueError unless hidden is [N, H], weight [V/tp, H], neither V nor H 0, and both float64 or neither."""
    is_matrix = hidden.dim() == 2 and weight.dim() == 2 and weight.numel() > 0
    if not is_matrix or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{function}: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}; expected [N, H] and [V/tp, H]"
        )
    if wide_dtype(hidden) != wide_dtype(weight):
        raise ValueError(
            f"{function}: hidden is {hidden.dtype} and weight {weight.dtype}; float64 goes with float64 only"
        )


def rows_per_chunk(weight: Tensor) -> int:
    """Rows whose fp32 logits over the columns of weight [V/tp, H] fit CHUNK_BYTES."""
    return max(1, CHUNK_BYTES["cpu" if weight.device.type == "cpu" else "cuda"] // (4 * weight.shape[0]))


def chunk_size(function: str, chunk_rows: int | None, weight: Tensor) -> int:
    """The rows that a caller asked for, or as many as fit CHUNK_BYTES; raises ValueError below 1."""
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"{function}: chunk_rows {chunk_rows} must be at least 1")
    return chunk_rows or rows_per_chunk(weight)


def row_chunks(num_rows: int, chunk_rows: int) -> list[slice]:
    """Consecutive slices of at most chunk_rows rows: as few as possible, of equal length up to ROW_UNIT."""
    unit = ROW_UNIT if chunk_rows >= ROW_UNIT else 1
    num_chunks = -(-num_rows // (chunk_rows // unit * unit))
    size = -(-num_rows // (max(1, num_chunks) * unit)) * unit
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, max(1, size))]


def logits_buffer(hidden: Tensor, weight: Tensor, chunks: list[slice]) -> Tensor:
    """Uninitialised fp32 (or wider) logits of the longest chunk [C, V/tp]."""
    rows = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    return torch.empty(rows, weight.shape[0], dtype=wide_dtype(hidden), device=hidden.device)


def operand(x: Tensor) -> Tensor:
    """x as matrix products read it: as it is on a GPU, whose tensor cores add up in fp32, else in fp32 or wider."""
    return x if x.is_cuda else wide(x)


def kept_rows(hidden: Tensor, labels: Tensor) -> Tensor:
    """hidden [C, H] with 0 in the rows of labels < 0: NaN there would reach the gradient of the weight."""
    return keep(hidden, labels[:, None] >= 0)


def gradient_view(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory of logits [C, V] as a tensor [C, V] of a dtype of the same size or half of it, row on row."""
    return logits if logits.dtype == dtype else logits.view(dtype)[:, : logits.shape[1]]


def product_into(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out = a @ b, added up in fp32 or wider and rounded once to out's dtype."""
    if a.dtype == b.dtype == out.dtype:
        # With AMX, torch's CPU product of 16-bit numbers reads a little beyond rows that have gaps between them: a NaN
        # in a gap would spoil the row.
        return torch.mm(a if a.is_cuda else a.contiguous(), b, out=out)
    if out.is_cuda and a.dtype == b.dtype:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    # With `out`, unlike an operator, a product keeps its type under autocast.
    result = out if out.dtype == wide_dtype(a) else torch.empty(out.shape, dtype=wide_dtype(a), device=out.device)
    torch.mm(wide(a), wide(b), out=result)
    return out if result is out else out.copy_(result)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out += a @ b, added up in fp32 or wider."""
    if a.dtype == b.dtype == out.dtype:
        return out.addmm_(a, b)
    if out.is_cuda and a.dtype == b.dtype:
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    if out.dtype == wide_dtype(a):
        return out.addmm_(wide(a), wide(b))
    return out.add_(product_into(torch.empty(out.shape, dtype=wide_dtype(a), device=out.device), a, b))
