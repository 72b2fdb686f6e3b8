"""Sampling in torch, each rank of a tensor-parallel group on its own block of the vocabulary.

The draw is the argmax of s_v + g_v over the kept tokens: with g_v = -log(-log u_v) its probability is softmax(s).

Top-k and top-p keep the first tokens of the order "likelier first, lower ids first among equals". Where that prefix
ends is found without sorting: a token's place is its distance below the best score, an integer, and the last kept
distance is searched eight bits at a time, from how many tokens, or how much probability, lie in each of 256 bins. Only
bins cross the group. Probabilities are integers too (`mass`), whose sums do not depend on the order: the kept tokens
are the same for every group size, batch, device and version.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from ppomax.kernels.philox import token_uniforms
from ppomax.kernels.shards import first_column, gather_shards, group_size, sum_shards

SEEN, BANNED = 1, 2
"""Marks of a token: it is penalised; it is not drawn."""

FRACTION_BITS = 26
"""Scores that differ by less than 2^-26 may count as equal in the filters."""

SCORE_LIMIT = 2.0**35
"""Scores beyond +- this count as equal."""

FARTHEST = 2**32 - 1
"""The largest distance: tokens less likely than the best by more than e^64 count as equals."""

LOG2_E = round(1.4426950408889634 * 2**31)
MASS_BITS = 42
"""The best token has mass 2^42 and the sum over 2^20 tokens fits into int64; what is below e^-29 of it has none."""

EXP2_COEFFICIENTS = (2977044448, 1031763232, 238367582, 41219527, 5548193, 493839)
"""1 - 2^-f = f (c0 - f (c1 - f (c2 - ...))) for f in [0, 1) within 6e-9, all in units of 2^-32 (fit at the Chebyshev
nodes, degree 6)."""

TOP_P_BITS = 31
WORD = 0xFFFFFFFF
DIGIT_BITS = 8


@torch.no_grad()
def sample(
    logits: Tensor,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    repetition_penalty: float,
    marks: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
    vocab_size: int,
    tp_group: ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ppomax.kernels.sampling; logits [R, V/tp] are this rank's, in any type."""
    columns = logits.shape[1]
    first = first_column(columns, tp_group)
    ids = torch.arange(first, first + columns, device=logits.device)
    logits = torch.where(ids < vocab_size, logits.float(), -torch.inf)
    scores = modified(logits, temperature=temperature, repetition_penalty=repetition_penalty, marks=marks, first=first)
    noisy = scores.double()
    if temperature > 0:
        scores = filtered(scores, top_k=top_k, top_p=top_p, tp_group=tp_group)
        noise = -(-token_uniforms(seeds, positions, columns, first_id=first).log()).log()
        noisy = torch.where(scores == -torch.inf, -torch.inf, bounded(scores) + noise)
    best, tokens = noisy.max(dim=1, keepdim=True)
    record = [
        best,
        noisy.scatter(1, tokens, -torch.inf).amax(dim=1, keepdim=True),
        first + tokens,
        logits.gather(1, tokens),
        scores.gather(1, tokens),
        logits.double().logsumexp(dim=1, keepdim=True),
        scores.double().logsumexp(dim=1, keepdim=True),
    ]
    return combined(torch.cat([x.double() for x in record], dim=1), temperature, tp_group)


def modified(
    logits: Tensor, *, temperature: float, repetition_penalty: float, marks: Tensor | None, first: int
) -> Tensor:
    """Logits [R, V/tp] float32, whose first column is token id `first`, after penalty and temperature; -inf for what
    is banned, and for NaN.
    """
    scores, columns = logits, logits.shape[1]
    is_banned = None
    if marks is not None:
        # As tensors, since torch multiplies by the reciprocal when it divides by a number on a GPU.
        penalty = logits.new_full((), repetition_penalty)
        penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
        marks = marks[:, first : first + columns]
        marks = pad(marks, (0, columns - marks.shape[1]))
        scores = torch.where((marks & SEEN) != 0, penalised, scores)
        is_banned = (marks & BANNED) != 0
    if temperature > 0:
        scores = scores / logits.new_full((), temperature)
    return torch.where(scores.isnan() if is_banned is None else scores.isnan() | is_banned, -torch.inf, scores)


