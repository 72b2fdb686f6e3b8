"""Supervised fine-tuning (P p.11): cross-entropy on the assistant's turns, cosine schedule down to 10 %."""

import math

from torch import Tensor

from ppomax.engine.checkpoint import load_checkpoint, save_checkpoint
from ppomax.engine.config import RunConfig
from ppomax.engine.data.batches import Pack
from ppomax.engine.data.datasets import DialogueRow, load_dialogues
from ppomax.engine.models.roles import Role, load_policy, role_packs
from ppomax.engine.parallel.pipeline import run_forward
from ppomax.engine.ppo.scoring import head_logprobs
from ppomax.engine.session import checkpoint_folder, export, open_session
from ppomax.engine.steps import StepCounter, apply_gradients, dialogue_rows, language_model_gradients


def run(config: RunConfig) -> None:
    """Trains a language model on dialogues; writes train.output/hf."""
    with open_session(config, "sft", tokenizer_source=config.model.policy) as session:
        dataset = load_dialogues(config.data, config.data.train, session.template)
        held_out = load_dialogues(config.data, config.data.eval, session.template).rows if config.data.eval else ()
        session.log.say(f"data.train: {dataset.summary()}")
        policy = load_policy(config, session.groups["policy"], session.tokenizer.vocab_size, trained=True)
        batch_size = config.train.batch_size
        num_steps = config.train.steps or max(1, math.ceil(config.sft.epochs * len(dataset.rows) / batch_size))
        order = dataset.order(config.train.seed)
        counter = StepCounter(0, num_steps, config.train.max_skipped_steps)
        if session.resume:
            counter.step = load_checkpoint(session.resume, {"policy": policy})["step"]
            counter.last_good = str(session.resume)
        if held_out:
            session.log.evaluation(
                counter.step, {"loss": held_out_loss(policy, held_out[: config.monitor.eval_size], config)}
            )
        while counter.step < num_steps:
            rows = dataset.take(order, counter.step * batch_size, batch_size)
            loss = language_model_gradients(policy, rows, config.train.tokens_per_microbatch)
            stats = apply_gradients([(policy, config.optim.lr)], {"loss": loss}, config.optim, counter)
            session.log.step(counter.step, num_steps, stats)
            if held_out and config.monitor.eval_every and counter.step % config.monitor.eval_every == 0:
                session.log.evaluation(
                    counter.step, {"loss": held_out_loss(policy, held_out[: config.monitor.eval_size], config)}
                )
            if config.checkpoint.every and counter.step % config.checkpoint.every == 0:
                path = save_checkpoint(
                    checkpoint_folder(config),
                    counter.step,
                    {"policy": policy},
                    {"step": counter.step},
                    keep=config.checkpoint.keep,
                )
                counter.last_good = str(path)
        if held_out:
            session.log.evaluation(
                counter.step, {"loss": held_out_loss(policy, held_out[: config.monitor.eval_size], config)}
            )
        export(session, policy, "hf")


def held_out_loss(policy: Role, rows: tuple[DialogueRow, ...], config: RunConfig) -> float:
    """Mean negative log-likelihood per trained token, nats."""
    sequences, picked, count = dialogue_rows(rows)
    packs = role_packs(policy, sequences, picked, config.train.tokens_per_microbatch)

    def compute(hidden: Tensor, pack: Pack) -> Tensor:
        return head_logprobs(policy, hidden, pack.labels)[0]

    logprobs = run_forward(policy.module, policy.groups, packs, compute, count)
    return float(-logprobs.double().sum() / max(1, count)) if count else math.nan
