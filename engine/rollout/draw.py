"""The next token of each request, from the logits after its last one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ppomax.engine.config import SamplingConfig
from ppomax.engine.models.roles import Role
from ppomax.engine.rollout.batch import Batch
from ppomax.kernels.sampling import sample_with_margins


@dataclass(frozen=True)
class StopRule:
    """When a response ends before its limit. eos_id: ends it (and is kept); negative: none.

    sequences: token sequences, each of which ends a response that ends in it. min_new_tokens: neither counts before.
    """

    eos_id: int
    sequences: tuple[tuple[int, ...], ...] = ()
    min_new_tokens: int = 0

    def ends(self, token: int, before: list[int], num_prompt: int) -> bool:
        """Whether a response ends with this token; before: prompt, of num_prompt tokens, and the response so far."""
        num_new = len(before) - num_prompt + 1
        if num_new < self.min_new_tokens:
            return False
        if token == self.eos_id:
            return True
        return any(
            len(stop) <= num_new and (*before[len(before) + 1 - len(stop) :], token) == stop for stop in self.sequences
        )


def draw(
    role: Role,
    logits: Tensor,
    batch: Batch,
    requests: Tensor,
    positions: Tensor,
    sampling: SamplingConfig,
    stop: StopRule,
) -> Tensor:
    """[NUM_DRAWN, R] float64 for batch.put: requests, positions [R] of the tokens to draw, logits [R, V/tp] of them.

    Every rank of the role's tp group must call it and gets the same. Token ids are exact in float64.
    """
    vocab_size = role.shape.vocab_size
    seen = batch.seen(requests, positions, vocab_size) if sampling.repetition_penalty != 1 else None
    banned = None
    if stop.min_new_tokens > 0 and stop.eos_id >= 0:
        is_early = positions - batch.prompt_lengths[requests] + 1 < stop.min_new_tokens
        banned = torch.zeros(len(requests), vocab_size, dtype=torch.bool, device=logits.device)
        banned[:, stop.eos_id] = is_early
    result = sample_with_margins(
        logits,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        repetition_penalty=sampling.repetition_penalty,
        seen=seen,
        banned=banned,
        seeds=batch.seeds[requests],
        positions=positions,
        tp_group=role.groups.megatron.tp,
        vocab_size=vocab_size,
    )
    return torch.stack([x.double() for x in (result.tokens, result.logprobs, result.sampling_logprobs, result.margins)])
