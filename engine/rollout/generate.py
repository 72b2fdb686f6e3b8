"""Responses sampled from the weights that are being trained, with a key / value cache and continuous batching.

Each replica takes a share of the prompts and decodes up to `sampling.batch_size` of them at a time: whole prompts run
through the model as packs, then every request adds one token per step, and waiting requests take the slots of those
that end. A token depends on what precedes it, its position and the seed of its request: neither slots nor layouts
change it.
"""

import hashlib
import struct
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ppomax.engine.config import SamplingConfig
from ppomax.engine.data.batches import Pack, last_token_rows, make_packs
from ppomax.engine.errors import DataError
from ppomax.engine.models.attention import KeyValueCache
from ppomax.engine.models.roles import Role, check_vocabulary
from ppomax.engine.parallel.stages import (
    broadcast_from_last_stage,
    receive_from_previous_stage,
    send_to_next_stage,
    sum_over_replicas,
)
from ppomax.engine.ppo.types import Rollout, response_mask
from ppomax.engine.rollout.kv_cache import Slots, decode, prefill
from ppomax.kernels.sampling import sample_with_margins

PREFILL_TOKENS = 8192
"""Prompts that start together have at most this many tokens, to bound activations (a single prompt may have more)."""

REFILL_FRACTION = 8
"""Waiting requests start when 1 / this of the slots are free: a pack of prompts delays all others by a step or more."""


@torch.no_grad()  # not inference_mode: what is computed from a rollout enters autograd
def generate(
    role: Role,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    seeds: Tensor,
    eos_id: int,
    pad_id: int,
    max_length: int | None = None,
) -> Rollout:
    """One response to each prompt of the global batch; every rank of the role must call it and gets all of them.

    prompts: B sequences of token ids, the same on every rank.
    seeds [B] int64: they fix the noise of each response (`request_seeds`).
    A response ends by eos_id (kept), by sampling.max_new_tokens, or where prompt and response fill the model's context
    or, if given, max_length tokens. pad_id fills the rows of the result.
    Raises, before anything runs, DataError if a prompt is empty or leaves no room for a response, ConfigError if one
    has a token that the model does not know.
    """
    context = min(role.shape.max_position_embeddings, max_length or role.shape.max_position_embeddings)
    _check_prompts(prompts, context)
    check_vocabulary(role, max(max(prompt) for prompt in prompts))
    role.stage.eval()
    batch = _Batch(prompts, sampling.max_new_tokens, context, seeds, role.device)
    replica, num_replicas = role.groups.dp_rank, role.groups.layout.dp
    # Dealt by length: the replicas' shares are alike, and prompts that start together are of similar length.
    longest_first = sorted(range(len(prompts)), key=lambda b: (-len(prompts[b]), b))
    share = longest_first[replica::num_replicas]
    if share:
        _decode_share(role, batch, share, sampling, eos_id)
    for result in (batch.num_tokens, batch.tokens, batch.logprobs, batch.margins, batch.finished):
        sum_over_replicas(result, role.groups)
    return _assemble(batch, pad_id)


def request_seeds(run_seed: int, step: int, num: int, *, sample: int = 0) -> Tensor:
    """Seeds [num] int64 of the responses to `num` prompts, different for every (run_seed, step, prompt, sample).

    sample: number of the response, where a prompt gets several.
    """
    digests = [
        hashlib.blake2b(struct.pack("<4q", run_seed, step, prompt, sample), digest_size=8).digest()
        for prompt in range(num)
    ]
    return torch.tensor([int.from_bytes(digest, "little") >> 1 for digest in digests], dtype=torch.int64)


def _check_prompts(prompts: Sequence[Sequence[int]], context: int) -> None:
    if not prompts:
        raise DataError("no prompts to respond to; give at least one")
    for b, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise DataError(f"prompt {b} is empty; a response needs at least one token to start from")
        if len(prompt) >= context:
            raise DataError(
                f"prompt {b} has {len(prompt)} tokens, which leaves no room for a response in a context of {context}; "
                "shorten it, or raise data.max_length (up to the model's max_position_embeddings)"
            )


