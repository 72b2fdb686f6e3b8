"""Models, where they run and how they are trained: [model], [parallel], [optim] (config.py)."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ppomax.engine.config_section import Count, Fraction, NonNegative, Positive, Section

ROLES = ("policy", "critic", "reference", "reward")


class ArchitectureConfig(Section):
    """The shape of a model that starts from random weights (used where no folder is given to load)."""

    hidden_size: Positive = 128
    """Width of the residual stream."""
    num_layers: Positive = 4
    """Transformer layers."""
    num_heads: Positive = 4
    """Query heads."""
    num_query_groups: Positive = 2
    """Key / value heads (grouped-query attention); equal to num_heads for plain multi-head attention."""
    head_dim: Positive | None = None
    """Size of one head; unset: hidden_size / num_heads."""
    ffn_hidden_size: Positive = 384
    """Width of the gated feed-forward layer."""
    vocab_size: Positive | None = None
    """Rows of the embedding before padding for tensor parallelism; unset: the tokenizer's."""
    max_position_embeddings: Positive = 2048
    """Longest context, tokens."""
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    """Base of the rotary embedding."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    """Epsilon of RMSNorm."""
    tie_embeddings: bool = False
    """Share the embedding with the vocabulary head."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the initial weights."""


class ModelConfig(Section):
    """Where the models come from and how they compute."""

    policy: str = ""
    """Hugging Face folder that the policy starts from (the base model of `sft` and `reward`, the SFT model of `critic`
    and `ppo`). Empty: random weights of the shape in [model.init]."""
    reward: str = ""
    """Hugging Face folder of the reward model (one scalar per token). Empty: ppo.rewards must name other rewards."""
    process: str = ""
    """Hugging Face folder of the process model (one scalar per token, read at the end of each step), for a row of
    ppo.rewards of the kind process. It has the layout of the reward model, parallel.reward."""
    critic: str = ""
    """Hugging Face folder of a pre-trained critic. Empty: ppo.critic_init decides."""
    reference: str = ""
    """Hugging Face folder of the reference model. Empty: the same as model.policy; in `evaluate`: no KL is measured."""
    tokenizer: str = ""
    """Folder with tokenizer.json or tokenizer.model, or the file itself. Empty: the folder of the model."""
    init: ArchitectureConfig = ArchitectureConfig()
    """Shape of a model that starts from random weights."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of parameters and activations. bf16 keeps fp32 main weights and reduces gradients in fp32."""
    attention: Literal["auto", "flash_attn", "varlen", "c_kernel", "sdpa"] = "auto"
    """Attention kernel. auto: flash-attn when importable, else torch's variable-length attention on CUDA, our C kernel
    for fp32 on a CPU, else SDPA.
    """
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: nothing, core attention only, or whole layers."""


NO_CONTEXT_PARALLELISM = (
    "there is no context parallelism: every sequence is whole on its replica (Megatron-core has it inside "
    'TransformerEngine\'s attention only); remove cp. For long sequences set model.recompute = "full" (memory is then '
    "linear in the tokens of a pack), train.tokens_per_microbatch to about data.max_length, and where that is not "
    "enough parallel.tp > 1 with parallel.sequence_parallel = true, which splits what recomputation keeps"
)


class RoleLayout(Section):
    """How one role is spread over ranks."""

    tp: Positive = 1
    """Tensor-parallel size."""
    pp: Positive = 1
    """Pipeline-parallel size."""
    vpp: Positive = 1
    """Model chunks per pipeline rank, run in Megatron's interleaved schedule: smaller bubbles, more communication.
    1: plain 1F1B. More needs pp > 1 and a number of layers that pp * vpp divides."""
    first_rank: Count = 0
    """The role lives on consecutive ranks of the run, from this one on."""
    num_ranks: Positive | None = None
    """How many they are; unset: all that follow. Roles on ranks of their own work at the same time."""
    first_stage_layers: Positive | None = None
    """Layers of the first pipeline stage, which holds the embedding too; the stages without a number of their own share
    the rest evenly. Unset: as many as they. With vpp a multiple of it."""
    last_stage_layers: Positive | None = None
    """The same of the last pipeline stage, which holds the head and computes the losses."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What waits in (pinned) host memory while the role does not use it. optimizer: main weights and moments, outside
    of optimizer steps; all: weights and gradients too, while other roles are at work. It changes nothing but memory and
    time."""

    @model_validator(mode="before")
    @classmethod
    def _no_context_parallelism(cls, data: Any) -> Any:
        if isinstance(data, dict) and "cp" in data:
            raise ValueError(f"parallel.ROLE.cp = {data['cp']}: {NO_CONTEXT_PARALLELISM}")
        return data

    @property
    def is_everywhere(self) -> bool:
        """Whether the role takes all ranks, however many there are."""
        return self.first_rank == 0 and self.num_ranks is None


class ParallelConfig(Section):
    """Layouts of the four roles. `parallel.tp=2` sets all four, `parallel.critic.tp=1` one; so do the other keys.

    A role takes all ranks of the run unless first_rank and num_ranks say otherwise; its replicas are what remains:
    dp = ranks of the role / (tp * pp).
    """

    policy: RoleLayout = RoleLayout()
    """Layout of the policy."""
    critic: RoleLayout = RoleLayout()
    """Layout of the critic."""
    reference: RoleLayout = RoleLayout()
    """Layout of the reference model."""
    reward: RoleLayout = RoleLayout()
    """Layout of the reward model."""
    sequence_parallel: bool = False
    """Split activations between the tensor-parallel regions along the sequence (no effect at tp = 1)."""
    timeout_seconds: Positive = 600
    """A collective that takes longer fails on every rank."""
    check_memory: bool = True
    """On CUDA, end a run before it allocates anything where its plan exceeds the GPU's memory (exit code 3)."""

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if "cp" in data:
            raise ValueError(f"parallel.cp = {data['cp']}: {NO_CONTEXT_PARALLELISM}")
        return expand_roles(data)

    @model_validator(mode="after")
    def _combinations(self) -> "ParallelConfig":
        for role in ROLES:
            layout: RoleLayout = getattr(self, role)
            if layout.vpp > 1 and layout.pp == 1:
                raise ValueError(
                    f"parallel.{role}: vpp {layout.vpp} with pp 1, but model chunks take turns over pipeline stages; "
                    f"set parallel.{role}.pp to 2 or more, or parallel.{role}.vpp = 1"
                )
            if layout.pp == 1 and (layout.first_stage_layers or layout.last_stage_layers):
                raise ValueError(
                    f"parallel.{role}: first_stage_layers or last_stage_layers is set with pp 1, which has one stage "
                    f"with all layers; set parallel.{role}.pp to 2 or more, or them to none"
                )
        return self


