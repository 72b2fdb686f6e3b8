"""Forward passes of the four roles over a rollout: log-probs, values, scores.

Results are whole on every rank of the role. On other ranks they are 0 at once, without any waiting: roles on ranks of
their own work at the same time, and `make_experience` brings their results together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppomax.engine.data.batches import Pack, Rows, end_rows, last_token_rows, response_rows, unpad
from ppomax.engine.models.heads import head_logprobs
from ppomax.engine.models.roles import Role, role_packs
from ppomax.engine.parallel.pipeline import run_forward
from ppomax.engine.parallel.side_by_side import can_share_threads
from ppomax.engine.ppo.types import Rewards, Rollout, take_rows
from ppomax.engine.rewards.mixture import RewardMix
from ppomax.engine.trace import Trace, span
from ppomax.kernels.linear_full_kl import linear_full_kl


def token_logprobs(role: Role, rollout: Rollout, *, tokens_per_microbatch: int) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy) [B, T] float32, nats, of the response tokens under a model with a vocabulary head; 0
    elsewhere.
    """
    shape = rollout.response_mask.shape
    if not role.is_here:
        return torch.zeros(shape, device=role.device), torch.zeros(shape, device=role.device)
    sequences, rows = _response_sequences(rollout)
    packs = _packs(role, sequences, rows, tokens_per_microbatch)

    def compute(hidden: Tensor, pack: Pack) -> Tensor:
        return torch.stack(head_logprobs(role, hidden, pack.labels), dim=-1)

    with role.memory.resident("weights"):
        outputs = run_forward(role.modules, role.groups, packs, compute, rollout.response_mask.numel(), width=2)
    # Copies side by side in memory, as on ranks that get them from here: sums over both round in the same order.
    logprobs, entropy = outputs.T.reshape(2, *shape)
    return logprobs, entropy


def token_values(role: Role, rollout: Rollout, *, tokens_per_microbatch: int) -> Tensor:
    """[B, T] float32: the critic's value of the state before each response token; 0 elsewhere."""
    if not role.is_here:
        return torch.zeros(rollout.response_mask.shape, device=role.device)
    sequences, rows = _response_sequences(rollout)
    packs = _packs(role, sequences, rows, tokens_per_microbatch)
    num_outputs = rollout.response_mask.numel()
    with role.memory.resident("weights"):
        values = run_forward(
            role.modules, role.groups, packs, lambda hidden, pack: role.stage.scalars(hidden), num_outputs
        )
    return values.reshape(rollout.response_mask.shape)


def sequence_scores(role: Role, sequences: Sequence[Tensor], *, tokens_per_microbatch: int) -> Tensor:
    """[B] float32: the reward model's scalar at the last token of each sequence."""
    if not role.is_here:
        return torch.zeros(len(sequences), device=role.device)
    rows = last_token_rows([sequence.numel() for sequence in sequences])
    packs = _packs(role, sequences, rows, tokens_per_microbatch)
    with role.memory.resident("weights"):
        scores = run_forward(
            role.modules, role.groups, packs, lambda hidden, pack: role.stage.scalars(hidden), len(sequences)
        )
    return scores.squeeze(-1)


def step_values(role: Role, rollout: Rollout, is_end: Tensor, *, tokens_per_microbatch: int) -> Tensor:
    """[B, T] float32: the process model's judgement of each step, from -1 (surely wrong) to 1 (surely right); 0 where
    no step ends.

    is_end [B, T] bool: True where tokens[:, t + 1] is the last token of a step, at which the model is read. Its scalar
    is the logit of "right" (train_process.py), of which this is 2 sigmoid - 1.
    """
    if not role.is_here:
        return torch.zeros(is_end.shape, device=role.device)
    sequences = unpad(rollout.tokens.cpu(), rollout.lengths.cpu())
    packs = _packs(role, sequences, end_rows(is_end.cpu()), tokens_per_microbatch)
    with role.memory.resident("weights"):
        logits = run_forward(
            role.modules, role.groups, packs, lambda hidden, pack: role.stage.scalars(hidden), is_end.numel()
        )
    return torch.tanh(logits.view(is_end.shape) / 2) * is_end


