"""The operations of decoding.py by the C kernels, for float32 on a CPU. Requests share no sum: each gets the same bits
in any batch, with any page size and number of threads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ppomax.kernels.native import call

LANES = 16
"""Sizes of heads are multiples of it (LANES in cpu_kernels.c)."""
MAX_HEADS_PER_GROUP = 64
"""ROWS in cpu_kernels.c."""


PANEL_COLUMNS = 32
"""WIDE in cpu_kernels.c."""
MOST_ROWS = 96
"""Of a product by the C kernel: with more, torch's is faster."""
CACHED_BYTES = 32 << 20
"""Of matrices that a processor keeps in its cache."""


class Panels:
    """A weight [outputs, inputs] and its columns once more as panels [outputs / PANEL_COLUMNS, inputs, PANEL_COLUMNS].

    Few rows, of which decoding consists, pass through such panels up to twice as fast as through torch's product, which
    rearranges the weight at each call.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        outputs, inputs = weight.shape
        num_panels = -(-outputs // PANEL_COLUMNS)
        padded = torch.nn.functional.pad(weight, (0, 0, 0, num_panels * PANEL_COLUMNS - outputs))
        self.panels = padded.view(num_panels, PANEL_COLUMNS, inputs).transpose(1, 2).contiguous()


class Layers:
    """Some layers whose matrices are Panels, for `decode`: a table of addresses."""

    def __init__(self, weights: Sequence[Sequence[Tensor | Panels | None]]) -> None:
        """weights: of each layer input_norm, qkv, qkv_bias, projection, mlp_norm, gate_up, down; only the bias may be
        unset.
        """
        self._weights = weights  # keeps them where they are
        addresses = [[_address(weight) for weight in layer] for layer in weights]
        self.table = torch.tensor(addresses, dtype=torch.int64)
        gate_up = weights[0][5]
        assert isinstance(gate_up, Panels)
        self.ffn_size = gate_up.weight.shape[0] // 2
        matrices = [weight.panels.nbytes for layer in weights for weight in layer if isinstance(weight, Panels)]
        self.are_in_cache = sum(matrices) <= CACHED_BYTES

    def __len__(self) -> int:
        return len(self._weights)


def _address(weight: Tensor | Panels | None) -> int:
    if weight is None:
        return 0
    tensor = weight.panels if isinstance(weight, Panels) else weight
    assert tensor.is_contiguous(), "the kernels read rows that follow each other"
    return tensor.data_ptr()


def can_decode(hidden: Tensor) -> bool:
    """Whether `decode` is the fastest way for so many tokens."""
    return len(hidden) <= MOST_ROWS


def decode(
    hidden: Tensor,
    layers: Layers,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    page_tables: Tensor,
    context_lengths: Tensor,
    cu_queries: Tensor,
    *,
    heads_per_group: int,
    eps: float,
) -> None:
    """hidden [N, H] through layers in place, in one call: the other operations of this file one after another.

    keys, values [layers, pages, page_size, groups, d] contiguous. Every token belongs to one of the requests.
    """
    num_layers, _, page_size, groups, d = keys.shape
    num_tokens, size = hidden.shape
    inner = groups * heads_per_group * d
    space = torch.empty(num_tokens, size + 3 * inner + 2 * groups * d + 3 * layers.ffn_size)
    call(
        "decode",
        hidden,
        layers.table,
        num_layers,
        cos,
        sin,
        keys,
        values,
        keys.stride(0),
        slots,
        page_tables,
        context_lengths,
        cu_queries,
        space,
        num_tokens,
        size,
        *page_tables.shape,
        groups,
        heads_per_group,
        d,
        layers.ffn_size,
        page_size,
        eps,
        int(layers.are_in_cache),
    )


def product(x: Tensor, weight: Panels) -> Tensor:
    if len(x) > MOST_ROWS:
        return x @ weight.weight.T
    y = torch.empty(len(x), weight.weight.shape[0])
    call("product", x, weight.panels, y, *x.shape, y.shape[1], 0)
    return y


def add_product(y: Tensor, x: Tensor, weight: Panels) -> Tensor:
    if len(x) > MOST_ROWS:
        return y.addmm_(x, weight.weight.T)
    call("product", x, weight.panels, y, *x.shape, y.shape[1], 1)
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = torch.empty(x.shape)
    call("rms_norm", x, x.stride(0), weight, y, 0, *x.shape, eps)
    return y


def swiglu(gate_up: Tensor) -> Tensor:
    y = torch.empty(gate_up.shape[0], gate_up.shape[1] // 2)
    call("swiglu", gate_up, gate_up.stride(0), y, *y.shape)
    return y


def rope_store(
    mixed: Tensor, cos: Tensor, sin: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor
) -> Tensor:
    num_tokens, groups, width, d = mixed.shape
    mixed = mixed.contiguous()
    query = torch.empty(num_tokens, groups * (width - 2), d)
    call("rope_store", mixed, cos, sin, query, key_pages, value_pages, slots, num_tokens, groups, width - 2, d)
    return query


def paged_attention(
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
    """max_query and max_context are not needed: the lengths are at hand."""
    _, heads, d = query.shape
    page_size, groups = key_pages.shape[1:3]
    output = torch.zeros(query.shape)  # rows behind the last query are padding
    call(
        "paged_attention",
        query,
        key_pages,
        value_pages,
        page_tables,
        context_lengths,
        cu_queries,
        output,
        *page_tables.shape,
        groups,
        heads // groups,
        d,
        page_size,
        *key_pages.stride()[:3],
        d**-0.5,
    )
    return output