def combined(
    record: Tensor, temperature: float, tp_group: ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `sample` returns, from what each rank found in its columns.

    record [R, 7] float64: best and second best score with noise; of the best one token id, logit and score; logsumexp
    of the logits and of the scores.
    """
    if group_size(tp_group) > 1:
        record = _of_the_winner(gather_shards(record, tp_group))
    best, second, tokens, logits, scores, log_total, score_log_total = record.unbind(dim=1)
    logprobs = logits - log_total
    sampling_logprobs = scores - score_log_total if temperature > 0 else torch.zeros_like(logprobs)
    sampling_logprobs = torch.where(logprobs.isnan(), torch.nan, sampling_logprobs)
    return tokens.long(), logprobs.float(), (best - second).float(), sampling_logprobs.float()


def _of_the_winner(records: Tensor) -> Tensor:
    """The record [R, 7] of the whole vocabulary, from those of the ranks [tp, R, 7]."""
    best, second, *chosen, log_total, score_log_total = records.unbind(dim=2)
    winner = best.argmax(dim=0, keepdim=True)  # the lowest rank, so the lowest id, among equals
    rivals = best.scatter(0, winner, second.gather(0, winner)).amax(dim=0)
    token, logit, score = (x.gather(0, winner)[0] for x in chosen)
    totals = log_total.logsumexp(dim=0), score_log_total.logsumexp(dim=0)
    return torch.stack([best.gather(0, winner)[0], rivals, token, logit, score, *totals], dim=1)


def filtered(scores: Tensor, *, top_k: int, top_p: float, tp_group: ProcessGroup | None = None) -> Tensor:
    """scores [R, V/tp] with -inf for the tokens that top-k, then top-p of the renormalised rest, drop."""
    if top_k == 0 and top_p == 1:
        return scores
    largest = gather_shards(fixed_point(scores).amax(dim=1), tp_group).amax(dim=0)
    distance = (largest[:, None] - fixed_point(scores)).clamp(max=FARTHEST)
    keep = torch.ones_like(distance, dtype=torch.bool)
    if top_k > 0:
        last, closer = _last_distance(distance, torch.ones_like(distance), torch.full_like(largest, top_k), tp_group)
        keep = _prefix(distance, last, top_k - closer, tp_group)
    if top_p < 1:
        masses = torch.where(keep, mass(distance), 0)
        wanted = share(sum_shards(masses.sum(dim=1), tp_group), top_p)
        last, closer = _last_distance(distance, masses, wanted, tp_group)
        each = mass(last).clamp(min=1)
        keep &= _prefix(distance, last, (wanted - closer + each - 1) // each, tp_group)
    return torch.where(keep, scores, -torch.inf)


def fixed_point(scores: Tensor) -> Tensor:
    """scores as integers in units of 2^-FRACTION_BITS, rounded towards 0."""
    return (bounded(scores) * 2.0**FRACTION_BITS).long()


def bounded(scores: Tensor) -> Tensor:
    """scores in fp64, within +- SCORE_LIMIT."""
    return scores.double().clamp(-SCORE_LIMIT, SCORE_LIMIT)


def mass(distance: Tensor) -> Tensor:
    """2^MASS_BITS exp(-distance / 2^FRACTION_BITS) as an integer, from integers alone.

    distance: int64 in [0, 2^32). Products of two words wrap around in int64, which keeps their 64 bits.
    """
    power = distance * LOG2_E  # in units of 2^-57
    whole, fraction = (power >> 57) & 127, (power >> 25) & WORD
    drop = torch.full_like(fraction, EXP2_COEFFICIENTS[-1])
    for coefficient in reversed(EXP2_COEFFICIENTS[:-1]):
        drop = coefficient - ((drop * fraction >> 32) & WORD)
    drop = (drop * fraction >> 32) & WORD
    return ((1 << MASS_BITS) - (drop << (MASS_BITS - 32))) >> whole.clamp(max=63)


def share(total: Tensor, top_p: float) -> Tensor:
    """The least integer >= top_p total, at least 1, for top_p as `share_word` rounds it; total: int64 >= 0."""
    part = share_word(top_p)
    high, low = total >> TOP_P_BITS, total & (2**TOP_P_BITS - 1)
    return (high * part + (low * part + 2**TOP_P_BITS - 1 >> TOP_P_BITS)).clamp(min=1)


def share_word(top_p: float) -> int:
    """top_p < 1 in units of 2^-31, rounded down: of 10 equally likely tokens, 0.9 shall keep 9."""
    return int(top_p * 2**TOP_P_BITS)


def _last_distance(
    distance: Tensor, weights: Tensor, wanted: Tensor, tp_group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """(the least distance [R] within which the weights reach `wanted` [R], the weights [R] of what is closer).

    distance, weights [R, V/tp] int64 >= 0. FARTHEST where the weights never reach it.
    """
    last, closer = torch.zeros_like(wanted), torch.zeros_like(wanted)
    for shift in reversed(range(0, 32, DIGIT_BITS)):
        is_open = distance >> (shift + DIGIT_BITS) == (last >> (shift + DIGIT_BITS))[:, None]
        digits = (distance >> shift) & (2**DIGIT_BITS - 1)
        bins = weights.new_zeros(wanted.numel(), 2**DIGIT_BITS)
        bins = sum_shards(bins.scatter_add_(1, digits, torch.where(is_open, weights, 0)), tp_group)
        reached = closer[:, None] + bins.cumsum(dim=1)
        digit = (reached < wanted[:, None]).sum(dim=1, keepdim=True).clamp(max=2**DIGIT_BITS - 1)
        closer = (reached - bins).gather(1, digit)[:, 0]
        last = last + (digit[:, 0] << shift)
    return last, closer


def _prefix(distance: Tensor, last: Tensor, num_equals: Tensor, tp_group: ProcessGroup | None) -> Tensor:
    """[R, V/tp] bool: what is closer than `last` [R], and of what is as far the num_equals [R] of the lowest ids."""
    is_equal = distance == last[:, None]
    counts = gather_shards(is_equal.sum(dim=1), tp_group)  # [tp, R]
    lower_ranks = counts[: first_column(1, tp_group)].sum(dim=0)
    place = is_equal.cumsum(dim=1) + lower_ranks[:, None]
    return (distance < last[:, None]) | (is_equal & (place <= num_equals[:, None]))
