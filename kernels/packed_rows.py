"""Rows of different lengths one after the other in flat [K] tensors, instead of padded to [B, T].

cu_seqlens [B+1] int32 or int64, from 0 on, never falling: row b is entries cu_seqlens[b] to cu_seqlens[b+1], and what
follows the last row is padding. max_seqlen is at least the length of the longest row: the host cannot know it
otherwise without waiting for the device.
"""

import torch
from torch import Tensor


def count_rows(function: str, response_mask: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> int:
    """B, of response_mask [B, T], or [K] with cu_seqlens and max_seqlen; raises ValueError when they do not fit."""
    if (cu_seqlens is None) != (max_seqlen is None):
        raise ValueError(f"{function}: cu_seqlens and max_seqlen must be given together")
    if response_mask.dtype != torch.bool:
        raise ValueError(f"{function}: response_mask is {response_mask.dtype}; expected bool")
    if cu_seqlens is None:
        if response_mask.dim() != 2:
            raise ValueError(f"{function}: response_mask {tuple(response_mask.shape)}; expected [B, T]")
        return response_mask.shape[0]
    if response_mask.dim() != 1 or cu_seqlens.dim() != 1 or not len(cu_seqlens):
        raise ValueError(
            f"{function}: response_mask {tuple(response_mask.shape)} and cu_seqlens {tuple(cu_seqlens.shape)}; "
            "expected [K] and [B+1]"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{function}: cu_seqlens is {cu_seqlens.dtype}; expected int32 or int64")
    return len(cu_seqlens) - 1


def positions(cu_seqlens: Tensor, max_seqlen: int, num_entries: int) -> Tensor:
    """[B, max_seqlen] int64: which of the K = num_entries entries each token is, and K beyond the end of its row.

    One column at least, also when there are only empty rows.
    """
    first, end = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    index = first + torch.arange(max(max_seqlen, 1), device=cu_seqlens.device)
    return torch.where(index < end, index, num_entries)


def padded(x: Tensor, index: Tensor) -> Tensor:
    """The rows of x [K] as [B, max_seqlen], with 0 (False) beyond their ends; index as `positions` gives it."""
    return torch.cat((x, x.new_zeros(1)))[index]


def padded_or_none(x: Tensor | None, index: Tensor) -> Tensor | None:
    return None if x is None else padded(x, index)


def unpadded(x: Tensor, index: Tensor, num_entries: int) -> Tensor:
    """The inverse of `padded`: [K], with 0 outside every row."""
    return x.new_zeros(num_entries + 1).scatter_(0, index.flatten(), x.flatten())[:-1]
