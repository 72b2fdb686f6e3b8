"""Reward-model training (P p.4, p.8): Eq. 1 and 2 on dynamic batches of 4 to 128 pairs balanced by tokens."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ppomax.engine.config import RewardConfig, RunConfig, TrainConfig
from ppomax.engine.data.batches import Pack, Rows
from ppomax.engine.data.datasets import Dataset, PairRow, load_pairs, load_solutions
from ppomax.engine.data.order import Order
from ppomax.engine.models.heads import head_cross_entropy
from ppomax.engine.models.hf_config import read_shape
from ppomax.engine.models.process_model import with_learned_delimiter
from ppomax.engine.models.roles import Role, as_scalar, grouped_packs, load_policy, load_role
from ppomax.engine.parallel.pipeline import run_forward_backward
from ppomax.engine.ppo.evaluation import PairAccuracy, pair_accuracy, pair_sequences
from ppomax.engine.session import Session, end_step, export, is_due, open_session, restore
from ppomax.engine.steps import StepCounter, apply_gradients, zero_gradients
from ppomax.engine.train_process import process_gradients, step_accuracy


def run(config: RunConfig) -> None:
    """Trains a reward model on preference pairs, or a process model on labelled steps (reward.labels), from a language
    model or from a scalar model; writes train.output/hf.
    """
    config = with_learned_delimiter(config, config.model.policy if config.reward.labels == "steps" else "")
    with open_session(config, "reward", tokenizer_source=config.model.policy) as session:
        if config.reward.labels == "steps":
            work = Work(load_solutions, process_gradients, step_accuracy, "solutions")
        else:
            work = Work(load_pairs, reward_gradients, _pair_metrics, "pairs")
        dataset = work.load(config.data, config.data.train, session.template)
        held_out = work.load(config.data, config.data.eval, session.template).rows if config.data.eval else ()
        held_out = held_out[: config.monitor.eval_size]
        session.log.say(f"data.train: {dataset.summary()}")
        model = _load(session)
        model.memory.hold("weights", "gradients")  # never idle
        model.memory.wait()
        batches = plan_batches(dataset, dataset.order(config.train.seed), config.reward, config.train.steps)
        counter = StepCounter(0, len(batches), config.train.max_skipped_steps, last_good=session.saver.last_good)
        if session.resume:
            state = restore(session, {"reward": model})
            counter.resume(state["step"], state.get("skipped", 0))
        while counter.step < len(batches):
            rows = batches[counter.step]
            losses = work.gradients(model, rows, config)
            stats = apply_gradients([(model, config.optim.lr)], losses, config.optim, counter)
            session.log.step(counter.step, len(batches), stats | {work.rows: float(len(rows))})
            if held_out and is_due(config.monitor.eval_every, counter.step):
                session.log.evaluation(counter.step, work.evaluate(model, held_out, config.train))
            state = {"step": counter.step, "skipped": counter.skipped}
            end_step(session, counter.step, {"reward": model}, state, counter)
        if held_out and config.reward.labels == "steps":
            metrics = step_accuracy(model, held_out, config.train)
            session.log.evaluation(counter.step, metrics)
            session.log.write_json("reward_eval.json", metrics)
        elif held_out:
            result = pair_accuracy(model, held_out, config.train)
            session.log.evaluation(counter.step, result.metrics())
            _write_histogram(session, result)
        export(session, model, "hf", shape=as_scalar(model.shape))


@dataclass(frozen=True)
class Work:
    """What labels ask for. load: rows of files. gradients, evaluate: of a model over rows. rows: in words."""

    load: Callable[..., Dataset[Any]]
    gradients: Callable[..., dict[str, float]]
    evaluate: Callable[..., dict[str, float]]
    rows: str


def _pair_metrics(model: Role, pairs: Sequence[PairRow], train: TrainConfig) -> dict[str, float]:
    return pair_accuracy(model, pairs, train).metrics()


def _load(session: Session) -> Role:
    """The base model with a fresh scalar head beside its vocabulary head where Eq. 2's second term needs one."""
    config, groups = session.config, session.groups["reward"]
    folder = config.model.policy
    is_process = config.reward.labels == "steps"
    if folder and (read_shape(folder).scalar or config.reward.lm_coef == 0 or is_process):
        fresh = not read_shape(folder).scalar
        if not fresh and not is_process and config.reward.lm_coef > 0:
            session.log.say(f"{folder} has no vocabulary head: reward.lm_coef {config.reward.lm_coef} has no effect")
        return load_role(
            "reward", folder, config, groups, scalar=True, fresh_head=fresh, trained=True, eps=config.optim.eps
        )
    vocab_size = session.tokenizer.vocab_size
    return load_policy(config, groups, vocab_size, trained=True, extra_scalar_head=True, name="reward")


