"""Keys and values of the tokens that requests have behind them, in pages that the host hands out (pages.py).

`PagedCache` is the memory of one pipeline rank. `PagedStep` is what attention sees of it in one step: each request
brings one token or a piece of its prompt, and looks back at its own pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppomax.engine.models.transformer import PackedModel
from ppomax.kernels.decoding import DecodingOps
from ppomax.kernels.decoding_c import Layers, decode


class PagedCache:
    """Rotated keys, and values: [layers of this rank's chunks, pages, page_size, groups (/tp), head_dim] each."""

    def __init__(self, chunks: Sequence[PackedModel], *, num_pages: int, page_size: int) -> None:
        weight = next(chunks[0].parameters())
        num_layers = sum(len(chunk.decoder.layers) for chunk in chunks)
        sizes = (num_layers, num_pages, page_size, local_groups(chunks[0]), chunks[0].shape.head_dim)
        self.keys = torch.zeros(sizes, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copies the contents of pages (source, target); no target is a source."""
        if copies:
            pairs = torch.tensor(copies)
            if self.keys.is_cuda:  # the host does not wait
                pairs = pairs.pin_memory().to(self.keys.device, non_blocking=True)
            sources, targets = pairs.unbind(1)
            self.keys[:, targets] = self.keys[:, sources]
            self.values[:, targets] = self.values[:, sources]


def local_groups(chunk: PackedModel) -> int:
    """Groups of keys and values on this tp rank."""
    return max(1, chunk.shape.num_query_groups // chunk.pg_collection.tp.size())


@dataclass(frozen=True)
class PagedStep:
    """Where the tokens of one step go in the cache, and what each sees: see kernels/paged_attention.py.

    int32 all: slots [N] (-1 for padding), page_tables [R, P], context_lengths [R], cu_queries [R + 1].
    """

    cache: PagedCache
    slots: Tensor
    page_tables: Tensor
    context_lengths: Tensor
    cu_queries: Tensor
    max_query: int
    max_context: int

    def attend(self, ops: DecodingOps, layer: int, mixed: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Stores keys and values of the step's tokens in a layer of the cache, by its number on this rank; returns the
        output of attention [N, heads * head_dim].

        mixed [N, groups, heads_per_group + 2, head_dim]: query heads, key and value of each group, not yet rotated by
        cos, sin [N, head_dim / 2].
        """
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        query = ops.rope_store(mixed, cos, sin, keys, values, self.slots)
        return ops.paged_attention(
            query,
            keys,
            values,
            self.page_tables,
            self.context_lengths,
            self.cu_queries,
            max_query=self.max_query,
            max_context=self.max_context,
        ).flatten(1)

    def decode(
        self,
        hidden: Tensor,
        layers: Layers,
        first: int,
        cos: Tensor,
        sin: Tensor,
        *,
        heads_per_group: int,
        eps: float,
    ) -> None:
        """hidden [N, H] through layers, of which the first has this number, in place and in one call."""
        keys, values = (x[first : first + len(layers)] for x in (self.cache.keys, self.cache.values))
        seen = self.page_tables, self.context_lengths, self.cu_queries
        decode(hidden, layers, cos, sin, keys, values, self.slots, *seen, heads_per_group=heads_per_group, eps=eps)
