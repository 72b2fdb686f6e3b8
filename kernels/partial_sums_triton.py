"""Second stage of sums over a batch: adds what the programs of a kernel wrote, in a fixed order and without atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppomax.kernels.numerics_triton import accumulation_type

BLOCK = 1024


@triton.jit
def _sum_partials_kernel(PARTIAL, OUT, P, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """OUT[k] = sum over p of PARTIAL[p, k]: one program for each k."""
    column, num_columns = tl.program_id(0), tl.num_programs(0)
    part = tl.zeros((BLOCK,), dtype=ACC)
    for start in range(0, P, BLOCK):
        row = start + tl.arange(0, BLOCK)
        part += tl.load(PARTIAL + row.to(tl.int64) * num_columns + column, mask=row < P, other=0.0)
    tl.store(OUT + column, tl.sum(part, axis=0))


def sum_partials(partial: Tensor) -> Tensor:
    """Sums [K] of the columns of partial [P, K], a contiguous float32 or float64 tensor; 0 where P is 0."""
    P, K = partial.shape
    if P == 0:
        return torch.zeros(K, dtype=partial.dtype, device=partial.device)
    out = torch.empty(K, dtype=partial.dtype, device=partial.device)
    _sum_partials_kernel[(K,)](partial, out, P, BLOCK=BLOCK, ACC=accumulation_type(partial), num_warps=4)
    return out