def plan_batches(dataset: Dataset[Any], order: Order, config: RewardConfig, num_steps: int) -> list[list[Any]]:
    """The pairs (or solutions) of every optimizer step: each takes some until their tokens reach
    reward.tokens_per_batch (P p.8).

    num_steps: 0 takes reward.epochs passes over the data.
    """
    num_pairs = len(dataset.rows)
    wanted = math.inf if num_steps else max(1, round(config.epochs * num_pairs))
    batches: list[list[Any]] = []
    position = 0
    while len(batches) < num_steps if num_steps else position < wanted:
        pairs: list[Any] = []
        tokens = 0
        while len(pairs) < config.max_pairs and (len(pairs) < config.min_pairs or tokens < config.tokens_per_batch):
            if position >= wanted:
                break
            (pair,) = dataset.take(order, position, 1)
            pairs.append(pair)
            tokens += pair.num_tokens
            position += 1
        batches.append(pairs)
    return batches


def reward_gradients(model: Role, pairs: Sequence[PairRow], config: RunConfig) -> dict[str, float]:
    """Gradients of Eq. 2 over a batch: mean of -log sigmoid(r_w - r_l), plus lm_coef times the NLL per token of the
    chosen response.

    Returns loss, ranking_loss, lm_loss and accuracy over the batch. Collective over the role's ranks.
    """
    lm_coef = 0.0 if model.shape.scalar else config.reward.lm_coef
    sequences = pair_sequences(pairs)
    rows, num_lm_tokens = _pair_rows(pairs, with_lm=lm_coef > 0)
    units = [(2 * i, 2 * i + 1) for i in range(len(pairs))]
    packs = grouped_packs(model, sequences, rows, units, config.train.tokens_per_microbatch)
    zero_gradients(model)

    def loss(hidden: Tensor, pack: Pack) -> tuple[Tensor, Tensor]:
        # Only the last token of each sequence has a score; the other rows fall into a slot that is dropped.
        slots = hidden.new_zeros(len(sequences) + 1, dtype=torch.float32)
        scores = slots.index_add(0, pack.index, model.stage.scalars(hidden))
        members = torch.tensor(pack.sequences, dtype=torch.int64).view(-1, 2).to(hidden.device, non_blocking=True)
        margins = scores[members[:, 0]] - scores[members[:, 1]]
        ranking = -logsigmoid(margins).sum() / len(pairs)
        accuracy = (margins > 0).float().sum() / len(pairs)
        if lm_coef == 0:
            return ranking, torch.stack([ranking, torch.zeros_like(ranking), accuracy])
        lm = head_cross_entropy(model, hidden, pack.labels, lm_coef / max(1, num_lm_tokens))
        return ranking + lm, torch.stack([ranking, lm / lm_coef, accuracy])

    sums = run_forward_backward(model.modules, model.groups, packs, loss, 3).tolist()
    return dict(zip(("loss", "ranking_loss", "lm_loss", "accuracy"), sums, strict=True))


def _pair_rows(pairs: Sequence[PairRow], *, with_lm: bool) -> tuple[Rows, int]:
    """Rows of the sequences (chosen, rejected, chosen, ...): the last token, and of chosen ones the tokens of the
    response.

    index: of a last token its sequence, of the others one past the last sequence.
    """
    rows, labels, index = [], [], []
    num_lm_tokens = 0
    for i, pair in enumerate(pairs):
        for side, tokens, has_lm in ((0, pair.chosen, with_lm), (1, pair.rejected, False)):
            sequence = torch.tensor(tokens, dtype=torch.int64)
            response = torch.arange(pair.prompt_length - 1, len(tokens) - 1) if has_lm else torch.arange(0)
            rows.append(torch.cat([response, torch.tensor([len(tokens) - 1])]))
            labels.append(torch.cat([sequence[response + 1], torch.tensor([-1])]))
            index.append(torch.cat([torch.full_like(response, 2 * len(pairs)), torch.tensor([2 * i + side])]))
            num_lm_tokens += response.numel()
    return Rows(rows, labels, index), num_lm_tokens


def _write_histogram(session: Session, result: PairAccuracy) -> None:
    """reward_eval.json: held-out accuracy and the differences r_w - r_l behind the histogram (Fig. 2)."""
    content = result.metrics() | {"differences": [round(float(d), 5) for d in result.differences]}
    session.log.write_json("reward_eval.json", content)
    session.log.say(f"wrote {Path(session.config.train.output) / 'reward_eval.json'}")