def full_kl(policy: Role, reference: Role, rollout: Rollout, *, tokens_per_microbatch: int) -> Tensor:
    """[B, T] float32: KL(policy || reference) over the whole vocabulary at each response token, nats.

    The reference's hidden states of the response tokens wait on the last stage for the policy's, pack by pack: both
    roles must have the same layout (the configuration is checked for it).
    """
    if not policy.is_here:
        return torch.zeros(rollout.response_mask.shape, device=policy.device)
    sequences, rows = _response_sequences(rollout)
    packs = _packs(policy, sequences, rows, tokens_per_microbatch)
    reference_hidden: dict[tuple[int, ...], Tensor] = {}

    def keep(hidden: Tensor, pack: Pack) -> Tensor:
        reference_hidden[pack.sequences] = hidden
        return torch.zeros(hidden.shape[0], device=hidden.device)

    def compute(hidden: Tensor, pack: Pack) -> Tensor:
        return linear_full_kl(
            hidden,
            policy.stage.vocabulary_weight(),
            reference_hidden.pop(pack.sequences),
            reference.stage.vocabulary_weight(),
            tp_group=policy.groups.megatron.tp,
            vocab_size=policy.shape.vocab_size,
        )

    num_outputs = rollout.response_mask.numel()
    with reference.memory.resident("weights"), policy.memory.resident("weights"):  # both heads at once
        run_forward(reference.modules, reference.groups, packs, keep, num_outputs)
        kl = run_forward(policy.modules, policy.groups, packs, compute, num_outputs)
    return kl.reshape(rollout.response_mask.shape)


@dataclass(frozen=True)
class Scored:
    """scores [B], values, ref_logprobs and steps [B, T] float32 of a rollout. scores: 0 without a reward model.
    ref_logprobs: None where they are not wanted. steps: the process model's, None without one.
    """

    scores: Tensor
    values: Tensor
    ref_logprobs: Tensor | None
    steps: Tensor | None = None


