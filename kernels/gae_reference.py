"""GAE in torch without a loop over time.

Kept tokens are first moved together, which makes masked ones transparent and "the next kept value" the next column.
What remains is the recursion A_j = delta_j + c A_{j+1} with one constant c = gamma lam, that is A = delta times a
triangular matrix of powers of c. It is applied to blocks of BLOCK columns, and once more to the blocks' first
entries to carry them to the left.
The work is done in fp64: the tensors are small, and sums over thousands of tokens stay exact to fp32 rounding.
"""

import torch
from torch import Tensor

from ppomax.kernels.numerics import keep, wide

BLOCK = 64
"""Columns per block: for rows of 4096 tokens the two triangular matrices are of equal size."""


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, *, gamma: float, lam: float, bootstrap: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See ppomax.kernels.gae."""
    dtype = wide(rewards).dtype
    num_kept = response_mask.sum(dim=1, keepdim=True)  # [B, 1]
    # Column of each token among the kept ones of its row; masked tokens share one more column, which nobody reads.
    column = torch.where(response_mask, response_mask.cumsum(dim=1) - 1, response_mask.shape[1])
    kept_rewards = _together(rewards, column)[:, :-1]
    kept_values = _together(values, column)
    following = torch.zeros_like(num_kept, dtype=torch.float64) if bootstrap is None else bootstrap.double()[:, None]
    index = torch.arange(kept_values.shape[1], device=values.device)
    kept_values = torch.where(index < num_kept, kept_values, torch.where(index == num_kept, following, 0.0))

    delta = kept_rewards + gamma * kept_values[:, 1:] - kept_values[:, :-1]
    advantages = _discounted_sums(keep(delta, index[:-1] < num_kept), gamma * lam)
    advantages = torch.nn.functional.pad(advantages, (0, 1)).gather(1, column)
    returns = keep(advantages + values.double(), response_mask)
    return keep(advantages, response_mask).to(dtype), returns.to(dtype)


def _together(x: Tensor, column: Tensor) -> Tensor:
    """x in fp64 with the token of each position moved to its column: [B, T + 1]."""
    B, T = x.shape
    return x.new_zeros(B, T + 1, dtype=torch.float64).scatter_(1, column, x.double())


def _discounted_sums(x: Tensor, c: float) -> Tensor:
    """A_j = x_j + c A_{j+1} along the columns of x [B, T]."""
    B, T = x.shape
    num_blocks = -(-T // BLOCK)
    blocks = torch.nn.functional.pad(x, (0, num_blocks * BLOCK - T)).view(B, num_blocks, BLOCK)
    local = blocks @ _powers_below_diagonal(BLOCK, c, x)
    # first[b] is A at the start of block b; the starts of neighbouring blocks are c^BLOCK apart.
    first = local[:, :, 0] @ _powers_below_diagonal(num_blocks, c**BLOCK, x)
    carried = torch.nn.functional.pad(first[:, 1:], (0, 1))  # [B, num_blocks]
    distance = torch.arange(BLOCK, 0, -1, dtype=x.dtype, device=x.device)  # columns from each entry to the next block
    return (local + carried[:, :, None] * c**distance).flatten(1)[:, :T]


def _powers_below_diagonal(size: int, c: float, like: Tensor) -> Tensor:
    """The matrix with c^(i - j) at row i >= column j, else 0."""
    index = torch.arange(size, dtype=like.dtype, device=like.device)
    return (c ** (index[:, None] - index).clamp(min=0)).tril()
