"""PPO-max: sample, score, update, and now and then evaluate on held-out prompts."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ppomax.engine.checkpoint_folders import step_folder
from ppomax.engine.config import RunConfig
from ppomax.engine.data.datasets import Dataset, DialogueRow, PromptRow, load_dialogues, load_prompts
from ppomax.engine.data.order import Order
from ppomax.engine.errors import CheckpointError, ConfigError, DivergedError
from ppomax.engine.models.process_model import with_learned_delimiter
from ppomax.engine.models.roles import Role, load_critic, load_reward_models, load_role
from ppomax.engine.monitor.actions import Constraint, judge
from ppomax.engine.monitor.state import MonitorState
from ppomax.engine.ppo.evaluation import evaluate_policy
from ppomax.engine.ppo.experience import Models, make_experience, make_scorer
from ppomax.engine.ppo.rewards import KlController, RewardScaler
from ppomax.engine.ppo.scoring import RolloutScorer
from ppomax.engine.ppo.statistics import rollout_statistics
from ppomax.engine.ppo.types import Rollout
from ppomax.engine.ppo.update import UpdateSettings, update
from ppomax.engine.rewards.mixture import RewardMix, make_mix
from ppomax.engine.rollout.generate import request_seeds
from ppomax.engine.rollout.long_tail import Started, first_to_end
from ppomax.engine.rollout.watch import Ended
from ppomax.engine.rollout_dump import write_rollouts
from ppomax.engine.session import (
    Session,
    checkpoint_folder,
    end_step,
    export,
    go_back,
    is_due,
    open_session,
    restore,
    rollback_to,
    sample,
    sample_held_out,
)
from ppomax.engine.steps import StepCounter, parameter_norms
from ppomax.engine.throughput import Shapes, iteration_work, phase_clock
from ppomax.engine.trace import span


@dataclass(frozen=True)
class TrainState:
    """What a resumed run needs besides weights and optimizers. Data order and noise are functions of seed and step
    alone.

    step: finished iterations. optimizer_step: steps of the learning-rate schedule. prompt_position, ptx_position:
    prompts and dialogues drawn. carried: responses that the next iteration goes on with. skipped: steps skipped in a
    row. monitor, constraint: what the detectors know, and what they have tightened.
    """

    step: int
    optimizer_step: int
    prompt_position: int
    ptx_position: int
    scaler: RewardScaler
    kl: KlController
    carried: tuple[Started, ...] = ()
    skipped: int = 0
    monitor: MonitorState = field(default_factory=MonitorState)
    constraint: Constraint = field(default_factory=Constraint)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(content: dict[str, Any]) -> "TrainState":
        missing = sorted({field.name for field in fields(TrainState)} - content.keys())
        if missing:
            raise CheckpointError(
                f"the checkpoint's state lacks {', '.join(missing)}: it was written by an earlier version of ppomax; "
                "resume it with that version"
            )
        scaler, kl = RewardScaler(**content["scaler"]), KlController(**content["kl"])
        carried = tuple(Started.from_json(one) for one in content["carried"])
        monitor, constraint = MonitorState.from_json(content["monitor"]), Constraint.from_json(content["constraint"])
        made = {"scaler": scaler, "kl": kl, "carried": carried, "monitor": monitor, "constraint": constraint}
        return TrainState(**{**content, **made})


def run(config: RunConfig) -> None:
    """Trains policy and critic; writes train.output/hf (the policy) and train.output/critic_hf."""
    for _ in iterations(config):
        pass


def iterations(config: RunConfig) -> Iterator[int]:
    """The run, which pauses after each iteration with the number of those that are finished."""
    config = with_learned_delimiter(config, config.model.process if config.has_reward("process") else "")
    with open_session(config, "ppo", tokenizer_source=config.model.policy) as session:
        ppo, train = config.ppo, config.train
        prompts = _prompts(session, config.data.train)
        held_out = _prompts(session, config.data.eval).rows[: config.monitor.eval_size] if config.data.eval else ()
        session.log.say(f"data.train: {prompts.summary()}")
        models = load_models(session)
        trace, clock = session.trace, phase_clock(config, session.device, session.world_size)
        shapes = Shapes(models.policy.shape, models.critic.shape, models.reference.shape, models.judge_shapes)
        rewards = make_mix(config, session.template, (*prompts.rows, *held_out))
        settings = UpdateSettings(ppo, config.optim, train.tokens_per_microbatch, trace)
        steps_per_iteration = ppo.epochs * ppo.rollout_size // ppo.minibatch_size
        counter = StepCounter(
            0, train.steps * steps_per_iteration, train.max_skipped_steps, last_good=session.saver.last_good
        )
        state = TrainState(0, 0, 0, 0, RewardScaler(), KlController(ppo.kl_coef))
        trained = {"policy": models.policy, "critic": models.critic}
        if session.resume:
            state = _resumed(restore(session, trained), session)
            counter.resume(state.optimizer_step, state.skipped)
            _check_carried(state, config)
        order = prompts.order(train.seed)
        ptx = PtxBatches(session) if config.data.ptx and ppo.ptx_coef > 0 else None
        if ptx is not None:
            ptx.position = state.ptx_position
        # Held from the end of one update to the end of the next rollout: what is between needs them.
        models.policy.memory.hold("weights")
        if held_out and state.step == 0:
            _evaluate(session, models, rewards, held_out, 0)
        while state.step < train.steps:
            is_early = ppo.overlap_scoring > 0
            scorer = make_scorer(models, train.tokens_per_microbatch, rewards=rewards, is_early=is_early, trace=trace)
            with span(trace, "rollout", is_here=models.policy.is_here), clock.phase("rollout"):
                rollout, sampled, state = _sample(session, models.policy, prompts, order, state, scorer)
            models.policy.memory.release("weights")
            kl_coef = state.constraint.kl_coef(state.kl.coef, config.monitor)
            with clock.phase("scoring"):
                experience, scaler = make_experience(
                    rollout,
                    models,
                    state.scaler,
                    kl_coef=kl_coef,
                    config=ppo,
                    tokens_per_microbatch=train.tokens_per_microbatch,
                    rewards=rewards,
                    scorer=scorer,
                    trace=trace,
                )
            generator = torch.Generator().manual_seed(train.seed * 1_000_003 + state.step)
            models.policy.memory.hold("weights")
            with clock.phase("update"):
                slower = settings.slowed(state.constraint.lr_factor)
                stats = update(models.policy, models.critic, experience, ptx, slower, counter, generator)
            statistics = rollout_statistics(experience)
            metrics = statistics.record() | stats | sampled
            kl = state.kl.update(metrics["kl"], ppo.rollout_size, ppo)
            if stats["skipped_rollouts"]:
                scaler, kl = state.scaler, state.kl  # nothing of it reaches them
            metrics |= {"kl_coef": kl_coef, "reward_running_std": scaler.std}
            state = replace(
                state,
                step=state.step + 1,
                optimizer_step=counter.step,
                ptx_position=ptx.position if ptx is not None else 0,
                scaler=scaler,
                kl=kl,
                skipped=counter.skipped,
            )
            if is_due(config.monitor.norms_every, state.step):
                metrics |= parameter_norms([*trained.values()])
            session.log.step(state.step, train.steps, metrics)
            if session.log.is_writer and is_due(config.monitor.rollouts_every, state.step):
                write_rollouts(session.log.folder, state.step, experience, session.tokenizer, config.monitor)
            verdict = judge(
                state.monitor,
                state.constraint,
                {**metrics, "step": state.step},
                config,
                session.log,
                responses=statistics.responses,
                rollout=rollout,
                tokenizer=session.tokenizer,
            )
            state = replace(state, monitor=verdict.state)
            if verdict.action == "raise_kl":
                state = replace(state, constraint=state.constraint.raised(config.monitor))
            elif verdict.action == "stop":
                raise _stopped(state, verdict.reason, session)
            elif verdict.action == "rollback":
                state = _roll_back(session, trained, state, counter)
                if ptx is not None:
                    ptx.position = state.ptx_position
                clock.record({})  # this time is no part of the next iteration
                continue
            if is_due(config.checkpoint.every, state.step):
                # The next record is the first one of the weights that it holds, and tells whether it is healthy.
                state = replace(state, monitor=replace(state.monitor, candidate_step=state.step))
            session.saver.protect(state.monitor.healthy_step)
            is_last = state.step == train.steps
            if held_out and (is_last or is_due(config.monitor.eval_every, state.step)):
                with clock.phase("evaluation"):
                    _evaluate(session, models, rewards, held_out, state.step)
            each = statistics.responses
            work = iteration_work(shapes, each["tokens"], each["response_length"], ppo, trains=True)
            try:
                with span(trace, "checkpoint"), clock.phase("checkpoint"):
                    end_step(session, state.step, trained, state.to_json(), counter)
            finally:  # also where the run stops here
                session.log.timing(state.step, clock.record(work))
            yield state.step
        export(session, models.policy, "hf")
        export(session, models.critic, "critic_hf")


def _sample(
    session: Session,
    policy: Role,
    prompts: Dataset[PromptRow],
    order: Order,
    state: TrainState,
    scorer: RolloutScorer,
) -> tuple[Rollout, dict[str, float], TrainState]:
    """A rollout, metrics of how it came about, and the state with what it took and left. scorer: gets what ends early,
    with ppo.overlap_scoring.
    """
    config, ppo, tokenizer = session.config, session.config.ppo, session.tokenizer
    wanted = ppo.over_sampling_size or ppo.rollout_size
    rows = prompts.take(order, state.prompt_position, max(0, wanted - len(state.carried)))
    state = replace(state, prompt_position=state.prompt_position + len(rows))
    if ppo.overlap_scoring > 0:
        watch = partial(Ended, ppo.overlap_scoring, scorer.add, tokenizer.pad_id)
        rollout = sample(session, policy, rows, state.step, watch=watch)
        return rollout, {"scored_early": scorer.num_scored / len(rows)}, state
    if ppo.over_sampling_size == 0:
        return sample(session, policy, rows, state.step), {}, state
    seeds = request_seeds(config.train.seed, state.step, len(rows)).tolist()
    new = (Started(row.tokens, seed, state.step) for row, seed in zip(rows, seeds, strict=True))
    result = first_to_end(
        policy,
        [*state.carried, *new],
        ppo.rollout_size,
        state.step,
        config.sampling,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        max_length=config.data.max_length,
    )
    carried = result.rest if ppo.partial_rollout else ()
    counts = {"responses_carried": len(carried), "responses_dropped": len(result.rest) - len(carried)}
    return result.rollout, {**result.metrics, **counts}, replace(state, carried=carried)


def _resumed(content: dict[str, Any], session: Session) -> TrainState:
    """The state of the checkpoint that a run goes on from. A fixed weight of the KL penalty is the configuration's."""
    state, config = TrainState.from_json(content), session.config
    assert session.resume is not None
    kl = KlController(config.ppo.kl_coef) if config.ppo.kl_controller == "fixed" else state.kl
    is_own = session.resume.path.parent.resolve() == Path(checkpoint_folder(config)).resolve()
    if not is_own:
        return replace(state, kl=kl, monitor=replace(state.monitor, healthy_step=None, candidate_step=None))
    state = replace(state, kl=kl)
    rollback = rollback_to(session, state.step)
    # The checkpoint is older than the rollback to it.
    return state if rollback is None else _rolled_back(state, Constraint.from_json(rollback.get("constraint")))