class RolloutScorer:
    """Reward model, process model, critic and reference over one rollout, which may come in parts while the rest is
    being sampled.

    reference: None where its log-probs are not wanted. sampler: the role that samples meanwhile; then all roles are on
    all ranks.
    On CUDA the parts run on a stream of their own, beside the small steps of the last responses, unless one of the
    roles is spread over ranks: the collectives inside of two forward passes must not run side by side, in an order
    that differs from GPU to GPU. Those parts then run in line. Numbers are those of the whole rollout, up to rounding.
    """

    def __init__(
        self,
        reward: Role | None,
        critic: Role,
        reference: Role | None,
        *,
        process: Role | None = None,
        step_ends: Callable[[Rollout], Tensor] | None = None,
        sampler: Role | None = None,
        following: Role | None = None,
        limit: int,
        trace: Trace | None = None,
    ) -> None:
        """step_ends: where the process model judges, [B, T] bool. following: computes next; its weights come while the
        critic computes. limit: tokens of a micro-batch.
        """
        self._reward, self._critic, self._reference, self._limit = reward, critic, reference, limit
        self._process, self._step_ends = process, step_ends
        self._following, self._trace = following, trace
        self._parts: list[tuple[Tensor, Scored]] = []
        layouts = [role.groups.layout for role in (reward, process, critic, reference, sampler) if role is not None]
        is_whole = all(layout.tp * layout.pp == 1 for layout in layouts)
        self._stream = torch.cuda.Stream() if critic.device.type == "cuda" and sampler and is_whole else None

    @property
    def num_scored(self) -> int:
        return sum(len(rows) for rows, _ in self._parts)

    def add(self, rows: Sequence[int], part: Rollout) -> None:
        """Scores these rows of the rollout, which are whole. Every rank must call it, with the same rows."""
        index = torch.tensor(rows, device=part.tokens.device)
        # Read before the passes start: reading in between would make the host wait for them, and sampling with it.
        part = Rollout(**{name: x.cpu() for name, x in vars(part).items() if x is not None})
        if self._stream is None:
            self._parts.append((index, self._score(part)))
            return
        self._stream.wait_stream(torch.cuda.current_stream())  # weights and what is on its way to them
        with torch.cuda.stream(self._stream):
            self._parts.append((index, self._score(part)))

    def finish(self, rollout: Rollout) -> Scored:
        """The whole rollout, of which what was not added is scored now. Every rank must call it."""
        if not self._parts:
            return self._score(rollout)
        self._join()
        is_left = torch.ones(len(rollout.lengths), dtype=torch.bool, device=rollout.tokens.device)
        is_left[torch.cat([rows for rows, _ in self._parts])] = False
        left = is_left.nonzero().flatten()
        parts = [*self._parts, *([(left, self._score(take_rows(rollout, left)))] if len(left) else [])]
        scores = torch.zeros(len(is_left), device=is_left.device)
        values, ref_logprobs, steps = torch.zeros(3, *rollout.response_mask.shape, device=is_left.device)
        for rows, scored in parts:
            num_columns = scored.values.shape[1]
            scores[rows] = scored.scores
            values[rows, :num_columns] = scored.values
            if scored.ref_logprobs is not None:
                ref_logprobs[rows, :num_columns] = scored.ref_logprobs
            if scored.steps is not None:
                steps[rows, :num_columns] = scored.steps
        return Scored(
            scores,
            values,
            None if self._reference is None else ref_logprobs,
            None if self._process is None else steps,
        )

    def _join(self) -> None:
        """Lets the current stream read what the other one has scored."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream()
        current.wait_stream(self._stream)
        for _, scored in self._parts:
            for x in vars(scored).values():
                if x is not None:
                    x.record_stream(current)  # its memory is not free before this stream has read it

    def _score(self, rollout: Rollout) -> Scored:
        limit = self._limit
        second = self._reference or self._critic
        scores = torch.zeros(len(rollout.lengths), device=self._critic.device)
        if self._reward is not None:
            sequences, is_here = unpad(rollout.tokens.cpu(), rollout.lengths.cpu()), self._reward.is_here
            with self._reward.memory.resident("weights"), span(self._trace, "reward scores", is_here=is_here):
                (self._process or second).memory.prefetch("weights")  # they come while this role computes
                scores = sequence_scores(self._reward, sequences, tokens_per_microbatch=limit)
        steps = None
        if self._process is not None and self._step_ends is not None:
            is_here = self._process.is_here
            with self._process.memory.resident("weights"), span(self._trace, "process scores", is_here=is_here):
                second.memory.prefetch("weights")
                is_end = self._step_ends(rollout)
                steps = step_values(self._process, rollout, is_end, tokens_per_microbatch=limit)
        ref_logprobs = None
        if self._reference is not None:
            is_here = self._reference.is_here
            with self._reference.memory.resident("weights"), span(self._trace, "reference log-probs", is_here=is_here):
                self._critic.memory.prefetch("weights")
                ref_logprobs, _ = token_logprobs(self._reference, rollout, tokens_per_microbatch=limit)
        with self._critic.memory.resident("weights"), span(self._trace, "critic values", is_here=self._critic.is_here):
            if self._following is not None:
                self._following.memory.prefetch("weights")
            values = token_values(self._critic, rollout, tokens_per_microbatch=limit)
        return Scored(scores, values, ref_logprobs, steps)


def score_responses(
    rollout: Rollout,
    reward: Role | None,
    process: Role | None,
    rewards: RewardMix | None,
    *,
    tokens_per_microbatch: int,
) -> Rewards:
    """The rewards of a rollout, models and functions. Every rank of the run must call it."""
    scores, steps = torch.zeros(len(rollout.lengths), device=rollout.tokens.device), None
    if reward is not None:
        sequences = unpad(rollout.tokens.cpu(), rollout.lengths.cpu())
        scores = sequence_scores(reward, sequences, tokens_per_microbatch=tokens_per_microbatch)
    if process is not None and rewards is not None:
        is_end = rewards.step_ends(rollout)
        steps = step_values(process, rollout, is_end, tokens_per_microbatch=tokens_per_microbatch)
    return mix_rewards(rollout, scores, steps, reward, process, rewards)


def mix_rewards(
    rollout: Rollout,
    scores: Tensor,
    steps: Tensor | None,
    reward: Role | None,
    process: Role | None,
    rewards: RewardMix | None,
) -> Rewards:
    """The rewards of a rollout, from what its models have scored on their ranks. Every rank of the run must call it."""
    for role, values in ((reward, scores), (process, steps)):
        if role is not None and values is not None:
            role.groups.give_to_all(values)
    return Rewards(scores, None, {}, None) if rewards is None else rewards.apply(rollout, scores, steps)


def _packs(role: Role, sequences: Sequence[Tensor], rows: Rows, tokens_per_microbatch: int) -> list[Pack]:
    """Of a forward pass: two at least, where two can be computed at the same time."""
    return role_packs(role, sequences, rows, tokens_per_microbatch, multiple_of=2 if can_share_threads() else 1)


def _response_sequences(rollout: Rollout) -> tuple[list[Tensor], Rows]:
    tokens, mask = rollout.tokens.cpu(), rollout.response_mask.cpu()
    return unpad(tokens, rollout.lengths.cpu()), response_rows(tokens, mask)
