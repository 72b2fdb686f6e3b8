"""Critic pre-training (P p.15-16): the policy is frozen and sampled from, the critic learns the returns of PPO's own
rewards.
"""

import math

import torch

from ppomax.engine.config import RunConfig
from ppomax.engine.data.datasets import load_prompts
from ppomax.engine.models.process_model import with_learned_delimiter
from ppomax.engine.models.roles import load_critic, load_reward_models, load_role
from ppomax.engine.ppo.experience import Models, make_experience
from ppomax.engine.ppo.rewards import RewardScaler
from ppomax.engine.ppo.statistics import rollout_statistics
from ppomax.engine.ppo.update import UpdateSettings, update
from ppomax.engine.rewards.mixture import make_mix
from ppomax.engine.session import end_step, export, open_session, restore, sample
from ppomax.engine.steps import StepCounter
from ppomax.engine.throughput import Shapes, iteration_work, phase_clock


def run(config: RunConfig) -> None:
    """Trains a critic until critic.stop_loss or train.steps rollouts; writes train.output/hf, a scalar model."""
    config = with_learned_delimiter(config, config.model.process if config.has_reward("process") else "")
    with open_session(config, "critic", tokenizer_source=config.model.policy) as session:
        prompts = load_prompts(
            config.data,
            config.data.train,
            session.template,
            max_prompt_tokens=config.data.max_length - config.sampling.max_new_tokens,
        )
        session.log.say(f"data.train: {prompts.summary()}")
        groups, ppo = session.groups, config.ppo
        policy = load_role("policy", config.model.policy, config, groups["policy"])
        reference = policy
        if config.model.reference not in ("", config.model.policy):
            reference = load_role("reference", config.model.reference, config, groups["reference"])
        reward, process = load_reward_models(config, groups["reward"])
        critic = load_critic(config, groups["critic"])
        models = Models(policy, critic, reference, reward, process)
        rewards = make_mix(config, session.template, prompts.rows)
        # There is no older critic to stay near: its own values of this rollout would only slow it down.
        settings = UpdateSettings(
            ppo.model_copy(update={"value_clip": None}), config.optim, config.train.tokens_per_microbatch
        )
        steps_per_rollout = ppo.epochs * ppo.rollout_size // ppo.minibatch_size
        counter = StepCounter(
            0, config.train.steps * steps_per_rollout, config.train.max_skipped_steps, last_good=session.saver.last_good
        )
        scaler, step, is_done = RewardScaler(), 0, False
        if session.resume:
            state = restore(session, {"critic": critic})
            step, scaler, is_done = state["step"], RewardScaler(**state["scaler"]), state.get("is_done", False)
            counter.resume(state["optimizer_step"], state.get("skipped", 0))
        order = prompts.order(config.train.seed)
        clock = phase_clock(config, session.device, session.world_size)
        own_reference = None if reference is policy else reference.shape
        shapes = Shapes(policy.shape, critic.shape, own_reference, models.judge_shapes)
        while step < config.train.steps and not is_done:
            rows = prompts.take(order, step * ppo.rollout_size, ppo.rollout_size)
            with clock.phase("rollout"):
                rollout = sample(session, policy, rows, step)
            with clock.phase("scoring"):
                experience, new_scaler = make_experience(
                    rollout,
                    models,
                    scaler,
                    kl_coef=ppo.kl_coef,
                    config=ppo,
                    tokens_per_microbatch=config.train.tokens_per_microbatch,
                    rewards=rewards,
                )
            generator = torch.Generator().manual_seed(config.train.seed * 1_000_003 + step)
            with clock.phase("update"):
                stats = update(None, critic, experience, None, settings, counter, generator)
            if not stats["skipped_rollouts"]:
                scaler = new_scaler
            step += 1
            statistics = rollout_statistics(experience)
            session.log.step(step, config.train.steps, statistics.record() | stats)
            is_done = stats.get("value_loss", math.inf) < config.critic.stop_loss
            state = {"step": step, "optimizer_step": counter.step, "skipped": counter.skipped, "is_done": is_done}
            state["scaler"] = vars(scaler)
            each = statistics.responses
            work = iteration_work(shapes, each["tokens"], each["response_length"], ppo, trains=False)
            try:
                with clock.phase("checkpoint"):
                    end_step(session, step, {"critic": critic}, state, counter)
            finally:  # also where the run stops here
                session.log.timing(step, clock.record(work))
            if is_done:
                session.log.say(
                    f"value loss {stats['value_loss']:.4g} is below critic.stop_loss {config.critic.stop_loss}"
                )
        export(session, critic, "hf")
