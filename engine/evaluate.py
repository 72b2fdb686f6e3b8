"""Evaluation of a policy on held-out prompts with a reward model: metrics, every sample, and how sure the mean reward
is, over all prompts and per category.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ppomax.engine.config import RunConfig
from ppomax.engine.data.datasets import load_prompts
from ppomax.engine.judge.intervals import LEVEL, bootstrap_mean
from ppomax.engine.models.process_model import with_learned_delimiter
from ppomax.engine.models.roles import load_reward_models, load_role
from ppomax.engine.ppo.evaluation import evaluate_policy
from ppomax.engine.rewards.mixture import make_mix
from ppomax.engine.session import open_session, sample_held_out


def run(config: RunConfig) -> None:
    """Samples a response to each prompt of data.eval and scores it; writes evaluation.json and samples.jsonl into
    train.output.
    """
    config = with_learned_delimiter(config, config.model.process if config.has_reward("process") else "")
    with open_session(config, "evaluate", tokenizer_source=config.model.policy) as session:
        limit = config.data.max_length - config.sampling.max_new_tokens
        prompts = load_prompts(config.data, config.data.eval, session.template, max_prompt_tokens=limit)
        session.log.say(f"data.eval: {prompts.summary()}")
        groups = session.groups
        policy = load_role("policy", config.model.policy, config, groups["policy"])
        reference = None
        if config.model.reference:
            reference = load_role("reference", config.model.reference, config, groups["reference"])
        reward, process = load_reward_models(config, groups["reward"])
        rows = prompts.rows[: config.monitor.eval_size]
        rewards = make_mix(config, session.template, rows)
        rollout = sample_held_out(session, policy, rows)
        result = evaluate_policy(
            policy,
            reward,
            reference,
            rows,
            rollout,
            config.train,
            session.template,
            process=process,
            rewards=rewards,
        )
        session.log.evaluation(0, result.metrics)
        intervals = reward_intervals(result.samples, seed=config.train.seed)
        session.log.write_json("evaluation.json", result.metrics | intervals)
        for name, found in {"all": intervals, **intervals["categories"]}.items():
            if found["reward_interval"] is not None:
                low, high = found["reward_interval"]
                session.log.say(
                    f"reward of {found['num_prompts']} prompts ({name}): {LEVEL:.0%} in [{low:.4g}, {high:.4g}]"
                )
        session.log.write_lines("samples.jsonl", result.samples)
        session.log.say(f"wrote evaluation.json and samples.jsonl into {config.train.output}")


def reward_intervals(samples: Sequence[dict[str, Any]], *, seed: int) -> dict[str, Any]:
    """num_prompts, and reward_interval: a seeded percentile bootstrap of the mean reward over prompts (null for one
    prompt); the same per category with its mean.
    """
    rewards = torch.tensor([sample["reward"] for sample in samples], dtype=torch.float64)
    categories = [sample.get("category", "") for sample in samples]
    found: dict[str, Any] = {
        "num_prompts": len(samples),
        "level": LEVEL,
        "reward_interval": bootstrap_mean(rewards, seed=seed),
        "categories": {},
    }
    for name in dict.fromkeys(category for category in categories if category):
        members = rewards[torch.tensor([category == name for category in categories])]
        found["categories"][name] = {
            "num_prompts": len(members),
            "reward": float(members.mean()),
            "reward_interval": bootstrap_mean(members, seed=seed),
        }
    return found