class _Batch:
    """The global batch: what each of B requests asks for, and its response so far (0 for requests of other replicas).

    prompt_lengths, max_lengths, seeds [B] int64: max_lengths in tokens of prompt and response.
    num_tokens [B] int64: tokens of the response. tokens [B, longest] int64, logprobs and margins [B, longest] float32.
    finished [B] int32: 1 where the response ended by EOS.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, context: int, seeds: Tensor, device: torch.device
    ) -> None:
        self.prompts = prompts
        self.prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.max_lengths = (self.prompt_lengths + max_new_tokens).clamp(max=context)
        self.seeds = seeds.to(device)
        sizes = (len(prompts), int((self.max_lengths - self.prompt_lengths).max()))
        self.num_tokens = torch.zeros_like(self.prompt_lengths)
        self.tokens = torch.zeros(sizes, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(sizes, device=device)
        self.margins = torch.zeros(sizes, device=device)
        self.finished = torch.zeros(len(prompts), dtype=torch.int32, device=device)

    def lengths(self, requests: Tensor) -> Tensor:
        """Tokens of prompt and response so far [R], which is also the position of the next token."""
        return self.prompt_lengths[requests] + self.num_tokens[requests]

    def append(self, requests: Tensor, tokens: Tensor, logprobs: Tensor, margins: Tensor, *, eos_id: int) -> None:
        """Adds one token to each of R requests."""
        places = (requests, self.num_tokens[requests])
        self.tokens[places], self.logprobs[places], self.margins[places] = tokens, logprobs, margins
        self.num_tokens[requests] += 1
        self.finished[requests] = (tokens == eos_id).int()

    def is_done(self, requests: Tensor) -> Tensor:
        return self.finished[requests].bool() | (self.lengths(requests) == self.max_lengths[requests])


def _decode_share(role: Role, batch: _Batch, share: Sequence[int], sampling: SamplingConfig, eos_id: int) -> None:
    """Runs this replica's requests to their ends. All ranks of the replica take the same steps."""
    slots = Slots(
        role.stage,
        num_slots=min(sampling.batch_size, len(share)),
        max_length=int(batch.max_lengths[list(share)].max()),
        track_seen=sampling.repetition_penalty != 1 and role.groups.is_last_stage,
    )
    multiple_of = role.groups.layout.tp if role.stage.config.sequence_parallel else 1
    waiting = deque(share)
    while waiting or slots.running.numel():
        view: KeyValueCache
        if waiting and slots.num_free >= min(len(waiting), max(1, slots.num_slots // REFILL_FRACTION)):
            requests = torch.tensor(_take(waiting, batch.prompts, slots.num_free), device=role.device)
            taken = slots.start(requests)
            pack = _prompt_pack([batch.prompts[b] for b in requests.tolist()], multiple_of).to(role.device)
            view = prefill(slots.cache, pack, batch.prompt_lengths[requests], first_slot=taken.start)
        else:
            requests, taken = slots.running, slice(0, slots.running.numel())
            last_tokens = batch.tokens[requests, batch.num_tokens[requests] - 1]
            positions = batch.lengths(requests) - 1
            pack = _token_pack(last_tokens, positions, multiple_of)
            view = decode(slots.cache, positions)
        hidden = _run_stage(role, pack, view)
        seen = None if slots.seen is None else slots.seen[taken]
        tokens, logprobs, margins = _draw(role, hidden, batch, requests, sampling, seen)
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        batch.append(requests, tokens, logprobs, margins, eos_id=eos_id)
        slots.release(batch.is_done(slots.running))


def _take(waiting: deque[int], prompts: Sequence[Sequence[int]], num_free: int) -> list[int]:
    """Removes the next requests to start: as many as slots and PREFILL_TOKENS allow, at least one."""
    taken = [waiting.popleft()]
    num_tokens = len(prompts[taken[0]])
    while waiting and len(taken) < num_free and num_tokens + len(prompts[waiting[0]]) <= PREFILL_TOKENS:
        num_tokens += len(prompts[waiting[0]])
        taken.append(waiting.popleft())
    return taken


def _prompt_pack(prompts: Sequence[Sequence[int]], multiple_of: int) -> Pack:
    """Whole prompts; the head works on the last token of each."""
    sequences = [torch.tensor(prompt) for prompt in prompts]
    rows = last_token_rows([len(prompt) for prompt in prompts])
    return make_packs(sequences, rows, [range(len(prompts))], multiple_of=multiple_of)[0]


def _token_pack(tokens: Tensor, positions: Tensor, multiple_of: int) -> Pack:
    """One token [R] for each of R requests, at its position [R], and padding."""
    num_requests = tokens.numel()
    num_padding = -num_requests % multiple_of
    rows = torch.arange(num_requests, device=tokens.device)
    return Pack(
        tokens=pad(tokens, (0, num_padding)),
        positions=pad(positions, (0, num_padding)),
        cu_seqlens=torch.arange(num_requests + num_padding + 1, dtype=torch.int32, device=tokens.device),
        max_seqlen=1,
        rows=rows,
        labels=torch.full_like(rows, -1),
        index=rows,
        sequences=tuple(range(num_requests)),
    )


def _run_stage(role: Role, pack: Pack, cache: KeyValueCache) -> Tensor | None:
    """Takes the pack through all stages: on the last one hidden [R, H] of its rows, None on the others."""
    stage, groups = role.stage, role.groups
    if not groups.is_first_stage:
        num_tokens = pack.tokens.numel() // (groups.layout.tp if stage.config.sequence_parallel else 1)
        sizes = (num_tokens, 1, role.shape.hidden_size)
        received = receive_from_previous_stage(sizes, stage.config.params_dtype, role.device, groups)
        stage.decoder.set_input_tensor(received)
    hidden = stage(pack, cache)
    if groups.is_last_stage:
        return hidden
    send_to_next_stage(hidden, groups)
    return None


def _draw(
    role: Role, hidden: Tensor | None, batch: _Batch, requests: Tensor, sampling: SamplingConfig, seen: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The next tokens [R] int64, their logprobs and margins [R] float32, on every stage, from the last one's hidden."""
    # Token ids, too, are exact in float64: one broadcast carries all three.
    drawn = torch.zeros(3, requests.numel(), dtype=torch.float64, device=role.device)
    if hidden is not None:
        draw = sample_with_margins(
            _logits(hidden, role.stage.vocabulary_weight()),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
            seen=seen,
            seeds=batch.seeds[requests],
            positions=batch.lengths(requests),
            tp_group=role.groups.megatron.tp,
            vocab_size=role.shape.vocab_size,
        )
        drawn = torch.stack([draw.tokens.double(), draw.logprobs.double(), draw.margins.double()])
    broadcast_from_last_stage(drawn, role.groups)
    return drawn[0].long(), drawn[1].float(), drawn[2].float()


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [R, H] times the vocabulary head [V/tp, H] in float32: bfloat16 logits would be off by up to 0.4 %."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.float().T


def _assemble(batch: _Batch, pad_id: int) -> Rollout:
    """Prompts and responses side by side, right padded to the longest."""
    lengths, device = batch.prompt_lengths + batch.num_tokens, batch.tokens.device
    num_rows, width = lengths.numel(), int(lengths.max())
    is_prompt = torch.arange(width, device=device) < batch.prompt_lengths[:, None]
    mask = response_mask(batch.prompt_lengths, lengths, width - 1)
    is_generated = torch.arange(batch.tokens.shape[1], device=device) < batch.num_tokens[:, None]
    # Both sides of each assignment select row by row, from left to right.
    tokens = torch.full((num_rows, width), pad_id, dtype=torch.int64, device=device)
    tokens[is_prompt] = torch.tensor([token for prompt in batch.prompts for token in prompt], device=device)
    tokens[:, 1:][mask] = batch.tokens[is_generated]
    sampling_logprobs, margins = torch.zeros(2, num_rows, width - 1, device=device)
    sampling_logprobs[mask] = batch.logprobs[is_generated]
    margins[mask] = batch.margins[is_generated]
    return Rollout(
        tokens=tokens,
        prompt_lengths=batch.prompt_lengths,
        lengths=lengths,
        response_mask=mask,
        finished=batch.finished.bool(),
        sampling_logprobs=sampling_logprobs,
        margins=margins,
    )
