"""Draws the next token of every request; seed and position fix the draw, whatever the batch and group size."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ppomax.kernels.dispatch import implementation
from ppomax.kernels.shards import gather_shards


class Draw(NamedTuple):
    """tokens [R] int64; logprobs [R] float32, nats; margins [R] float32 (see `sample_with_margins`)."""

    tokens: Tensor
    logprobs: Tensor
    margins: Tensor


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
    tp_group: ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> Draw:
    """One token per request: repetition penalty, temperature, top-k, top-p, then a draw by the Gumbel-max rule.

    logits [R, V/tp] float: this rank's contiguous block of the vocabulary, in rank order of tp_group.
    temperature: logits are divided by it; 0 takes the largest (after the penalty; the lowest id among equals).
    top_p in (0, 1]: keep the tokens for which the likelier ones have less than this probability together; 1 keeps all.
    top_k: keep the k likeliest tokens, lower ids first among equals; 0 keeps all.
    repetition_penalty: logits of seen tokens are multiplied by it where negative, else divided by it; 1 leaves them.
    seen [R, vocab] bool: tokens to penalise, over the whole vocabulary; None: none.
    seeds, positions [R] int64: key of the noise, with the token id; a request keeps its seed and counts its positions.
    vocab_size: ids >= vocab_size are padding and never drawn. Unset: there are none.
    Returns tokens [R] int64; logprobs [R] float32, nats, of the unmodified T = 1 distribution; margins [R] float32, by
    how much the winning score beats the next (infinite if there is none): a draw with a small margin may come out
    differently from logits computed in another order.
    Every rank of tp_group must call it and gets the same result.
    Raises ValueError on settings out of range and shapes that do not fit.
    Source: the order of the steps and the penalty are the released code's.
    """
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or repetition_penalty <= 0:
        raise ValueError(
            f"sample: temperature {temperature} must be >= 0, top_p {top_p} in (0, 1], top_k {top_k} >= 0 "
            f"and repetition_penalty {repetition_penalty} > 0"
        )
    if logits.dim() != 2 or seeds.shape != logits.shape[:1] or positions.shape != logits.shape[:1]:
        raise ValueError(
            f"sample: logits {tuple(logits.shape)}, seeds {tuple(seeds.shape)}, positions {tuple(positions.shape)}; "
            "expected [R, V/tp], [R], [R]"
        )
    compute = implementation("sampling", logits, seeds, positions, seen)
    whole = gather_shards(logits, tp_group).transpose(0, 1).flatten(1)[:, :vocab_size]  # [R, vocab]
    if seen is not None and (seen.shape[0] != whole.shape[0] or seen.shape[1] < whole.shape[1]):
        raise ValueError(
            f"sample: seen {tuple(seen.shape)} must cover {tuple(whole.shape)}, all requests and token ids"
        )
    return Draw(
        *compute.sample(
            whole,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            seen=seen,
            seeds=seeds,
            positions=positions,
        )
    )