def _roll_back(session: Session, trained: Mapping[str, Role], state: TrainState, counter: StepCounter) -> TrainState:
    """Everything as in the last healthy checkpoint, but for a tighter constraint. Collective over all ranks."""
    assert state.monitor.healthy_step is not None
    checkpoint, content = go_back(session, state.monitor.healthy_step, trained)
    healthy = TrainState.from_json(content)
    counter.resume(healthy.optimizer_step, healthy.skipped)
    monitor = session.config.monitor
    constraint = state.constraint.after_rollback(monitor)
    session.log.say(
        f"monitor: back to {checkpoint}; from here on the weight of the KL penalty is "
        f"{constraint.kl_coef(healthy.kl.coef, monitor):.4g} and learning rates are multiplied by "
        f"{constraint.lr_factor:.4g}"
    )
    session.log.rollback(healthy.step, state.step, asdict(constraint))
    return _rolled_back(healthy, constraint)


def _rolled_back(healthy: TrainState, constraint: Constraint) -> TrainState:
    watched = replace(healthy.monitor, healthy_step=healthy.step, candidate_step=None)
    return replace(healthy, monitor=watched, constraint=constraint)


def _stopped(state: TrainState, reason: str, session: Session) -> DivergedError:
    """Of a run that the monitor stops."""
    session.saver.finish()
    step = state.monitor.healthy_step
    rolled_back = f" after {state.constraint.num_rollbacks} rollbacks" if state.constraint.num_rollbacks else ""
    path, hint = "none", "set checkpoint.every, raise ppo.kl_coef or lower optim.lr, and start anew"
    if step is not None:
        path = str(step_folder(checkpoint_folder(session.config), step))
        hint = f"resume from it (train.resume={path}, another train.output) with a larger ppo.kl_coef or lower optim.lr"
    return DivergedError(
        f"the monitor stopped the run at step {state.step}{rolled_back}: {reason}. Last healthy checkpoint: {path}; "
        f"{hint}. docs/monitor.md says what each detector looks at"
    )


