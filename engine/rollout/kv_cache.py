"""Keys and values of the requests that are being decoded, for the layers of one pipeline stage.

`Slots` says which request has which place in the cache. `Prefill` and `Decode` are what attention sees of the cache
(`KeyValueCache` in models/attention.py): the first while whole prompts run through the model, the second while every
request adds one token. When requests start and end is decided by generate.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ppomax.engine.data.batches import Pack
from ppomax.engine.models.attention import PackedSequences, packed_attention
from ppomax.engine.models.transformer import PackedModel


class KVCache:
    """Rotated keys, and values: [layers of this stage, slots, groups (/tp), max_length, head_dim] each."""

    def __init__(self, stage: PackedModel, *, num_slots: int, max_length: int) -> None:
        shape, tp = stage.shape, stage.pg_collection.tp.size()
        # Layer numbers are global and start at 1.
        self.first_layer = stage.decoder.layers[0].layer_number
        self.backend = stage.backend
        sizes = (len(stage.decoder.layers), num_slots, max(1, shape.num_query_groups // tp), max_length, shape.head_dim)
        weight = next(stage.parameters())
        # Zeros, not empty: a masked value has probability 0, and 0 * NaN is NaN.
        self.keys = torch.zeros(sizes, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)

    def layer(self, layer_number: int) -> tuple[Tensor, Tensor]:
        """Keys and values [slots, groups, max_length, head_dim] of a layer, by Megatron's number."""
        return self.keys[layer_number - self.first_layer], self.values[layer_number - self.first_layer]

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copies the requests in the slots sources [n] int64 over those in targets [n] int64."""
        self.keys[:, targets] = self.keys[:, sources]
        self.values[:, targets] = self.values[:, sources]


class Slots:
    """The requests being decoded: running [R] int64 are those in slots 0 to R - 1.

    seen [slots, vocab] bool: the tokens that each has generated; None where nothing asks for them.
    """

    def __init__(self, stage: PackedModel, *, num_slots: int, max_length: int, track_seen: bool) -> None:
        self.num_slots = num_slots
        self.cache = KVCache(stage, num_slots=num_slots, max_length=max_length)
        device = self.cache.keys.device
        self.running = torch.zeros(0, dtype=torch.int64, device=device)
        self.seen = None
        if track_seen:
            self.seen = torch.zeros(num_slots, stage.shape.vocab_size, dtype=torch.bool, device=device)

    @property
    def num_free(self) -> int:
        return self.num_slots - self.running.numel()

    def start(self, requests: Tensor) -> slice:
        """Gives slots to waiting requests [n]; returns which."""
        taken = slice(self.running.numel(), self.running.numel() + requests.numel())
        self.running = torch.cat([self.running, requests])
        if self.seen is not None:
            self.seen[taken] = False
        return taken

    def release(self, is_done: Tensor) -> None:
        """Drops the running requests where is_done [R] bool; the last of the others move into the gaps."""
        num_left = int((~is_done).sum())
        if num_left == self.running.numel():
            return
        targets = is_done[:num_left].nonzero().squeeze(1)
        sources = num_left + (~is_done[num_left:]).nonzero().squeeze(1)
        self.cache.move(sources, targets)
        self.running[targets] = self.running[sources]
        self.running = self.running[:num_left]
        if self.seen is not None:
            self.seen[targets] = self.seen[sources]


@dataclass(frozen=True)
class Prefill:
    """Attention over a pack of whole prompts, which stores their keys and values.

    slots, positions [K] int64: where each of the first K packed tokens goes; what follows them is padding.
    packing: where the prompts start.
    """

    cache: KVCache
    slots: Tensor
    positions: Tensor
    packing: PackedSequences

    def attend(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self.cache.layer(layer_number)
        num_tokens = self.slots.numel()
        keys[self.slots, :, self.positions] = key[:num_tokens]
        values[self.slots, :, self.positions] = value[:num_tokens]
        return packed_attention(query, key, value, self.packing)


@dataclass(frozen=True)
class Decode:
    """Attention of one new token per request: request i is in slot i, its token at positions[i] [R] int64.

    mask [R, 1, 1, length] bool: the positions of the cache that each request sees, its new one included.
    Packed tokens after the first R are padding.
    """

    cache: KVCache
    positions: Tensor
    mask: Tensor

    def attend(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self.cache.layer(layer_number)
        num_requests, length = self.positions.numel(), self.mask.shape[-1]
        slots = torch.arange(num_requests, device=self.positions.device)
        keys[slots, :, self.positions] = key[:num_requests]
        values[slots, :, self.positions] = value[:num_requests]
        num_tokens, num_heads, head_dim = query.shape
        # The query heads of a group stand along the query axis: they share its keys, and nothing is repeated.
        grouped = query[:num_requests].view(num_requests, keys.shape[1], -1, head_dim)
        seen_keys, seen_values = keys[:num_requests, :, :length], values[:num_requests, :, :length]
        output = scaled_dot_product_attention(grouped, seen_keys, seen_values, attn_mask=self.mask)
        return pad(output.reshape(num_requests, num_heads, head_dim), (0, 0, 0, 0, 0, num_tokens - num_requests))


def prefill(cache: KVCache, pack: Pack, prompt_lengths: Tensor, *, first_slot: int) -> Prefill:
    """For a pack of prompts, of lengths [n] int64, that take the slots from first_slot on."""
    num_tokens = int(prompt_lengths.sum())
    slots = first_slot + torch.arange(prompt_lengths.numel(), device=prompt_lengths.device)
    unused = torch.empty(0, device=prompt_lengths.device)  # rotary factors: keys and queries arrive rotated
    packing = PackedSequences(pack.cu_seqlens, pack.max_seqlen, unused, unused, cache.backend)
    slots = slots.repeat_interleave(prompt_lengths, output_size=num_tokens)
    return Prefill(cache, slots, pack.positions[:num_tokens], packing)


def decode(cache: KVCache, positions: Tensor) -> Decode:
    """For one new token at positions [R] int64 of each request in the slots 0 .. R - 1."""
    visible = torch.arange(int(positions.max()) + 1, device=positions.device) <= positions[:, None]
    return Decode(cache, positions, visible[:, None, None])
