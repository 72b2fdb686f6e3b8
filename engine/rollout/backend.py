"""What samples responses, whatever engine is behind it: the protocol, its requests and completions.

`embedded.py` samples from the weights that are being trained, `vllm_backend.py` from a copy of them in vLLM.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from ppomax.engine.config import SamplingConfig
from ppomax.engine.errors import DataError
from ppomax.engine.ppo.types import Rollout, response_mask

FinishReason = Literal["eos", "stop", "length", "abort", "error"]


@dataclass(frozen=True)
class RolloutRequest:
    """One response to one prompt.

    id: names the request among those of a call. prompt: token ids. seed: fixes the noise, 0 <= seed < 2^63.
    max_new_tokens: longest response, tokens; it stands in for sampling.max_new_tokens.
    stop_sequences: token ids; a response ends with the first of them that it contains, which is kept.
    """

    id: int
    prompt: tuple[int, ...]
    sampling: SamplingConfig
    seed: int
    max_new_tokens: int
    stop_sequences: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Completion:
    """tokens: the response, with the EOS or stop sequence that ended it.

    logprobs: of each token under the unmodified T = 1 distribution, nats. weight_version: that of `load`.
    finish_reason: "length" where max_new_tokens or the context ended it; "abort" and "error" may come without tokens.
    message: what is wrong with the request of an "error".
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    weight_version: int
    message: str = ""


class RolloutBackend(Protocol):
    """An engine in the trainer's processes. Every rank of the policy must call each method, with the same arguments.

    setup, then for every rollout: wake, load, generate, sleep; at the end close.
    """

    def setup(self) -> None:
        """Starts the engine; nothing happens where it runs already."""

    def load(self, named_tensors: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Takes over weights: (Hugging Face name, tensor), one at a time, as `export_weights(everywhere=True)` gives
        them to every rank.
        """

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Completion]:
        """The completions of all requests of the global batch, in their order, on every rank.

        A request that cannot run becomes a completion with finish_reason "error"; the others go on.
        """

    def abort(self, ids: Collection[int]) -> None:
        """These requests of the next generate end as "abort". Those of a running one do too where the engine can still
        end them, with what they have: called from a signal handler or another thread, at the same step on every rank.
        """

    def sleep(self, level: int) -> None:
        """Gives memory back: 1 keeps the weights on the host, 2 drops them (load must come before generate)."""

    def wake(self) -> None:
        """Takes the memory of `sleep` again."""

    def close(self) -> None:
        """Ends the engine."""


def request_fault(request: RolloutRequest, *, vocab_size: int, context: int) -> str | None:
    """What is wrong with a request for a model of this vocabulary and context (tokens), or None."""
    if not request.prompt:
        return "the prompt is empty; a response needs at least one token to start from"
    if len(request.prompt) >= context:
        return (
            f"the prompt has {len(request.prompt)} tokens, which leaves no room for a response in a context of "
            f"{context}; shorten it, or raise data.max_length (up to the model's max_position_embeddings)"
        )
    bad = next((token for token in request.prompt if not 0 <= token < vocab_size), None)
    if bad is not None:
        return f"token id {bad} is outside the vocabulary of {vocab_size} tokens; check model.tokenizer"
    if request.max_new_tokens < 0:
        return f"max_new_tokens is {request.max_new_tokens}; set it to 0 or more"
    if not 0 <= request.seed < 2**63:
        return f"the seed is {request.seed}; set it to 0 or more, below 2^63"
    return None


def finished_early(
    request: RolloutRequest, *, aborted: Collection[int], vocab_size: int, context: int, version: int
) -> Completion | None:
    """The completion of a request that need not or cannot run, None for the others."""
    fault = request_fault(request, vocab_size=vocab_size, context=context)
    if fault is not None:
        return Completion((), (), "error", version, f"request {request.id}: {fault}")
    if request.id in aborted:
        return Completion((), (), "abort", version)
    if request.max_new_tokens == 0:
        return Completion((), (), "length", version)
    return None


def as_rollout(
    requests: Sequence[RolloutRequest], completions: Sequence[Completion], *, pad_id: int, device: torch.device
) -> Rollout:
    """The completions as a rollout without margins. Raises DataError where one is an error."""
    faults = [completion.message for completion in completions if completion.finish_reason == "error"]
    if faults:
        raise DataError(f"{len(faults)} of {len(requests)} prompts cannot be responded to: {faults[0]}")
    rows = [(*request.prompt, *c.tokens) for request, c in zip(requests, completions, strict=True)]
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    logprobs = torch.zeros(len(rows), width - 1)
    prompt_lengths = torch.tensor([len(request.prompt) for request in requests])
    for b, (row, completion) in enumerate(zip(rows, completions, strict=True)):
        tokens[b, : len(row)] = torch.tensor(row)
        start = len(requests[b].prompt) - 1
        logprobs[b, start : start + len(completion.logprobs)] = torch.tensor(completion.logprobs)
    lengths = torch.tensor([len(row) for row in rows])
    finished = torch.tensor([completion.finish_reason in ("eos", "stop") for completion in completions])
    return Rollout(
        tokens=tokens.to(device),
        prompt_lengths=prompt_lengths.to(device),
        lengths=lengths.to(device),
        response_mask=response_mask(prompt_lengths, lengths, width - 1).to(device),
        finished=finished.to(device),
        sampling_logprobs=logprobs.to(device),
    )