def _check_carried(state: TrainState, config: RunConfig) -> None:
    if state.carried and not config.ppo.partial_rollout:
        raise ConfigError(
            f"the checkpoint holds {len(state.carried)} unfinished responses, which only ppo.partial_rollout goes on "
            "with; set it, and ppo.over_sampling_size, as in the run that wrote it"
        )


def load_models(session: Session) -> Models:
    """The roles as the configuration places them; reward and process model only where ppo.rewards has them."""
    config, groups = session.config, session.groups
    policy_folder = config.model.policy
    reward, process = load_reward_models(config, groups["reward"])
    return Models(
        policy=load_role("policy", policy_folder, config, groups["policy"], trained=True, eps=config.optim.eps),
        critic=load_critic(config, groups["critic"]),
        reference=load_role("reference", config.model.reference or policy_folder, config, groups["reference"]),
        reward=reward,
        process=process,
    )


class PtxBatches(Iterator[list[DialogueRow]]):
    """Batches of dialogues for Eq. 17, ptx_ratio per response of a minibatch; `position` is what a resume needs."""

    def __init__(self, session: Session) -> None:
        config = session.config
        self.dataset = load_dialogues(config.data, config.data.ptx, session.template)
        self.order = self.dataset.order(config.train.seed)
        self.size = max(1, round(config.ppo.ptx_ratio * config.ppo.minibatch_size))
        self.position = 0
        session.log.say(f"data.ptx: {self.dataset.summary()}")

    def __next__(self) -> list[DialogueRow]:
        rows = self.dataset.take(self.order, self.position, self.size)
        self.position += self.size
        return rows


def _prompts(session: Session, sources: Any) -> Dataset[PromptRow]:
    limit = session.config.data.max_length - session.config.sampling.max_new_tokens
    return load_prompts(session.config.data, sources, session.template, max_prompt_tokens=limit)


def _evaluate(
    session: Session, models: Models, rewards: RewardMix | None, prompts: tuple[PromptRow, ...], step: int
) -> None:
    """Held-out evaluation: a line of metrics.jsonl and samples_N.jsonl."""
    rollout = sample_held_out(session, models.policy, prompts)
    result = evaluate_policy(
        models.policy,
        models.reward,
        models.reference,
        prompts,
        rollout,
        session.config.train,
        session.template,
        process=models.process,
        rewards=rewards,
    )
    session.log.evaluation(step, result.metrics)
    session.log.write_lines(f"samples_{step:06d}.jsonl", result.samples[: session.config.monitor.num_samples])
