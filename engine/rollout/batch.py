"""The requests of one call of the generator, the tokens drawn for them, and the rollout that is made of both."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppomax.engine.ppo.types import Rollout, response_mask

NUM_DRAWN = 4
"""Numbers that are kept of each drawn token: itself, its two logprobs and its margin."""


@dataclass(frozen=True)
class Begun:
    """The part of a response that is there already: tokens, and the log-prob of each (T = 1, nats) under the weights
    that drew it. finished: EOS or a stop sequence has ended it.
    """

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finished: bool = False


class Batch:
    """B requests: prompts, then the tokens drawn for them on this replica; those of other replicas stay as they began.

    prompts, known, max_lengths: known to the host; known: prompts with what has begun of their responses; max_lengths
    in tokens of prompt and response. seeds [B] int64.
    tokens [B, S] int64: prompt and response. logprobs, drawn_logprobs, margins [B, S] float32, at the place of each
    drawn token: of the unmodified T = 1 distribution, of the distribution drawn from, by how much the token won.
    lengths: tokens of prompt and response; finished: 1 where EOS or a stop sequence ended it, else 0. Both are of the
    host, [B], and follow the tokens as the host reads them.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        max_lengths: Sequence[int],
        seeds: Tensor,
        device: torch.device,
        begun: Sequence[Begun] | None = None,
    ) -> None:
        self.prompts, self.max_lengths = prompts, max_lengths
        begun = begun or [Begun()] * len(prompts)
        self.known = [(*prompt, *start.tokens) for prompt, start in zip(prompts, begun, strict=True)]
        self.prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.seeds = seeds.to(device).contiguous()
        sizes = (len(prompts), max(max_lengths))
        tokens = torch.zeros(sizes, dtype=torch.int64)
        logprobs, margins = torch.zeros(2, *sizes)
        for b, (prompt, known) in enumerate(zip(prompts, self.known, strict=True)):
            tokens[b, : len(known)] = torch.tensor(known)
            logprobs[b, len(prompt) : len(known)] = torch.tensor(begun[b].logprobs)
            margins[b, len(prompt) : len(known)] = torch.inf
        self.tokens, self.logprobs, self.margins = tokens.to(device), logprobs.to(device), margins.to(device)
        self.drawn_logprobs = torch.zeros_like(self.logprobs)
        self.lengths = [len(known) for known in self.known]
        self.finished = [int(start.finished) for start in begun]

    def put(self, requests: Tensor, positions: Tensor, drawn: Tensor) -> None:
        """Writes one token of each of R requests; drawn [NUM_DRAWN, R]: token, logprob, drawn_logprob, margin."""
        self.tokens[requests, positions] = drawn[0].long()
        for target, values in zip((self.logprobs, self.drawn_logprobs, self.margins), drawn[1:], strict=True):
            target[requests, positions] = values.float()

    def seen(self, requests: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
        """Which tokens each of R requests has drawn before its position: [R, vocab] bool."""
        column = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        is_drawn = (column >= self.prompt_lengths[requests, None]) & (column < positions[:, None])
        ids = torch.where(is_drawn, self.tokens[requests], vocab_size)
        seen = torch.zeros(len(requests), vocab_size + 1, dtype=torch.bool, device=ids.device)
        return seen.scatter_(1, ids, True)[:, :vocab_size]

    def rollout(self, pad_id: int) -> Rollout:
        """Prompts and responses, right padded to the longest; every request must have ended."""
        device = self.tokens.device
        return make_rollout(
            self.tokens,
            self.prompt_lengths,
            torch.tensor(self.lengths, device=device),
            torch.tensor(self.finished, device=device),
            self.logprobs,
            self.margins,
            pad_id=pad_id,
        )


def make_rollout(
    tokens: Tensor,
    prompt_lengths: Tensor,
    lengths: Tensor,
    finished: Tensor,
    logprobs: Tensor,
    margins: Tensor,
    *,
    pad_id: int,
) -> Rollout:
    """Rows of a batch [n, S] with their lengths [n] as a rollout, as wide as the longest of them."""
    width = int(lengths.max())
    column = torch.arange(width, device=tokens.device)
    mask = response_mask(prompt_lengths, lengths, width - 1)
    return Rollout(
        tokens=torch.where(column < lengths[:, None], tokens[:, :width], pad_id),
        prompt_lengths=prompt_lengths,
        lengths=lengths,
        response_mask=mask,
        finished=finished.bool(),
        sampling_logprobs=torch.where(mask, logprobs[:, 1:width], 0.0),
        margins=torch.where(mask, margins[:, 1:width], 0.0),
    )
