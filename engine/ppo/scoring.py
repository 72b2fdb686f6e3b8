"""Forward passes of the four roles over a rollout: log-probs, values, scores. Results are whole on every rank."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ppomax.engine.data.batches import Pack, Rows, last_token_rows, response_rows, unpad
from ppomax.engine.models.heads import head_logprobs
from ppomax.engine.models.roles import Role, role_packs
from ppomax.engine.parallel.pipeline import run_forward
from ppomax.engine.ppo.types import Rollout
from ppomax.kernels.linear_full_kl import linear_full_kl


def token_logprobs(role: Role, rollout: Rollout, *, tokens_per_microbatch: int) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy) [B, T] float32, nats, of the response tokens under a model with a vocabulary head; 0
    elsewhere.
    """
    sequences, rows = _response_sequences(rollout)
    packs = role_packs(role, sequences, rows, tokens_per_microbatch)

    def compute(hidden: Tensor, pack: Pack) -> Tensor:
        return torch.stack(head_logprobs(role, hidden, pack.labels), dim=-1)

    outputs = run_forward(role.modules, role.groups, packs, compute, rollout.response_mask.numel(), width=2)
    logprobs, entropy = outputs.unbind(-1)
    shape = rollout.response_mask.shape
    return logprobs.reshape(shape), entropy.reshape(shape)


def token_values(role: Role, rollout: Rollout, *, tokens_per_microbatch: int) -> Tensor:
    """[B, T] float32: the critic's value of the state before each response token; 0 elsewhere."""
    sequences, rows = _response_sequences(rollout)
    packs = role_packs(role, sequences, rows, tokens_per_microbatch)
    values = run_forward(
        role.modules, role.groups, packs, lambda hidden, pack: role.stage.scalars(hidden), rollout.response_mask.numel()
    )
    return values.reshape(rollout.response_mask.shape)


def sequence_scores(role: Role, sequences: Sequence[Tensor], *, tokens_per_microbatch: int) -> Tensor:
    """[B] float32: the reward model's scalar at the last token of each sequence."""
    rows = last_token_rows([sequence.numel() for sequence in sequences])
    packs = role_packs(role, sequences, rows, tokens_per_microbatch)
    scores = run_forward(
        role.modules, role.groups, packs, lambda hidden, pack: role.stage.scalars(hidden), len(sequences)
    )
    return scores.squeeze(-1)


def full_kl(policy: Role, reference: Role, rollout: Rollout, *, tokens_per_microbatch: int) -> Tensor:
    """[B, T] float32: KL(policy || reference) over the whole vocabulary at each response token, nats.

    The reference's hidden states of the response tokens wait on the last stage for the policy's, pack by pack: both
    roles must have the same layout (the configuration is checked for it).
    """
    sequences, rows = _response_sequences(rollout)
    packs = role_packs(policy, sequences, rows, tokens_per_microbatch)
    reference_hidden: list[Tensor] = []

    def keep(hidden: Tensor, pack: Pack) -> Tensor:
        reference_hidden.append(hidden)
        return torch.zeros(hidden.shape[0], device=hidden.device)

    def compute(hidden: Tensor, pack: Pack) -> Tensor:
        return linear_full_kl(
            hidden,
            policy.stage.vocabulary_weight(),
            reference_hidden.pop(0),
            reference.stage.vocabulary_weight(),
            tp_group=policy.groups.megatron.tp,
            vocab_size=policy.shape.vocab_size,
        )

    num_outputs = rollout.response_mask.numel()
    run_forward(reference.modules, reference.groups, packs, keep, num_outputs)
    kl = run_forward(policy.modules, policy.groups, packs, compute, num_outputs)
    return kl.reshape(rollout.response_mask.shape)


def _response_sequences(rollout: Rollout) -> tuple[list[Tensor], Rows]:
    tokens, mask = rollout.tokens.cpu(), rollout.response_mask.cpu()
    return unpad(tokens, rollout.lengths.cpu()), response_rows(tokens, mask)
