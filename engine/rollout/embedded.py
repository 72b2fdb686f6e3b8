"""The embedded generator (generate.py) behind the protocol: it samples from the role's own weights, without a copy."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ppomax.engine.config import SamplingConfig
from ppomax.engine.models.roles import Role
from ppomax.engine.parallel.stages import max_over_role
from ppomax.engine.ppo.types import Rollout
from ppomax.engine.rollout.backend import Completion, FinishReason, RolloutRequest, finished_early
from ppomax.engine.rollout.generate import affordable_pages, cache_fault, generate
from ppomax.engine.rollout.watch import Aborts


class EmbeddedBackend:
    """A RolloutBackend. It has no memory of its own between two calls of generate, so sleep and wake do nothing.

    eos_id: ends a response; negative: nothing does. max_length: tokens of prompt and response, where the model's
    context is not to be used to its end.
    """

    def __init__(self, role: Role, *, eos_id: int, max_length: int | None = None) -> None:
        self._role, self._eos_id = role, eos_id
        context = role.shape.max_position_embeddings
        self._context = min(context, max_length or context)
        self._version = 0
        self._aborted: set[int] = set()

    def setup(self) -> None: ...

    def load(self, named_tensors: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Notes the version. The tensors are those of the role, so they are not read, on no rank."""
        self._version = version

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Completion]:
        """Requests run together with those of the same sampling settings and stop sequences."""
        aborted = self._known_aborts(requests)
        results: dict[int, Completion] = {}
        alike: dict[tuple[SamplingConfig, tuple[tuple[int, ...], ...]], list[int]] = {}
        for b, request in enumerate(requests):
            early = finished_early(
                request,
                aborted=aborted,
                vocab_size=self._role.shape.vocab_size,
                context=self._context,
                version=self._version,
            )
            if early is not None:
                results[b] = early
            else:
                alike.setdefault((request.sampling, request.stop_sequences), []).append(b)
        for (sampling, stop_sequences), members in alike.items():
            affordable = affordable_pages(self._role, sampling)
            for b in tuple(members):
                length = min(self._context, len(requests[b].prompt) + requests[b].max_new_tokens)
                fault = cache_fault(length, affordable, self._role, sampling)
                if fault is not None:
                    message = f"request {requests[b].id}: {fault}"
                    results[b] = Completion((), (), "error", self._version, message)
                    members.remove(b)
            if not members:
                continue
            rollout = generate(
                self._role,
                [requests[b].prompt for b in members],
                sampling,
                seeds=torch.tensor([requests[b].seed for b in members]),
                eos_id=self._eos_id,
                pad_id=0,
                max_length=self._context,
                limits=[requests[b].max_new_tokens for b in members],
                stop_sequences=stop_sequences,
                watch=partial(
                    Aborts, partial(self._aborted_rows, {requests[b].id: row for row, b in enumerate(members)})
                ),
            )
            results |= zip(members, self._completions([requests[b] for b in members], rollout), strict=True)
        self._aborted.clear()
        return [results[b] for b in range(len(requests))]

    def abort(self, ids: Collection[int]) -> None:
        """Requests of a running generate end with what they have, after at most the step under way and three more.

        It is enough that one rank of a replica, and before a generate one rank at all, calls it.
        """
        self._aborted.update(ids)

    def sleep(self, level: int) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...

    def _aborted_rows(self, rows: Mapping[int, int]) -> list[int]:
        """rows: id -> row."""
        # A copy: another thread may add to the set while it is read.
        return [rows[request] for request in tuple(self._aborted) if request in rows]

    def _known_aborts(self, requests: Sequence[RolloutRequest]) -> set[int]:
        """Ids aborted before this generate on any rank: all must leave out the same requests."""
        groups = self._role.groups
        flags = torch.tensor([int(request.id in self._aborted) for request in requests], device=self._role.device)
        if groups.layout.num_ranks > 1 and len(requests):
            max_over_role(flags, groups)
        return {request.id for request, is_aborted in zip(requests, flags.tolist(), strict=True) if is_aborted}

    def _completions(self, requests: Sequence[RolloutRequest], rollout: Rollout) -> list[Completion]:
        completions = []
        rows = (rollout.tokens, rollout.sampling_logprobs, rollout.prompt_lengths, rollout.lengths, rollout.finished)
        columns = zip(requests, *(x.tolist() for x in rows), strict=True)
        for request, tokens, logprobs, start, end, finished in columns:
            response = tuple(tokens[start:end])
            reason: FinishReason = "length"
            if not finished and len(response) < min(request.max_new_tokens, self._context - start):
                reason = "abort"
            if finished:
                reason = "eos" if response[-1] == self._eos_id else "stop"
            completions.append(Completion(response, tuple(logprobs[start - 1 : end - 1]), reason, self._version))
        return completions
