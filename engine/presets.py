"""The values that `ppo.preset` fills in where neither the file nor the command line gives one.

A preset is a table "section.field" -> value. Sources: "P p.N" is a page of the paper (arXiv 2307.04964), "script" the
released launchers train_ppo_en.sh and train_ppo_zh.sh, "code" the defaults of the released trainer, "ours" a value that
neither gives.
"""

from typing import Any

PTX_COEF = 1.0
"""Ours: the paper gives none. At 1 the language-model loss is a plain summand of the policy loss."""

# The paper's final recipe (Fig. 5's starred items, P p.12, and section 5.4, P p.16-17).
PPO_MAX: dict[str, Any] = {
    "ppo.rollout_size": 128,  # P p.11
    "ppo.minibatch_size": 32,  # P p.11
    "ppo.epochs": 1,  # P p.11: implied by four updates per rollout; code
    "ppo.kl_coef": 0.1,  # the run plotted in P Fig. 7 is the 0.1 run of P Fig. 15, although the text says 0.05
    "ppo.kl_estimator": "k1",  # code: log-ratio of the sampled token
    "ppo.kl_controller": "fixed",  # code
    "ppo.reward_scaling": "norm",  # P Eq. 18, item 5, running moments (P p.16)
    "ppo.reward_clip": 10.0,  # code's default; P p.14 only says "relaxed", P p.13 tested 0.3 and 0.8
    "ppo.advantage_norm": False,  # item 6 has no star
    "ppo.advantage_clip": None,  # item 6 has no star
    "ppo.value_clip": 0.2,  # item 7; P appendix B.1, code
    "ppo.value_coef": 1.0,  # code
    "ppo.critic_init": "reward",  # item 8; `ppomax critic` pre-trains it, model.critic names the result
    "ppo.gamma": 1.0,  # code
    "ppo.lam": 0.9,  # item 10; P p.29
    "ppo.objective": "clip",  # item 11, Eq. 15
    "ppo.policy_clip": 0.2,  # code; not stated in the paper
    "ppo.dual_clip": None,  # neither in the paper nor in the code
    "ppo.importance_sampling": False,  # item 2 has no star
    "ppo.entropy_coef": 0.0,  # item 3 has no star
    "ppo.ptx_ratio": 1.0,  # code
    "optim.lr": 5e-7,  # P p.11
    "optim.critic_lr": 1.65e-6,  # P p.11
    "optim.betas": [0.9, 0.95],  # code
    "optim.eps": 1e-6,  # code
    "optim.critic_eps": 1e-8,  # code
    "optim.weight_decay": 0.0,  # code
    "optim.grad_clip": 1.0,  # item 12; code
    "optim.joint_grad_clip": True,  # code: one optimizer for policy and critic
    "optim.schedule": "inverse_sqrt",  # code
    "optim.warmup_fraction": 0.1,  # P p.11
    "sampling.temperature": 0.8,  # P p.18
    "sampling.top_p": 0.9,  # P p.18
    "sampling.top_k": 0,  # code: no top-k
    "sampling.repetition_penalty": 1.1,  # P p.18
    "sampling.length_penalty": 1.2,  # P p.18
    "sampling.max_new_tokens": 512,  # where the length curves of P p.13 saturate; script
}

# What both released scripts share. Their sizes are per GPU on 7 GPUs: 2 responses a rollout, 2 an update.
_MOSS_SCRIPT: dict[str, Any] = {
    **PPO_MAX,
    "ppo.rollout_size": 14,  # script: num_rollouts 2 * 7 GPUs
    "ppo.minibatch_size": 14,  # script: batch_size 2 * 7 GPUs
    "ppo.reward_scaling": "scale",  # script: use_reward_scaling, without use_reward_norm
    "ppo.reward_clip": None,  # script: use_reward_clip is off
    "ppo.lam": 0.95,  # script
    "ppo.ptx_coef": 0.0,  # script: ppo_pretrain_loss_weight 0
    "optim.critic_lr": 1.5e-6,  # script
    "sampling.length_penalty": 1.0,  # code
    "optim.warmup_fraction": 0.1,  # script: warmup_steps 100 of train_steps 1000
}

PRESETS: dict[str, dict[str, Any]] = {
    "ppo_max": PPO_MAX,
    "moss_script_en": {
        **_MOSS_SCRIPT,
        "ppo.kl_coef": 0.01,  # script en
    },
    "moss_script_zh": {
        **_MOSS_SCRIPT,
        "ppo.kl_coef": 0.1,  # script zh
    },
    "none": {},
}


def preset_values(name: str, *, has_ptx_data: bool) -> dict[str, Any]:
    """The table of a preset. ppo_max turns the language-model loss (P Eq. 17) on exactly where data.ptx names data."""
    values = PRESETS[name]
    if name == "ppo_max":
        return {**values, "ppo.ptx_coef": PTX_COEF if has_ptx_data else 0.0}
    return values
