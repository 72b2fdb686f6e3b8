"""Attention over a paged cache in torch, which is also what generation on a CPU runs.

Pages are gathered and `scaled_dot_product_attention` does the rest. On a CPU requests of like lengths are taken
together, as many as fit a cache of the processor: the cost is that of the tokens in the contexts, not of R times the
longest. Elsewhere lengths cannot be read without waiting for the device, and everything is padded to the bounds.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

GROUP_BYTES = 1 << 20
"""Of gathered keys at a time: more leaves the processor's cache, and is slower in spite of fewer calls."""


class _Batch(NamedTuple):
    """The requests of one call of attention: rows start to stop of the ordered ones. Bounds as in paged_attention."""

    start: int
    stop: int
    max_query: int
    max_context: int
    min_context: int
    is_fresh: bool
    """Whether all of them have nothing in the cache but their queries."""


class _Requests(NamedTuple):
    """[R] each: first row of the query, number of queries, tokens in the cache; page_tables [R, P]."""

    first: Tensor
    counts: Tensor
    contexts: Tensor
    page_tables: Tensor


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
    scale: float,
) -> Tensor:
    """See paged_attention.paged_attention."""
    num_tokens, num_requests, page_size = query.shape[0], context_lengths.numel(), key_pages.shape[1]
    # One more row, where the results of padding go.
    output = query.new_zeros(num_tokens + 1, *query.shape[1:])
    if num_requests == 0 or num_tokens == 0 or max_query == 0:
        return output[:num_tokens]
    first_page = torch.arange(page_tables.shape[1], device=query.device) * page_size
    # A page number behind the context may be anything; any page that exists will do, what it holds is hidden below.
    page_tables = torch.where(first_page < context_lengths[:, None], page_tables, 0)
    requests = _Requests(cu_queries[:-1].long(), cu_queries.diff(), context_lengths, page_tables)
    batches = [_Batch(0, num_requests, max_query, max_context, 0, False)]
    if query.device.type == "cpu":
        token_bytes = key_pages[0, 0].numel() * key_pages.element_size()
        order, batches = _like_lengths(requests, max(1, GROUP_BYTES // token_bytes))
        requests = _Requests(*(x[order] for x in requests))
    num_pages = max((x.stop - x.start) * -(-x.max_context // page_size) for x in batches)
    # Gathered into the same memory again and again, which then stays in the processor's cache.
    space = [x.new_empty(num_pages, *x.shape[1:]) for x in (key_pages, value_pages)]
    for batch in batches:
        chosen = _Requests(*(x[batch.start : batch.stop] for x in requests))
        key, value = _gathered(key_pages, value_pages, chosen, batch, space)
        _attend(query, key, value, chosen, batch, scale, output)
    return output[:num_tokens]


def _like_lengths(requests: _Requests, max_tokens: int) -> tuple[Tensor, list[_Batch]]:
    """(requests [n] that have queries, in batches; the batches), each of at most max_tokens with their padding.

    Chunks of prompts of which a part is already in the cache stay alone: nothing is gained, and masks would be large.
    """
    counts, contexts = requests.counts.tolist(), requests.contexts.tolist()
    ascending = sorted((r for r, count in enumerate(counts) if count > 0), key=contexts.__getitem__)
    single = [r for r in ascending if counts[r] == 1]
    fresh = [r for r in ascending if counts[r] == contexts[r] > 1]
    chunks = [r for r in ascending if 1 < counts[r] < contexts[r]]
    order: list[int] = []
    batches = []
    for kind, limit in ((single, max_tokens), (fresh, max_tokens), (chunks, 0)):
        taken: list[int] = []
        for r, following in zip(kind, [*kind[1:], None], strict=False):
            taken.append(r)
            if following is None or (len(taken) + 1) * contexts[following] > limit:
                start = len(order)
                order += taken
                bounds = counts[r], contexts[r], contexts[taken[0]]
                batches.append(_Batch(start, len(order), *bounds, is_fresh=kind is fresh))
                taken = []
    return torch.tensor(order, dtype=torch.int64), batches


def _gathered(
    key_pages: Tensor, value_pages: Tensor, requests: _Requests, batch: _Batch, space: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Keys and values [n, groups, max_context, d] of these requests, in `space`; 0 behind the end of a context."""
    num, (_, page_size, groups, head_dim) = batch.stop - batch.start, key_pages.shape
    pages = requests.page_tables[:, : -(-batch.max_context // page_size)].reshape(-1)
    free = None
    if batch.min_context < batch.max_context:
        column = torch.arange(batch.min_context, batch.max_context, device=pages.device)
        free = (column >= requests.contexts[:, None])[..., None, None]
    gathered = []
    for source, target in zip((key_pages, value_pages), space, strict=True):
        torch.index_select(source, 0, pages, out=target[: pages.numel()])
        x = target[: pages.numel()].view(num, -1, groups, head_dim)[:, : batch.max_context]
        if free is not None:
            # A masked value has probability 0, but 0 * NaN is NaN.
            x[:, batch.min_context :].masked_fill_(free, 0)
        gathered.append(x.transpose(1, 2))
    return gathered[0], gathered[1]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, requests: _Requests, batch: _Batch, scale: float, output: Tensor
) -> None:
    """Writes the output of these requests to their rows of output [N + 1, heads, d]; to the last row that of padding.

    query [N, heads, d]; key, value [n, groups, max_context, d]
    """
    num_tokens, num_heads, head_dim = query.shape
    num, groups, max_context, _ = key.shape
    mask = None
    if batch.max_query == 1:
        # The query heads of a group stand along the query axis: they share its keys, and nothing is repeated.
        heads = query[requests.first.clamp(max=num_tokens - 1)].view(num, groups, -1, head_dim)
        if batch.min_context < max_context:
            mask = (torch.arange(max_context, device=query.device) < requests.contexts[:, None])[:, None, None]
        result = scaled_dot_product_attention(heads, key, value, attn_mask=mask, scale=scale)
        output[torch.where(requests.counts > 0, requests.first, num_tokens)] = result.reshape(num, num_heads, head_dim)
        return
    step = torch.arange(batch.max_query, device=query.device)
    row = torch.where(step < requests.counts[:, None], requests.first[:, None] + step, num_tokens)  # [n, max_query]
    heads = query[row.clamp(max=num_tokens - 1)].transpose(1, 2)
    if not batch.is_fresh:
        position = (requests.contexts - requests.counts)[:, None] + step
        mask = (torch.arange(max_context, device=query.device) <= position[..., None])[:, None]
    # No token of a fresh prompt sees the padding behind it.
    result = scaled_dot_product_attention(
        heads, key, value, attn_mask=mask, is_causal=batch.is_fresh, scale=scale, enable_gqa=True
    )
    output[row] = result.transpose(1, 2)


def store_pages(key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor) -> None:
    """See paged_attention.store_pages. A skipped token repeats the first that is stored, so that no size is unknown."""
    if slots.numel() == 0:
        return
    is_stored = slots >= 0
    row = torch.where(is_stored, torch.arange(slots.numel(), device=slots.device), is_stored.int().argmax())
    target = slots[row].clamp(min=0).long()
    page_size = key_pages.shape[1]
    for new, pages in ((key, key_pages), (value, value_pages)):
        at = (target // page_size, target % page_size)
        # Where none is stored, slot 0 gets what it has.
        pages[at] = torch.where(is_stored.any(), new[row], pages[at])
