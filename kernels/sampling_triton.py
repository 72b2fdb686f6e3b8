"""Sampling in Triton: the integers of sampling_reference.py, with the draw on integers too.

A row is split into chunks of CHUNK token ids, one program each, whatever the number of rows: results do not depend on
the batch. Scores and noise are added as int64 in units of 2^-26, so the argmax is exact and splits anywhere. Noise is
formed in float32 and within 2e-6 of the reference's.

Plain sampling is two kernels with one small all-gather between them. A filter first finds the largest score, then the
last kept distance, four bits at a time: a kernel that adds up 16 bins per chunk, and one that narrows the search.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.distributed import ProcessGroup

from ppomax.kernels import sampling_reference as reference
from ppomax.kernels.philox_triton import WORDS_PER_BLOCK, token_words
from ppomax.kernels.shards import first_column, gather_shards, group_size, sum_shards

CHUNK, BLOCK, NUM_WARPS = 8192, 512, 4
BINS, DIGIT_BITS, WORD_BITS = tl.constexpr(16), tl.constexpr(4), tl.constexpr(32)
FARTHEST = tl.constexpr(reference.FARTHEST)
SCORE_LIMIT = tl.constexpr(reference.SCORE_LIMIT)
UNITS, UNIT = tl.constexpr(2.0**reference.FRACTION_BITS), tl.constexpr(2.0**-reference.FRACTION_BITS)
LOG2_E = tl.constexpr(reference.LOG2_E)
WHOLE_MASS, MASS_SHIFT = tl.constexpr(1 << reference.MASS_BITS), tl.constexpr(reference.MASS_BITS - 32)
E0, E1, E2, E3, E4, E5 = (tl.constexpr(x) for x in reference.EXP2_COEFFICIENTS)
TOP_P_BITS, TOP_P_MASK = tl.constexpr(reference.TOP_P_BITS), tl.constexpr(2**reference.TOP_P_BITS - 1)

MARK_SEEN, MARK_BANNED = tl.constexpr(reference.SEEN), tl.constexpr(reference.BANNED)

BANNED = tl.constexpr(-(2**62))
"""Below every score with noise: a token that a row draws only if it has no other."""

NO_TOKEN = tl.constexpr(-(2**63) + 1)

RECORD, INTEGERS = tl.constexpr(6), tl.constexpr(3)
"""A chunk reports six int64 words: best, second, token; as float32 logit, score, max, sum, score max, score sum."""


@triton.jit
def _scores(X, MARKS, column, columns, first, vocab_size, temperature, penalty, HAS_MARKS: tl.constexpr):
    """(logits, scores) of these columns of a row as float32, -inf where there is no token; a NaN has the score -inf."""
    is_token = (column >= 0) & (column < columns) & (first + column < vocab_size)
    # Masked by the tensor's width, which divides well, and not by the vocabulary's: the loads stay wide.
    x = tl.load(X + column, mask=(column >= 0) & (column < columns), other=float("-inf")).to(tl.float32)
    x = tl.where(is_token, x, float("-inf"))
    score = x
    if HAS_MARKS:
        mark = tl.load(MARKS + first + column, mask=is_token, other=0).to(tl.int32)
        factor = tl.zeros_like(x) + penalty
        score = tl.where(mark & MARK_SEEN != 0, tl.where(x < 0, x * factor, tl.div_rn(x, factor)), x)
        score = tl.where(mark & MARK_BANNED != 0, float("-inf"), score)
    score = tl.div_rn(score, tl.zeros_like(score) + temperature)
    return x, tl.where(score == score, score, float("-inf")), is_token


@triton.jit
def _fixed_point(x):
    return (tl.minimum(tl.maximum(x, -SCORE_LIMIT), SCORE_LIMIT) * UNITS).to(tl.int64)


@triton.jit
def _distance(score, largest):
    return tl.minimum(_fixed_point(largest) - _fixed_point(score), FARTHEST)


@triton.jit
def _mass(distance):
    """See sampling_reference.mass."""
    power = distance.to(tl.uint32).to(tl.uint64) * LOG2_E
    whole, fraction = (power >> 57).to(tl.int64), (power >> 25).to(tl.uint32)
    zero = tl.zeros_like(fraction)
    drop = zero + E4 - tl.umulhi(fraction, zero + E5)
    drop = zero + E3 - tl.umulhi(fraction, drop)
    drop = zero + E2 - tl.umulhi(fraction, drop)
    drop = zero + E1 - tl.umulhi(fraction, drop)
    drop = zero + E0 - tl.umulhi(fraction, drop)
    drop = tl.umulhi(fraction, drop)
    return (tl.zeros_like(whole) + WHOLE_MASS - (drop.to(tl.int64) << MASS_SHIFT)) >> tl.minimum(whole, 63)


@triton.jit
def _share(total, part):
    """See sampling_reference.share; part: share_word(top_p)."""
    high, low = total >> TOP_P_BITS, total & TOP_P_MASK
    return tl.maximum(high * part + ((low * part + TOP_P_MASK) >> TOP_P_BITS), 1)


@triton.jit
def _gumbel(word):
    """-log(-log u) for u = (word + 1/2) / 2^32, within 2e-6: float32 has steps of 1.9e-6 where this ends, at 22.9.

    Near u = 1 it starts from 1 - u, which float32 holds to all its digits, with -log(1 - v) = 2 atanh(v / (2 - v)).
    """
    is_high = word >= 0x80000000
    v = (tl.where(is_high, 0xFFFFFFFF - word, word).to(tl.float32) + 0.5) * (1.0 / 4294967296.0)
    z = v / (2.0 - v)
    s = z * z
    series = 1 / 7 + s * (1 / 9 + s * (1 / 11 + s * (1 / 13 + s * (1 / 15))))
    series = 2.0 * z * (1.0 + s * (1 / 3 + s * (1 / 5 + s * series)))
    return -tl.log(tl.where(is_high, series, -tl.log(v)))


@triton.jit
def _sortable(x):
    """Integers in the order of the float32 x, 0 for both zeros."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _unsorted(key):
    """The float32 that _sortable was given, -inf for NO_TOKEN."""
    bits = tl.where(key == NO_TOKEN, -0x7F800001, key).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _largest_kernel(
    X,
    stride_x,
    MARKS,
    stride_marks,
    columns,
    first,
    skew,
    vocab_size,
    temperature,
    penalty,
    LARGEST,
    HAS_MARKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest score of every chunk, [R, chunks]."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    X += row * stride_x
    if HAS_MARKS:
        MARKS += row * stride_marks
    begin = chunk * CHUNK - skew
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(begin, tl.minimum(begin + CHUNK, columns), BLOCK):
        column = start + tl.arange(0, BLOCK)
        _, score, _ = _scores(X, MARKS, column, columns, first, vocab_size, temperature, penalty, HAS_MARKS)
        largest = tl.maximum(largest, score)
    tl.store(LARGEST + row * tl.num_programs(1) + chunk, tl.max(largest, axis=0))


@triton.jit(do_not_specialize=["shift"])
def _bins_kernel(
    X,
    stride_x,
    MARKS,
    stride_marks,
    columns,
    first,
    skew,
    vocab_size,
    temperature,
    penalty,
    LARGEST,
    SEARCH,
    KEPT,
    BIN_SUMS,
    shift,
    MASSES: tl.constexpr,
    LIMITED: tl.constexpr,
    HAS_MARKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts or masses of every chunk [R, chunks, BINS], by the digit at `shift` of distances that began like `last`.

    LIMITED: only of the tokens within the distance that KEPT has already.
    """
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    X += row * stride_x
    if HAS_MARKS:
        MARKS += row * stride_marks
    largest, last = tl.load(LARGEST + row), tl.load(SEARCH + row * 3)
    # What comes above the digit must agree; in the first pass nothing does, as distances have 32 bits.
    closest = (last >> (shift + DIGIT_BITS)) << (shift + DIGIT_BITS)
    farthest = closest + ((tl.zeros_like(last) + BINS) << shift) - 1
    if LIMITED:
        farthest = tl.minimum(farthest, tl.load(KEPT + row * 3))
    begin = chunk * CHUNK - skew
    bins = tl.arange(0, BINS)
    sums = tl.zeros((BINS,), tl.int64)
    for start in range(begin, tl.minimum(begin + CHUNK, columns), BLOCK):
        column = start + tl.arange(0, BLOCK)
        _, score, is_token = _scores(X, MARKS, column, columns, first, vocab_size, temperature, penalty, HAS_MARKS)
        distance = _distance(score, largest)
        is_open = is_token & (distance >= closest) & (distance <= farthest)
        if tl.max(is_open.to(tl.int32), axis=0) > 0:
            digit = tl.where(is_open, ((distance - closest) >> shift).to(tl.int32), -1)
            is_in = digit[:, None] == bins[None, :]
            if MASSES:
                sums += tl.sum(tl.where(is_in, _mass(distance)[:, None], 0), axis=0)
            else:
                sums += tl.sum(is_in.to(tl.int32), axis=0)
    tl.store(BIN_SUMS + (row * tl.num_programs(1) + chunk) * BINS + bins, sums)


@triton.jit(do_not_specialize=["shift", "wanted"])
def _narrow_kernel(
    BIN_SUMS,
    SEARCH,
    KEPT,
    chunks,
    shift,
    wanted,
    MASSES: tl.constexpr,
    LIMITED: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
):
    """One digit of the last kept distance of a row; after the last digit, what is kept.

    SEARCH [R, 3]: the distance so far, weight of what is closer, weight that is wanted. KEPT [R, 3]: the last kept
    distance, how many of the tokens at it, how many more there are. wanted: top_k, or share_word(top_p).
    """
    row = tl.program_id(0).to(tl.int64)
    chunk, bins = tl.arange(0, CHUNKS_BLOCK), tl.arange(0, BINS)
    offset = (row * chunks + chunk[:, None]) * BINS + bins[None, :]
    sums = tl.sum(tl.load(BIN_SUMS + offset, mask=(chunk < chunks)[:, None], other=0), axis=0)
    last, closer = tl.load(SEARCH + row * 3), tl.load(SEARCH + row * 3 + 1)
    target = tl.zeros_like(last) + wanted
    if MASSES:
        if shift + DIGIT_BITS == WORD_BITS:
            total = tl.sum(sums, axis=0)
            if LIMITED:
                total -= tl.load(KEPT + row * 3 + 2) * _mass(tl.load(KEPT + row * 3))
            target = _share(total, target)
            tl.store(SEARCH + row * 3 + 2, target)
        else:
            target = tl.load(SEARCH + row * 3 + 2)
    reached = closer + tl.cumsum(sums, axis=0)
    digit = tl.minimum(tl.sum((reached < target).to(tl.int64), axis=0), BINS - 1)
    num_here = tl.sum(tl.where(bins == digit, sums, 0), axis=0)
    closer = tl.sum(tl.where(bins == digit, reached - sums, 0), axis=0)
    last += digit << shift
    tl.store(SEARCH + row * 3, last)
    tl.store(SEARCH + row * 3 + 1, closer)
    if shift == 0:
        equals = target - closer
        if MASSES:
            each = tl.maximum(_mass(last), 1)
            equals = (equals + each - 1) // each
            if LIMITED:
                at_limit = last == tl.load(KEPT + row * 3)
                equals = tl.where(at_limit, tl.minimum(equals, tl.load(KEPT + row * 3 + 1)), equals)
        else:
            tl.store(KEPT + row * 3 + 2, tl.maximum(num_here - equals, 0))
        tl.store(KEPT + row * 3, last)
        tl.store(KEPT + row * 3 + 1, equals)


@triton.jit
def _draw_kernel(
    X,
    stride_x,
    MARKS,
    stride_marks,
    columns,
    first,
    skew,
    vocab_size,
    temperature,
    penalty,
    SEEDS,
    POSITIONS,
    LARGEST,
    KEPT,
    EQUALS,
    REPORT,
    REPORT_FLOATS,
    rank,
    GREEDY: tl.constexpr,
    FILTERED: tl.constexpr,
    HAS_MARKS: tl.constexpr,
    EQUALS_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The best token of a chunk and its statistics: a record of REPORT [R, chunks, RECORD].

    EQUALS [tp, R, chunks, BINS]: how many tokens of a chunk are at the last kept distance, in the bin of its digit.
    """
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    X += row * stride_x
    if HAS_MARKS:
        MARKS += row * stride_marks
    begin = chunk * CHUNK - skew
    end = tl.minimum(begin + CHUNK, columns)

    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    score_top = top
    for start in range(begin, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x, score, _ = _scores(X, MARKS, column, columns, first, vocab_size, temperature, penalty, HAS_MARKS)
        top = tl.maximum(top, tl.where(x == x, x, float("-inf")))
        score_top = tl.maximum(score_top, score)
    top, score_top = tl.max(top, axis=0), tl.max(score_top, axis=0)
    # A chunk of nothing but -inf adds up to 0, not to NaN.
    shift = tl.where(top == float("-inf"), 0.0, top)
    score_shift = tl.where(score_top == float("-inf"), 0.0, score_top)

    seed, position = tl.load(SEEDS + row), tl.load(POSITIONS + row)
    if FILTERED:
        largest, last = tl.load(LARGEST + row), tl.load(KEPT + row * 3)
        others = tl.arange(0, EQUALS_BLOCK)
        offset = ((others // chunks) * tl.num_programs(0) + row) * chunks + others % chunks
        equals = tl.load(EQUALS + offset * BINS + last % BINS, mask=others < rank * chunks + chunk, other=0)
        num_equals = tl.load(KEPT + row * 3 + 1) - tl.sum(equals, axis=0)
    total = tl.zeros((BLOCK,), tl.float32)
    score_total = tl.zeros((BLOCK,), tl.float32)
    best = tl.full((BLOCK,), NO_TOKEN, tl.int64)
    second = best
    token = tl.zeros((BLOCK,), tl.int32)
    for start in range(begin, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x, score, is_token = _scores(X, MARKS, column, columns, first, vocab_size, temperature, penalty, HAS_MARKS)
        total += tl.exp(x - shift)
        if GREEDY:
            value = tl.where(is_token, _sortable(score), NO_TOKEN)
        else:
            if FILTERED:
                distance = _distance(score, largest)
                is_equal = is_token & (distance == last)
                keep = is_token & (distance < last)
                if tl.max(is_equal.to(tl.int32), axis=0) > 0:
                    keep = keep | (is_equal & (tl.cumsum(is_equal.to(tl.int32), axis=0) <= num_equals))
                    num_equals -= tl.sum(is_equal.to(tl.int32), axis=0)
                has_kept = tl.max(keep.to(tl.int32), axis=0) > 0
            else:
                keep = is_token
                has_kept = True
            value = tl.where(is_token, BANNED, NO_TOKEN) + tl.zeros((BLOCK,), tl.int64)
            if has_kept:
                score_total += tl.where(keep, tl.exp(score - score_shift), 0.0)
                block = (first + start) // WORDS_PER_BLOCK
                noise = _gumbel(token_words(seed, position, block, BLOCK))
                value = tl.where(
                    keep & (score > float("-inf")), _fixed_point(score) + (noise * UNITS).to(tl.int64), value
                )
        is_better = value > best
        second = tl.where(is_better, best, tl.maximum(second, value))
        best = tl.where(is_better, value, best)
        token = tl.where(is_better, column, token)

    winner = tl.max(best, axis=0)
    column = tl.min(tl.where(best == winner, token, 0x7FFFFFFF), axis=0)
    rival = tl.max(tl.where((best == winner) & (token == column), second, best), axis=0)
    logit, score, _ = _scores(X, MARKS, column, columns, first, vocab_size, temperature, penalty, HAS_MARKS)
    record = (row * chunks + chunk) * RECORD
    tl.store(REPORT + record, winner)
    tl.store(REPORT + record + 1, rival)
    tl.store(REPORT + record + 2, (first + column).to(tl.int64))
    floats = REPORT_FLOATS + 2 * (record + INTEGERS)
    tl.store(floats, logit)
    tl.store(floats + 1, score)
    tl.store(floats + 2, top)
    tl.store(floats + 3, tl.sum(total, axis=0))
    tl.store(floats + 4, score_top)
    tl.store(floats + 5, tl.sum(score_total, axis=0))


@triton.jit
def _log_probability(value, top, total):
    """value - log(sum of total exp(top)); NaN where the maximum is infinite."""
    whole = tl.max(top, axis=0)
    return value - whole - tl.log(tl.sum(total * tl.exp(top - whole), axis=0))


@triton.jit
def _fold_kernel(
    REPORT,
    REPORT_FLOATS,
    TOKENS,
    LOGPROBS,
    MARGINS,
    SAMPLING_LOGPROBS,
    chunks,
    num_records,
    GREEDY: tl.constexpr,
    RECORDS_BLOCK: tl.constexpr,
):
    """The draw of a row from the records of its chunks on every rank, REPORT [tp, R, chunks, RECORD]."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, RECORDS_BLOCK)
    inside = i < num_records
    record = (((i // chunks) * tl.num_programs(0) + row) * chunks + i % chunks) * RECORD
    best = tl.load(REPORT + record, mask=inside, other=NO_TOKEN)
    second = tl.load(REPORT + record + 1, mask=inside, other=NO_TOKEN)
    token = tl.load(REPORT + record + 2, mask=inside, other=0)
    floats = REPORT_FLOATS + 2 * (record + INTEGERS)
    logit, score = tl.load(floats, mask=inside, other=0.0), tl.load(floats + 1, mask=inside, other=0.0)
    top, total = tl.load(floats + 2, mask=inside, other=float("-inf")), tl.load(floats + 3, mask=inside, other=0.0)
    winner = tl.max(best, axis=0)
    # Records are in the order of their ids: of equals the first has the lowest.
    is_winner = i == tl.min(tl.where(best == winner, i, RECORDS_BLOCK), axis=0)
    rival = tl.max(tl.where(is_winner, second, best), axis=0)
    logprob = _log_probability(tl.sum(tl.where(is_winner, logit, 0.0), axis=0), top, total)
    sampling_logprob = tl.zeros_like(logprob)
    if GREEDY:
        margin = _unsorted(winner) - _unsorted(rival)
    else:
        margin = tl.where(rival > BANNED, (winner - rival).to(tl.float32) * UNIT, float("inf"))
        score_top = tl.load(floats + 4, mask=inside, other=float("-inf"))
        score_total = tl.load(floats + 5, mask=inside, other=0.0)
        drawn = tl.sum(tl.where(is_winner, score, 0.0), axis=0)
        sampling_logprob = _log_probability(drawn, score_top, score_total)
    tl.store(TOKENS + row, tl.sum(tl.where(is_winner, token, 0), axis=0))
    tl.store(LOGPROBS + row, logprob)
    tl.store(MARGINS + row, margin)
    tl.store(SAMPLING_LOGPROBS + row, tl.where(logprob == logprob, sampling_logprob, float("nan")))


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
    """See sampling_reference.sample; the entries of a row of logits, and of marks, are neighbours in memory."""
    R, columns = logits.shape
    tokens = torch.empty(R, dtype=torch.int64, device=logits.device)
    logprobs, margins, sampling_logprobs = (torch.empty(R, device=logits.device) for _ in range(3))
    if R == 0:
        return tokens, logprobs, margins, sampling_logprobs
    first = first_column(columns, tp_group)
    skew = first % WORDS_PER_BLOCK.value  # blocks of noise begin at multiples of four ids, this rank's columns anywhere
    chunks = triton.cdiv(columns + WORDS_PER_BLOCK.value - 1, CHUNK)
    greedy = temperature == 0
    given = _Scores(
        (
            logits,
            logits.stride(0),
            marks,
            0 if marks is None else marks.stride(0),
            columns,
            first,
            skew,
            vocab_size,
            1.0 if greedy else temperature,
            repetition_penalty,
        ),
        (R, chunks),
        {"HAS_MARKS": marks is not None, "CHUNK": CHUNK, "BLOCK": BLOCK, "num_warps": NUM_WARPS},
    )
    largest = kept = equals = None
    filtered = not greedy and (top_k > 0 or top_p < 1)
    if filtered:
        largest, kept, equals = _kept(given, top_k, top_p, tp_group)
    tp = group_size(tp_group)
    report = torch.empty((R, chunks, RECORD.value), dtype=torch.int64, device=logits.device)
    _draw_kernel[given.grid](
        *given.arguments,
        seeds,
        positions,
        largest,
        kept,
        equals,
        report,
        report.view(torch.float32),
        first_column(1, tp_group),
        GREEDY=greedy,
        FILTERED=filtered,
        EQUALS_BLOCK=triton.next_power_of_2(tp * chunks),
        **given.options,
    )
    report = gather_shards(report, tp_group)
    _fold_kernel[(R,)](
        report,
        report.view(torch.float32),
        tokens,
        logprobs,
        margins,
        sampling_logprobs,
        chunks,
        tp * chunks,
        GREEDY=greedy,
        RECORDS_BLOCK=triton.next_power_of_2(tp * chunks),
        num_warps=1,
    )
    return tokens, logprobs, margins, sampling_logprobs


class _Scores(NamedTuple):
    """What every kernel over the logits is given: its first arguments, grid and options."""

    arguments: tuple[Any, ...]
    grid: tuple[int, int]
    options: dict[str, Any]


def _kept(given: _Scores, top_k: int, top_p: float, tp_group: ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """(largest score [R], KEPT [R, 3], EQUALS [tp, R, chunks, BINS]) as _draw_kernel takes them."""
    R, device = given.grid[0], given.arguments[0].device
    chunks_largest = torch.empty(given.grid, device=device)
    _largest_kernel[given.grid](*given.arguments, chunks_largest, **given.options)
    largest = gather_shards(chunks_largest.amax(dim=1), tp_group).amax(dim=0)
    kept = torch.empty((R, 3), dtype=torch.int64, device=device)
    search = torch.zeros((R, 3), dtype=torch.int64, device=device)
    if top_k > 0:
        _search(given, largest, search, kept, top_k, tp_group, masses=False, limited=False)
    if top_p < 1:
        search.zero_()
        part = reference.share_word(top_p)
        _search(given, largest, search, kept, part, tp_group, masses=True, limited=top_k > 0)
    equals = _bin_sums(given, largest, search, kept, 0, masses=False, limited=False)
    return largest, kept, gather_shards(equals, tp_group)


def _search(
    given: _Scores,
    largest: Tensor,
    search: Tensor,
    kept: Tensor,
    wanted: int,
    tp_group: ProcessGroup | None,
    *,
    masses: bool,
    limited: bool,
) -> None:
    """Finds the last kept distance of every row, a digit at a time, and writes it into search and kept."""
    R, chunks = given.grid
    block = triton.next_power_of_2(chunks)
    for shift in reversed(range(0, WORD_BITS.value, DIGIT_BITS.value)):
        sums = _bin_sums(given, largest, search, kept, shift, masses=masses, limited=limited)
        _narrow_kernel[(R,)](
            sum_shards(sums, tp_group),
            search,
            kept,
            chunks,
            shift,
            wanted,
            MASSES=masses,
            LIMITED=limited,
            CHUNKS_BLOCK=block,
            num_warps=1,
        )


def _bin_sums(
    given: _Scores, largest: Tensor, search: Tensor, kept: Tensor, shift: int, *, masses: bool, limited: bool
) -> Tensor:
    """[R, chunks, BINS] int64 of this rank's columns."""
    sums = torch.empty((*given.grid, BINS.value), dtype=torch.int64, device=largest.device)
    _bins_kernel[given.grid](
        *given.arguments, largest, search, kept, sums, shift, MASSES=masses, LIMITED=limited, **given.options
    )
    return sums
