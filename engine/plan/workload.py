"""What one iteration of a stage works on, and how it is cut into micro-batches: lengths alone, no data."""

from dataclasses import dataclass

from ppomax.engine.config import RunConfig
from ppomax.engine.parallel.layout import ParallelLayout

USUAL_PROMPT = 512
"""Tokens of a prompt where nobody says otherwise, as far as data.max_length leaves them room."""


@dataclass(frozen=True)
class Workload:
    """sequences: of an iteration, over all replicas. minibatch: of them, those of one optimizer step. steps: optimizer
    steps. ptx: dialogues beside a minibatch. prompt, response: mean tokens. longest: tokens of the longest sequence.
    sampled: responses under way at once, at most. unit: sequences that stay in one micro-batch.
    """

    sequences: int
    minibatch: int
    steps: int
    ptx: int
    prompt: int
    response: int
    longest: int
    sampled: int = 0
    unit: int = 1

    @property
    def mean(self) -> int:
        """Tokens of a sequence."""
        return self.prompt + self.response


def make_workload(
    config: RunConfig, command: str, *, prompt: int | None = None, response: int | None = None
) -> Workload:
    """prompt, response: mean tokens; unset, responses are as long as they may be, and prompts of USUAL_PROMPT tokens at
    most.
    """
    longest, ppo = config.data.max_length, config.ppo
    response = min(response or config.sampling.max_new_tokens, longest - 1)
    prompt = min(prompt or USUAL_PROMPT, longest - response)
    evaluated = config.monitor.eval_size * config.monitor.eval_best_of
    if command == "sft":
        size = config.train.batch_size
        return Workload(size, size, 1, 0, prompt, response, longest)
    if command == "reward" and config.reward.labels == "steps":
        size = max(1, min(config.reward.max_pairs, config.reward.tokens_per_batch // (prompt + response)))
        return Workload(size, size, 1, 0, prompt, response, longest)
    if command == "reward":
        pairs = max(1, min(config.reward.max_pairs, config.reward.tokens_per_batch // (2 * (prompt + response))))
        return Workload(2 * pairs, 2 * pairs, 1, 0, prompt, response, longest, unit=2)
    if command == "evaluate":
        return Workload(evaluated, 0, 0, 0, prompt, response, longest, evaluated)
    steps = ppo.epochs * ppo.rollout_size // ppo.minibatch_size
    has_ptx = command == "ppo" and ppo.ptx_coef > 0 and bool(config.data.ptx)
    ptx = max(1, round(ppo.ptx_ratio * ppo.minibatch_size)) if has_ptx else 0
    sampled = max(ppo.rollout_size, ppo.over_sampling_size, evaluated if command == "ppo" and config.data.eval else 0)
    return Workload(ppo.rollout_size, ppo.minibatch_size, steps, ptx, prompt, response, longest, sampled)


@dataclass(frozen=True)
class Microbatches:
    """Of one replica: how many, and the tokens of each."""

    number: int
    tokens: int


def microbatches(layout: ParallelLayout, sequences: int, length: int, limit: int, *, unit: int = 1) -> Microbatches:
    """Of `sequences` over all replicas, each `length` tokens long, in packs of at most `limit` tokens where one unit
    of sequences does not exceed it (data/batches.py).
    """
    units = -(-sequences // unit)
    own = -(-units // layout.dp) * unit * length
    per_pack = max(1, limit // (unit * length)) * unit * length
    number = max(-(-own // per_pack), -(-units * unit * length // (limit * layout.dp)))
    if layout.vpp > 1:
        number = -(-number // layout.pp) * layout.pp
    return Microbatches(number, min(per_pack, own))