def expand_roles(parallel: dict[str, Any]) -> dict[str, Any]:
    """[parallel] with tp, pp and what else a role has, where given for the whole section, moved into every role that
    does not set its own.
    """
    expanded = {key: value for key, value in parallel.items() if key not in RoleLayout.model_fields}
    shared = {key: parallel[key] for key in RoleLayout.model_fields if key in parallel}
    for role in ROLES if shared else ():
        own = parallel.get(role, {})
        if isinstance(own, RoleLayout):
            own = own.model_dump()
        expanded[role] = {**shared, **own} if isinstance(own, dict) else own
    return expanded


class OptimConfig(Section):
    """AdamW, learning-rate schedule and gradient clipping."""

    lr: NonNegative = 5e-7
    """Peak learning rate of the policy (and of the one model of `sft` and `reward`). Source: 5e-7 policy, P p.11."""
    critic_lr: NonNegative = 1.65e-6
    """Peak learning rate of the critic. Source: 1.65e-6, P p.11; the released code has 1.5e-6."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Adam's decay rates. Source: released code."""
    eps: Annotated[float, Field(gt=0)] = 1e-6
    """Adam's epsilon. Source: released code (policy)."""
    critic_eps: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's epsilon of the critic. Source: released code."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay of matrices. Source: 0, released code."""
    grad_clip: NonNegative = 1.0
    """Largest global L2 norm of the gradient; 0 turns clipping off. Source: 1.0, released code."""
    joint_grad_clip: bool = True
    """Clip policy and critic by their joint norm, as the released code does; false: each by its own."""
    schedule: Literal["inverse_sqrt", "cosine", "constant"] = "inverse_sqrt"
    """Decay after the warm-up. Source: inverse_sqrt, released code; cosine for SFT, P p.11."""
    warmup_fraction: Fraction = 0.1
    """Warm-up as a fraction of all optimizer steps. Source: P p.11."""
    warmup_steps: Count | None = None
    """Warm-up in optimizer steps; overrides warmup_fraction."""
    min_lr_ratio: Fraction = 0.1
    """The cosine schedule ends at this fraction of the peak. Source: 10 %, P p.11."""
