"""Supervised fine-tuning (P p.11): cross-entropy on the assistant's turns, cosine schedule down to 10 %."""

import math
from collections.abc import Sequence

from torch import Tensor

from ppomax.engine.config import RunConfig
from ppomax.engine.data.batches import Pack
from ppomax.engine.data.datasets import DialogueRow, load_dialogues
from ppomax.engine.models.heads import head_logprobs
from ppomax.engine.models.roles import Role, load_policy, role_packs
from ppomax.engine.parallel.pipeline import run_forward
from ppomax.engine.session import end_step, export, is_due, open_session, restore
from ppomax.engine.steps import StepCounter, apply_gradients, dialogue_rows, language_model_gradients


def run(config: RunConfig) -> None:
    """Trains a language model on dialogues; writes train.output/hf."""
    with open_session(config, "sft", tokenizer_source=config.model.policy) as session:
        train = config.train
        dataset = load_dialogues(config.data, config.data.train, session.template)
        held_out = load_dialogues(config.data, config.data.eval, session.template).rows if config.data.eval else ()
        held_out = held_out[: config.monitor.eval_size]
        session.log.say(f"data.train: {dataset.summary()}")
        policy = load_policy(config, session.groups["policy"], session.tokenizer.vocab_size, trained=True)
        policy.memory.hold("weights", "gradients")  # never idle
        policy.memory.wait()
        num_steps = train.steps or max(1, math.ceil(config.sft.epochs * len(dataset.rows) / train.batch_size))
        order = dataset.order(train.seed)
        counter = StepCounter(0, num_steps, train.max_skipped_steps, last_good=session.saver.last_good)
        if session.resume:
            state = restore(session, {"policy": policy})
            counter.resume(state["step"], state.get("skipped", 0))
        while counter.step < num_steps:
            rows = dataset.take(order, counter.step * train.batch_size, train.batch_size)
            loss = language_model_gradients(policy, rows, train.tokens_per_microbatch)
            stats = apply_gradients([(policy, config.optim.lr)], {"loss": loss}, config.optim, counter)
            session.log.step(counter.step, num_steps, stats)
            is_last = counter.step == num_steps
            if held_out and (is_last or is_due(config.monitor.eval_every, counter.step)):
                loss = held_out_loss(policy, held_out, train.tokens_per_microbatch)
                session.log.evaluation(counter.step, {"loss": loss})
            state = {"step": counter.step, "skipped": counter.skipped}
            end_step(session, counter.step, {"policy": policy}, state, counter)
        export(session, policy, "hf")


def held_out_loss(policy: Role, rows: Sequence[DialogueRow], tokens_per_microbatch: int) -> float:
    """Mean negative log-likelihood per learned token, nats. Collective over the role's ranks."""
    sequences, picked, count = dialogue_rows(rows)
    packs = role_packs(policy, sequences, picked, tokens_per_microbatch)

    def compute(hidden: Tensor, pack: Pack) -> Tensor:
        return head_logprobs(policy, hidden, pack.labels)[0]

    logprobs = run_forward(policy.modules, policy.groups, packs, compute, count)
    return float(-logprobs.double().sum() / count)
