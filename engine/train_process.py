"""Process-model training: a scalar at the end of each step, the logit of "this step is right".

The `reward` stage calls it for reward.labels = "steps". Batches, schedule and checkpoints are those of the reward model
(train_reward.py); the loss is binary cross-entropy, the mean over the labelled steps of a batch. PRM800K's neutral
steps count as not right (datasets.py).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from ppomax.engine.config import RunConfig, TrainConfig
from ppomax.engine.data.batches import Pack, Rows
from ppomax.engine.data.datasets import SolutionRow
from ppomax.engine.models.roles import Role, role_packs
from ppomax.engine.parallel.pipeline import run_forward, run_forward_backward
from ppomax.engine.steps import zero_gradients


def process_gradients(model: Role, solutions: Sequence[SolutionRow], config: RunConfig) -> dict[str, float]:
    """Gradients of the mean cross-entropy per step. Returns loss and accuracy over the batch, of the probability 0.5.
    Collective over the role's ranks.
    """
    sequences, rows = _end_rows(solutions)
    targets = torch.tensor([target for row in solutions for target in row.targets], device=model.device)
    packs = role_packs(model, sequences, rows, config.train.tokens_per_microbatch)
    zero_gradients(model)

    def loss(hidden: Tensor, pack: Pack) -> tuple[Tensor, Tensor]:
        logits, wanted = model.stage.scalars(hidden).flatten().float(), targets[pack.index]
        value = binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / len(targets)
        accuracy = ((logits > 0) == (wanted > 0.5)).float().sum() / len(targets)
        return value, accuracy[None]

    sums = run_forward_backward(model.modules, model.groups, packs, loss, 1).tolist()
    return dict(zip(("loss", "accuracy"), sums, strict=True))


def step_accuracy(model: Role, solutions: Sequence[SolutionRow], train: TrainConfig) -> dict[str, float]:
    """Held-out steps: accuracy, cross-entropy, and accuracy of right and of other steps alone (nan without such steps).

    Collective over the role's ranks.
    """
    sequences, rows = _end_rows(solutions)
    targets = torch.tensor([target for row in solutions for target in row.targets])
    packs = role_packs(model, sequences, rows, train.tokens_per_microbatch)
    with model.memory.resident("weights"):
        logits = run_forward(
            model.modules, model.groups, packs, lambda hidden, pack: model.stage.scalars(hidden), len(targets)
        )
    logits = logits.flatten().float().cpu()
    is_right = targets > 0.5
    is_hit = ((logits > 0) == is_right).double()
    return {
        "accuracy": float(is_hit.mean()),
        "accuracy_right": float(is_hit[is_right].mean()),
        "accuracy_wrong": float(is_hit[~is_right].mean()),
        "loss": float(binary_cross_entropy_with_logits(logits, targets)),
    }


def _end_rows(solutions: Sequence[SolutionRow]) -> tuple[list[Tensor], Rows]:
    """Sequences, and a row for each labelled step, at its last token; index: its number among all steps."""
    ends = [torch.tensor(row.ends) for row in solutions]
    starts = torch.tensor([0, *(len(end) for end in ends)]).cumsum(0).tolist()
    return [torch.tensor(row.tokens) for row in solutions], Rows(
        rows=ends,
        labels=[torch.full_like(end, -1) for end in ends],
        index=[torch.arange(len(end)) + start for end, start in zip(ends, starts, strict=False)],
    )
