"""Evaluation of a policy on held-out prompts with a reward model: metrics, every sample, and the rewards behind a
histogram.
"""

from ppomax.engine.config import RunConfig
from ppomax.engine.data.datasets import load_prompts
from ppomax.engine.models.roles import load_reward_models, load_role
from ppomax.engine.ppo.evaluation import evaluate_policy
from ppomax.engine.rewards.mixture import make_mix
from ppomax.engine.session import open_session, sample_held_out


def run(config: RunConfig) -> None:
    """Samples a response to each prompt of data.eval and scores it; writes evaluation.json and samples.jsonl into
    train.output.
    """
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
        session.log.write_json("evaluation.json", result.metrics)
        session.log.write_lines("samples.jsonl", result.samples)
        session.log.say(f"wrote evaluation.json and samples.jsonl into {config.train.output}")
