"""What flows through one PPO iteration: rollouts, experience, and the running reward moments.

Alignment: column `t` of every [B, T] tensor is about the token `tokens[:, t + 1]`, predicted from `tokens[:, : t +
1]`; T = S - 1. Masks are named for what True keeps. B is the *global* rollout batch: these tensors are small, so
every rank holds all of them, and every statistic over them is the same on every rank and for every layout
(docs/design.md, "The global batch").
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rollout:
    """Prompts with the responses sampled for them, right padded.

    tokens [B, S] int64: prompt, response, padding.
    prompt_lengths [B] int64: tokens of the prompt.
    lengths [B] int64: tokens of prompt and response together (EOS included).
    response_mask [B, T] bool: True where tokens[:, t + 1] is a response token.
    finished [B] bool: the response ended by EOS.
    sampling_logprobs [B, T] float32: log-probabilities, nats, of the sampler's own unmodified T = 1 distribution; 0
    outside the mask.
    margins [B, T] float32: by how much the drawn token's perturbed score beats the next one; 0 outside the mask.
    Where it is tiny, another layout may draw another token; infinite in the part of a response that was carried over
    from an earlier rollout. None for responses that were not sampled here.
    """

    tokens: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    response_mask: Tensor
    finished: Tensor
    sampling_logprobs: Tensor
    margins: Tensor | None = None


@dataclass(frozen=True)
class Rewards:
    """Raw, weighted rewards of a rollout. scores [B] float32: of whole responses. steps [B, T] float32: of steps, at
    their last tokens, 0 elsewhere; None where no row is per step. values: of each row by its label, without weight,
    [B] or [B, T]. is_end [B, T] bool: where steps end; None as steps.
    """

    scores: Tensor
    steps: Tensor | None
    values: Mapping[str, Tensor]
    is_end: Tensor | None

    @property
    def totals(self) -> Tensor:
        """[B] float32: all that a response gets."""
        return self.scores if self.steps is None else self.scores + self.steps.sum(1)

    def of_response(self, b: int) -> dict[str, object]:
        """Under "rewards" the raw value of each row for one response, or those of its steps; nothing without rows."""
        is_end = torch.zeros(0) if self.is_end is None else self.is_end[b]
        found = {n: x[b].item() if x.dim() == 1 else x[b][is_end].tolist() for n, x in self.values.items()}
        return {"rewards": found} if found else {}

    def metrics(self) -> dict[str, Tensor]:
        """Means of the rows' raw values: over responses, or over steps; and how many steps a response has."""
        if self.is_end is None:
            return {f"reward/{name}": values.mean() for name, values in self.values.items()}
        num_steps = self.is_end.sum()
        means = {
            f"reward/{name}": values.sum() / num_steps.clamp(min=1) if values.dim() == 2 else values.mean()
            for name, values in self.values.items()
        }
        return means | {"response_steps": num_steps / len(self.is_end)}


@dataclass(frozen=True)
class Experience:
    """A rollout with everything that the update needs; each tensor [B, T] float32 and 0 outside response_mask, scores
    [B] float32.

    scores: raw, weighted rewards of the whole response, its steps included; rewards: what they are made of, None for
    a minibatch. kl: the chosen estimator of KL(policy || reference) per token, nats.
    logprobs: of the policy at rollout time. old_logprobs: the denominator of the ratio: the same, or the reference's
    under importance sampling.
    """

    rollout: Rollout
    scores: Tensor
    logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    kl: Tensor
    token_rewards: Tensor
    advantages: Tensor
    returns: Tensor
    rewards: Rewards | None = None


def response_mask(prompt_lengths: Tensor, lengths: Tensor, num_columns: int) -> Tensor:
    """[B, T] mask of response tokens: column t keeps token t + 1, so t runs from prompt_length - 1 to length - 2."""
    t = torch.arange(num_columns, device=lengths.device)[None]
    return (t >= prompt_lengths[:, None] - 1) & (t < lengths[:, None] - 1)


def take_rows(rollout: Rollout, rows: Tensor) -> Rollout:
    """Some rows [n] int64 of a rollout, in this order, without columns that only others fill."""
    lengths = rollout.lengths[rows]
    width = int(lengths.max())
    columns = {name: x[rows] for name, x in vars(rollout).items() if x is not None}
    tokens = columns.pop("tokens")[:, :width]
    return Rollout(tokens=tokens, **{n: x if x.dim() == 1 else x[:, : width - 1] for n, x in columns.items()})
