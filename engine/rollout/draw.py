"""The next token of each request, from the hidden state of its last one."""

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

    def ends(self, response: list[int]) -> bool:
        """Whether the response, of at least one token, ends with its last one."""
        if len(response) < self.min_new_tokens:
            return False
        return response[-1] == self.eos_id or any(tuple(response[-len(stop) :]) == stop for stop in self.sequences)


def draw(
    role: Role,
    hidden: Tensor,
    batch: Batch,
    requests: Tensor,
    positions: Tensor,
    sampling: SamplingConfig,
    stop: StopRule,
) -> Tensor:
    """[NUM_DRAWN, R] float64 for batch.put: requests, positions [R] of the tokens to draw, hidden [R, H] before them.

    Every rank of the role's tp group must call it and gets the same. Token ids are exact in float64.
    """
    vocab_size = role.shape.vocab_size
    seen = batch.seen(requests, positions, vocab_size) if sampling.repetition_penalty != 1 else None
    banned = None
    if stop.min_new_tokens > 0 and stop.eos_id >= 0:
        is_early = positions - batch.prompt_lengths[requests] + 1 < stop.min_new_tokens
        banned = torch.zeros(len(requests), vocab_size, dtype=torch.bool, device=hidden.device)
        banned[:, stop.eos_id] = is_early
    result = sample_with_margins(
        logits(hidden, role.stage.vocabulary_weight()),
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


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [R, H] times the vocabulary head [V/tp, H] in float32: bfloat16 logits would be off by up to 0.4 %."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.float().T
