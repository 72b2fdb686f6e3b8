"""The operations of decoding.py by the C kernels, for float32 on a CPU. Requests share no sum: each gets the same bits
in any batch, with any page size and number of threads.
"""

from collections.abc import Sequence, Sized
from dataclasses import dataclass

import torch
from torch import Tensor

from ppomax.kernels.native import call
from ppomax.kernels.sampling_reference import TOP_P_BITS, share_word

LANES = 16
"""Sizes of heads are multiples of it (LANES in cpu_vectors.h)."""
MAX_HEADS_PER_GROUP = 64
"""ROWS in cpu_kernels.c."""


PANEL_COLUMNS = 32
"""WIDE in cpu_decoding.c."""
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


def can_decode(tokens: Sized) -> bool:
    """Whether `decode` is the fastest way for so many."""
    return len(tokens) <= MOST_ROWS


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
    space = torch.empty(num_tokens, _step_space(layers, size, groups, heads_per_group, d))
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


def _step_space(layers: Layers, size: int, groups: int, heads_per_group: int, d: int) -> int:
    """Numbers that the kernel works with for each token: step_space in cpu_decoding.c."""
    return size + (3 * heads_per_group + 2) * groups * d + 3 * layers.ffn_size


@dataclass(frozen=True)
class Model:
    """A whole model for `decode_steps`. embedding [V, H]; head: of the vocabulary, maybe padded; cos, sin [positions,
    d / 2]. heads_per_group: of queries.
    """

    layers: Layers
    embedding: Tensor
    final_norm: Tensor
    head: Panels
    cos: Tensor
    sin: Tensor
    heads_per_group: int
    eps: float


@dataclass(frozen=True)
class DrawRule:
    """How tokens are drawn, as in sampling.py, and eos_id, which ends a request: negative, none does. has_early: some
    requests may not end yet.
    """

    vocab_size: int
    temperature: float
    top_k: int
    top_p: float
    eos_id: int
    has_early: bool


@dataclass(frozen=True)
class Drawn:
    """What is drawn for a batch of B requests, [B, S] each: see ppomax.engine.rollout.batch. seeds [B]."""

    tokens: Tensor
    logprobs: Tensor
    drawn_logprobs: Tensor
    margins: Tensor
    seeds: Tensor


def decode_steps(
    model: Model,
    rule: DrawRule,
    drawn: Drawn,
    keys: Tensor,
    values: Tensor,
    requests: Tensor,
    positions: Tensor,
    first_ends: Tensor,
    page_tables: Tensor,
    num_steps: int,
) -> None:
    """Goes on with some requests of a batch from the token that each has at its position: num_steps tokens for each, or
    until eos, written into `drawn`. Bit for bit what `decode` and `sample_with_margins` do step by step.

    keys, values [layers, pages, page_size, groups, d] contiguous. requests, positions, first_ends [R] int32: rows of
    the batch, no two the same, places of the tokens, and the first place at which eos may come. page_tables [R, P]
    int32: with pages for all steps. These four are overwritten. Threads share the requests; the layers should be in the
    cache.
    """
    layers, (num_layers, _, page_size, groups, d) = model.layers, keys.shape
    num, size, outputs = len(requests), model.embedding.shape[1], model.head.weight.shape[0]
    of_layers = _step_space(layers, size, groups, model.heads_per_group, d)
    space = torch.empty(num, 2 * size + d + 2 * outputs + of_layers)
    given = (model.embedding, model.final_norm, model.cos, model.sin, keys, values, *vars(drawn).values())
    assert all(x.is_contiguous() for x in given), "the kernel reads rows that follow each other"
    has_filters = rule.temperature > 0 and (rule.top_k > 0 or rule.top_p < 1)
    filters = torch.empty(torch.get_num_threads(), 2, rule.vocab_size, dtype=torch.int64) if has_filters else 0
    part = share_word(rule.top_p) if rule.top_p < 1 else 1 << TOP_P_BITS
    is_plain = rule.temperature in (0, 1) and not has_filters and not rule.has_early
    call(
        "decode_steps",
        *(layers.table, num_layers, model.embedding, model.final_norm, model.head.panels, model.cos, model.sin),
        *(keys, values, keys.stride(0)),
        *(drawn.tokens, drawn.logprobs, drawn.drawn_logprobs, drawn.margins, drawn.tokens.shape[1], drawn.seeds),
        *(requests, positions, first_ends, page_tables, space, filters),
        *(num, num_steps, size, page_tables.shape[1], groups, model.heads_per_group, d, layers.ffn_size, page_size),
        *(outputs, rule.vocab_size, rule.top_k, part, rule.eos_id, int(is_plain)),
        *(model.eps, rule.temperature),
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
