"""One optimizer step, shared by all stages: gradients of a language-model loss, the non-finite guard, clip, learning
rate.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppomax.engine.config_models import OptimConfig
from ppomax.engine.data.batches import Pack, Rows
from ppomax.engine.data.datasets import DialogueRow
from ppomax.engine.errors import DivergedError
from ppomax.engine.models.heads import head_cross_entropy
from ppomax.engine.models.roles import Role, role_packs
from ppomax.engine.optim import clip_and_step, learning_rate_factor, set_learning_rate
from ppomax.engine.parallel.device import this_device
from ppomax.engine.parallel.pipeline import run_forward_backward


@dataclass
class StepCounter:
    """Optimizer steps done of num_steps, those skipped in a row because a number was not finite, and where to go back
    to: last_good names the checkpoint, and is asked on all ranks.
    """

    step: int
    num_steps: int
    max_skipped: int
    skipped: int = 0
    last_good: Callable[[], str] = lambda: "none"

    def resume(self, step: int, skipped: int) -> None:
        """Goes on where a run stood."""
        self.step, self.skipped = step, skipped

    def record(self, *, applied: bool, what: str) -> None:
        """Counts one step; raises DivergedError after more than max_skipped skipped ones in a row."""
        self.step += 1
        self.skipped = 0 if applied else self.skipped + 1
        self._check(f"optimizer step {self.step}: {what}")

    def record_bad_rollout(self, num_steps: int, *, what: str) -> None:
        """Counts a rollout that is not learned from, which would have had num_steps steps, as one that was skipped."""
        begin, self.step, self.skipped = self.step + 1, self.step + num_steps, self.skipped + 1
        self._check(f"optimizer step {begin}: the rollout before it has {what}")

    def _check(self, what: str) -> None:
        if self.skipped > self.max_skipped:
            raise DivergedError(
                f"{what} ({self.skipped} in a row, train.max_skipped_steps = {self.max_skipped}); "
                f"no weight was changed by it. Last good checkpoint: {self.last_good()}. "
                "Lower the learning rate (or raise ppo.kl_coef) and resume from that checkpoint"
            )


def apply_gradients(
    trained: Sequence[tuple[Role, float]], stats: Mapping[str, float], optim: OptimConfig, counter: StepCounter
) -> dict[str, float]:
    """Steps every (role, peak learning rate) unless a loss in `stats` or a gradient norm is not finite, which is
    counted. stats: the same on every rank.

    Weights and gradients of the roles must be held. Returns stats with the gradient norms before clipping, of each role
    and of all, and the first role's learning rate. Raises DivergedError. Every rank of the run must call it.
    """
    factor = learning_rate_factor(optim, counter.step, counter.num_steps)
    optimizers = []
    memories = [role.memory for role, _ in trained]
    for role, peak in trained:
        if role.optimizer is not None:
            set_learning_rate(role.optimizer, peak * factor)
        optimizers.append(role.optimizer)
    bad = [name for name, value in stats.items() if not math.isfinite(value)]
    joint = optim.joint_grad_clip or len(trained) == 1
    groups = [role.groups for role, _ in trained]
    norms = None
    if not bad:
        norms = clip_and_step(optimizers, groups, memories, max_norm=optim.grad_clip, joint=joint)
    what = f"{bad[0]} is {stats[bad[0]]}" if bad else "a gradient is not finite"
    counter.record(applied=norms is not None, what=what)
    each = [f"grad_norm_{role.name}" for role, _ in trained] if len(trained) > 1 else []
    return {
        **stats,
        **dict(zip([*each, "grad_norm"], norms or (), strict=False)),
        "learning_rate": trained[0][1] * factor,
        "skipped_steps": float(counter.skipped),
    }


def parameter_norms(roles: Sequence[Role]) -> dict[str, float]:
    """L2 norm of the weights of each trained role. Every rank of the run must call it."""
    squares = []
    for role in roles:
        square = torch.zeros(1, dtype=torch.float64, device=role.device)
        if role.optimizer is not None:
            with role.memory.resident("weights"):
                square[0] = role.optimizer.squared_parameter_norm()
        role.groups.give_to_all(square)
        squares.append(square)
    norms = torch.cat(squares).sqrt().tolist()
    return {f"parameter_norm_{role.name}": norm for role, norm in zip(roles, norms, strict=True)}


def require_finite_weights(roles: Iterable[Role], counter: StepCounter) -> None:
    """Raises DivergedError on all ranks unless every weight of the roles is finite. Collective over the world.

    A step from finite gradients can overflow where learning rate and weights are absurd; its checkpoint would be taken
    for good.
    """
    bad = torch.zeros((), device=this_device())
    for role in roles:
        if role.is_here:
            with role.memory.resident("weights"):
                for chunk in role.chunks:
                    for weight in chunk.parameters():
                        bad += weight.isfinite().all().logical_not()
    torch.distributed.all_reduce(bad)
    if bad:
        raise DivergedError(
            f"optimizer step {counter.step}: it or one before left weights that are not finite; no checkpoint is "
            f"written. Last good checkpoint: {counter.last_good()}. Lower the learning rate and resume from that "
            "checkpoint"
        )


def language_model_gradients(role: Role, dialogues: Sequence[DialogueRow], tokens_per_microbatch: int) -> float:
    """Gradients of the mean negative log-likelihood per learned token; returns it, nats. Collective over the role's
    ranks.
    """
    sequences, rows, count = dialogue_rows(dialogues)
    packs = role_packs(role, sequences, rows, tokens_per_microbatch)
    zero_gradients(role)

    def loss(hidden: Tensor, pack: Pack) -> tuple[Tensor, Tensor]:
        value = head_cross_entropy(role, hidden, pack.labels, 1 / max(1, count))
        return value, value.new_zeros(0)

    return float(run_forward_backward(role.modules, role.groups, packs, loss, 0)[0])


def dialogue_rows(dialogues: Sequence[DialogueRow], *, first_index: int = 0) -> tuple[list[Tensor], Rows, int]:
    """Sequences, rows and the number of learned tokens of dialogues; their results go to first_index and on."""
    sequences, rows, labels, index = [], [], [], []
    count = 0
    for dialogue in dialogues:
        tokens = torch.tensor(dialogue.tokens, dtype=torch.int64)
        learned = torch.tensor(dialogue.loss_mask, dtype=torch.bool)[1:].nonzero().squeeze(1)
        sequences.append(tokens)
        rows.append(learned)
        labels.append(tokens[learned + 1])
        index.append(first_index + count + torch.arange(learned.numel()))
        count += learned.numel()
    return sequences, Rows(rows, labels, index), count


def zero_gradients(role: Role) -> None:
    """Clears the gradient buffers of a trained role."""
    assert role.optimizer is not None
    for module in role.modules:
        module.zero_grad_buffer()
    role.optimizer.zero_grad()
