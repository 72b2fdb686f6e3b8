"""What `make reproduce` runs: the stages that the runs of one seed start from, and one arm for each run of the paper's
figures that is tried in small. An arm is PPO with other settings; all else is equal.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ppomax.engine.config import RunConfig
from ppomax.engine.config_file import load_config

STAGES = ("base", "sft", "reward", "critic")
"""Of one seed, in order: a language model of the sentences, answers, the annotators' preferences, a critic for the SFT
policy."""
NUM_ITERATIONS = 144
MAX_NEW_TOKENS = 40

MONITOR = (
    "monitor.window=2",
    "monitor.limits.kl=0.15",
    "monitor.limits.kl_spike=0.16",
    "monitor.limits.repetition=0.025",
    "monitor.limits.length_growth=2.0",
)
"""Settings of the monitor for this model and task, fixed on `ppo_max` with seeds 0 to 2 (docs/reproduction.md). The
default limits are of the paper's 7B model."""

_VANILLA = ("ppo.kl_coef=0", "ppo.reward_scaling=none", "ppo.reward_clip=none", "ppo.value_clip=none", "ppo.ptx_coef=0")
"""PPO without the details of Fig. 5, but for GAE, the clipped surrogate and gradient clipping."""
_KL = (*_VANILLA, "ppo.kl_coef=0.4")
"""In raw scores of the reward model. Their standard deviation is about 2 here, so that this is 0.2 in PPO-max."""
_MAX = ("ppo.kl_coef=0.2", "ppo.ptx_coef=0.1")


@dataclass(frozen=True)
class Arm:
    """settings: over those of the preset ppo_max. critic: what it starts from; policy: base or SFT model. eval_every:
    iterations from one held-out evaluation to the next.
    """

    settings: tuple[str, ...]
    critic: Literal["reward", "pretrained", "sft"] = "reward"
    policy: Literal["sft", "base"] = "sft"
    eval_every: int = 12


ARMS = {
    "vanilla": Arm(_VANILLA, eval_every=2),
    "ppo_max": Arm(_MAX, critic="pretrained"),
    "kl": Arm(_KL),
    "reward_scale": Arm((*_VANILLA, "ppo.reward_scaling=scale")),
    "reward_clip_0.3": Arm((*_VANILLA, "ppo.reward_scaling=norm", "ppo.reward_clip=0.3")),
    "reward_clip_0.8": Arm((*_VANILLA, "ppo.reward_scaling=norm", "ppo.reward_clip=0.8")),
    "advantage_clip_0.12": Arm((*_VANILLA, "ppo.advantage_norm=true", "ppo.advantage_clip=0.12")),
    "advantage_clip_0.5": Arm((*_VANILLA, "ppo.advantage_norm=true", "ppo.advantage_clip=0.5")),
    "importance_sampling": Arm((*_VANILLA, "ppo.importance_sampling=true")),
    "entropy": Arm((*_VANILLA, "ppo.entropy_coef=0.3", "ppo.entropy_target=0.6")),
    "lambda_0": Arm((*_KL, "ppo.lam=0")),
    "lambda_1": Arm((*_KL, "ppo.lam=1")),
    "kl_half": Arm((*_VANILLA, "ppo.kl_coef=0.2")),
    "kl_double": Arm((*_VANILLA, "ppo.kl_coef=0.8")),
    "vanilla_critic_pretrained": Arm(_VANILLA, critic="pretrained"),
    "ppo_max_critic_sft": Arm(_MAX, critic="sft"),
    "ppo_max_policy_base": Arm(_MAX, critic="pretrained", policy="base"),
}
"""Two of them, vanilla and ppo_max, run on all seeds; the others on those that the thresholds were fixed on."""


def stage_config(folder: Path, stage: str, seed: int) -> RunConfig:
    """One of STAGES. folder: of the seed."""
    data = folder / "data"
    shared = [*_shared(folder / stage, seed), "train.log_every=50", "optim.schedule=cosine"]
    own = {
        "base": [
            f"data.train={data}/base.jsonl",
            f"model.tokenizer={data}/tokenizer.json",
            "model.init={hidden_size=64, num_layers=2, num_heads=4, num_query_groups=4, ffn_hidden_size=128}",
            "train.batch_size=64",
            "train.steps=60",
            "optim.lr=3e-3",
        ],
        "sft": [
            f"data.train={data}/sft.jsonl",
            f"model.policy={folder}/base/hf",
            "train.batch_size=64",
            "train.steps=200",
            "optim.lr=3e-3",
        ],
        "reward": [
            f"data.train={data}/preferences_train.jsonl",
            f"data.eval={data}/preferences_held_out.jsonl",
            f"model.policy={folder}/sft/hf",
            "reward.lm_coef=0",
            "reward.max_pairs=64",
            "reward.tokens_per_batch=8192",
            "monitor.eval_size=256",
            "train.steps=200",
            "optim.lr=2e-3",
        ],
        "critic": [
            f"data.train={data}/prompts.jsonl",
            f"model.policy={folder}/sft/hf",
            f"model.reward={folder}/reward/hf",
            "train.steps=12",
            "optim.critic_lr=2e-3",
            *_ROLLOUT,
        ],
    }
    command = "sft" if stage == "base" else stage
    return load_config(None, [*shared, *own[stage]], command=command)


def arm_config(folder: Path, name: str, seed: int, *, num_iterations: int = NUM_ITERATIONS) -> RunConfig:
    """A run of an arm. folder: of the seed."""
    arm, data = ARMS[name], folder / "data"
    settings = [
        *_shared(folder / name, seed),
        f"data.train={data}/prompts.jsonl",
        f"data.eval={data}/held_out.jsonl",
        f"data.ptx={data}/sft.jsonl",
        f"model.policy={folder / arm.policy}/hf",
        f"model.reference={folder}/sft/hf",
        f"model.reward={folder}/reward/hf",
        f"ppo.critic_init={'sft' if arm.critic == 'sft' else 'reward'}",
        f"train.steps={num_iterations}",
        "train.log_every=5",
        "optim.lr=7.5e-5",
        "optim.critic_lr=1e-3",
        "optim.schedule=constant",
        f"monitor.eval_every={arm.eval_every}",
        "monitor.eval_size=192",
        "monitor.num_samples=192",
        *MONITOR,
        *_ROLLOUT,
        *arm.settings,
    ]
    if arm.critic == "pretrained":
        settings.append(f"model.critic={folder}/critic/hf")
    return load_config(None, settings, command="ppo")


_ROLLOUT = (
    "ppo.rollout_size=64",
    "ppo.minibatch_size=32",
    f"sampling.max_new_tokens={MAX_NEW_TOKENS}",
    "sampling.temperature=1.0",
    "sampling.top_p=1.0",
    "sampling.repetition_penalty=1.0",
    "sampling.batch_size=96",
)


def _shared(output: Path, seed: int) -> list[str]:
    return [
        f"train.output={output}",
        f"train.seed={seed}",
        "train.tokens_per_microbatch=8192",
        "data.max_length=96",
    ]
