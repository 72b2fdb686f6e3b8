"""Draws the next token of every request; seed and position fix the draw, whatever the batch and group size.

Logits are never gathered: every rank works on its own block of the vocabulary, and what crosses the group is one record
per request and chunk of it, with top-k or top-p also the bins of the search for the last kept token.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.library import custom_op

from ppomax.kernels import sampling_c
from ppomax.kernels.dispatch import implementation, use_c
from ppomax.kernels.numerics import rows_of
from ppomax.kernels.sampling_reference import BANNED, SEEN
from ppomax.kernels.shards import group_name, group_of, group_size

MIN_TEMPERATURE = 1e-4
"""Below it the draw is the largest logit for every purpose, and scores would exceed what they are computed in."""


class Draw(NamedTuple):
    """What was drawn for R requests; see `sample_with_margins`."""

    tokens: Tensor
    logprobs: Tensor
    margins: Tensor
    sampling_logprobs: Tensor


def sample(
    logits: Tensor,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    repetition_penalty: float,
    seen: Tensor | None,
    seeds: Tensor,
    positions: Tensor | None = None,
    tp_group: ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(tokens [R], logprobs [R]) of `sample_with_margins`; positions unset: 0, the seed alone fixes the noise."""
    draw = sample_with_margins(
        logits,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seen=seen,
        seeds=seeds,
        positions=torch.zeros_like(seeds) if positions is None else positions,
        tp_group=tp_group,
        vocab_size=vocab_size,
    )
    return draw.tokens, draw.logprobs


def sample_with_margins(
    logits: Tensor,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    repetition_penalty: float,
    seen: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
    banned: Tensor | None = None,
    tp_group: ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> Draw:
    """One token per request: repetition penalty, temperature, top-k, top-p, then a draw by the Gumbel-max rule.

    logits [R, V/tp] float: this rank's contiguous block of the vocabulary, in rank order of tp_group; what follows is
    computed in float32 whatever their type.
    temperature: logits are divided by it, which must leave them below 2^35; at least MIN_TEMPERATURE, or 0, which takes
    the largest (after the penalty; the lowest id among equals).
    top_p in (0, 1]: keep the tokens for which the likelier ones have less than this probability together; 1 keeps all.
    top_k: keep the k likeliest tokens, lower ids first among equals; 0 keeps all.
    repetition_penalty: logits of seen tokens are multiplied by it where negative, else divided by it; 1 leaves them.
    seen [R, vocab] bool: tokens to penalise, over the whole vocabulary; None: none.
    banned [R, vocab] bool: tokens that are not drawn; they count in the T = 1 distribution all the same. None: none.
    seeds, positions [R] int64: key of the noise, with the token id; a request keeps its seed and counts its positions.
    vocab_size: ids >= vocab_size are padding and never drawn. Unset: there are none.
    Returns tokens [R] int64; logprobs [R] float32, nats, of the unmodified T = 1 distribution; margins [R] float32, by
    how much the winning score beats the next (infinite if there is none): a draw with a small margin may come out
    differently from logits computed in another order, or on another device (below 1e-5); sampling_logprobs [R]
    float32, nats, of the distribution that was drawn from, filtered and renormalised: 0 at temperature 0.
    Logits of -inf or NaN are never drawn unless a row has no others, which gives its lowest id. A row with a NaN or
    +inf, or with nothing but -inf, has NaN for both logprobs; its margin means nothing.
    The filters resolve scores to 1.5e-8, probabilities to 2^-42 of the largest and top_p to 2^-31.
    Every rank of tp_group must call it and gets the same result.
    Raises ValueError on settings out of range and shapes that do not fit.
    Source: the order of the steps and the penalty are the released code's.
    """
    is_hot = temperature == 0 or temperature >= MIN_TEMPERATURE
    if not is_hot or not 0 < top_p <= 1 or top_k < 0 or not repetition_penalty > 0:
        raise ValueError(
            f"sample: temperature {temperature} must be 0 or at least {MIN_TEMPERATURE}, top_p {top_p} in (0, 1], "
            f"top_k {top_k} >= 0 and repetition_penalty {repetition_penalty} > 0"
        )
    keys = {"seeds": seeds, "positions": positions}
    if logits.dim() != 2 or any(x.shape != logits.shape[:1] or x.dtype != torch.int64 for x in keys.values()):
        given = {name: (tuple(x.shape), x.dtype) for name, x in keys.items()}
        raise ValueError(f"sample: logits {tuple(logits.shape)}, {given}; expected [R, V/tp], and [R] int64 for both")
    columns = logits.shape[1] * group_size(tp_group)
    num_tokens = columns if vocab_size is None else min(vocab_size, columns)
    if num_tokens < 1:
        raise ValueError(f"sample: {num_tokens} tokens to draw from; the vocabulary needs at least one")
    for name, flags in (("seen", seen), ("banned", banned)):
        if flags is not None and (flags.dim() != 2 or flags.shape[0] != logits.shape[0] or flags.shape[1] < num_tokens):
            raise ValueError(
                f"sample: {name} {tuple(flags.shape)} must cover {(logits.shape[0], num_tokens)}, "
                "all requests and token ids"
            )
    # The operator around it costs as much as a small draw.
    sample = _sample if torch.compiler.is_compiling() else _draw
    return Draw(
        *sample(
            rows_of(logits.detach()),
            _marks(None if repetition_penalty == 1 else seen, banned, num_tokens),
            seeds.contiguous(),
            positions.contiguous(),
            temperature,
            top_p,
            top_k,
            repetition_penalty,
            num_tokens,
            group_name(tp_group),
        )
    )


def _marks(seen: Tensor | None, banned: Tensor | None, num_tokens: int) -> Tensor | None:
    """[R, vocab] uint8: SEEN of a token that is penalised plus BANNED of one that is not drawn; None where none is."""
    if banned is None:
        return None if seen is None else rows_of(seen).view(torch.uint8)
    marks = banned[:, :num_tokens].to(torch.uint8) * BANNED
    return marks if seen is None else marks + seen[:, :num_tokens].to(torch.uint8) * SEEN


def _draw(
    logits: Tensor,
    marks: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
    temperature: float,
    top_p: float,
    top_k: int,
    repetition_penalty: float,
    vocab_size: int,
    tp_group: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    version = sampling_c if use_c(seeds, marks) else implementation("sampling", logits, seeds, marks)
    return version.sample(
        logits,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        marks=marks,
        seeds=seeds,
        positions=positions,
        vocab_size=vocab_size,
        tp_group=group_of(tp_group),
    )


_sample = custom_op("ppomax::sample", _draw, mutates_args=())


@_sample.register_fake
def _(
    logits: Tensor,
    marks: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
    temperature: float,
    top_p: float,
    top_k: int,
    repetition_penalty: float,
    vocab_size: int,
    tp_group: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logprobs, margins, sampling_logprobs = (seeds.new_empty(seeds.shape, dtype=torch.float32) for _ in range(3))
    return torch.empty_like(seeds), logprobs, margins, sampling_logprobs
