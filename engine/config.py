"""Every setting of a run: one strict, frozen tree, checked before any process group exists.

This file holds the fields and what can be checked from them alone. `config_file.py` reads TOML, applies presets and
overrides, and turns pydantic's complaints into `ConfigError`s. A function takes the section it needs, not the tree.
Fields named "source" give where the paper (arXiv 2307.04964, "P p.N") or its released code sets the value.
"""

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]

MIN_TEMPERATURE = 1e-4
"""Of kernels/sampling.py, which refuses what is colder."""

ROLES = ("policy", "critic", "reference", "reward")


class Section(BaseModel):
    """One [section] of the file: frozen, no unknown keys, docstrings become the help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


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


class DataSource(Section):
    """One file, folder or `datasets` name, with its share in a mixture."""

    path: str
    """File (.jsonl, .json, .jsonl.gz, .json.gz), or `datasets:NAME[:SPLIT]`."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the rows drawn from this source, relative to the others."""
    category: str = ""
    """Category of its rows, by which evaluations are split: helpful, harmless, ... A row's own "category" wins."""
    format: Literal["auto", "hh", "dialogues", "pairs", "prompts", "sft", "steps"] = "auto"
    """hh: {"chosen": "\\n\\nHuman: ...", "rejected": ...}; dialogues: JSON list of lists of turns (released prompts and
    SFT data); pairs: JSON list of {"chosen": [turns], "rejected": [turns]} (released preference data);
    prompts: {"prompt": ...} per line, perhaps with "answer"; sft: {"messages": [{"role", "content"}]} per line;
    steps: {"prompt", "steps", "labels"} or a row of PRM800K; auto: by the first row."""


class DataConfig(Section):
    """What a stage reads and how text becomes tokens."""

    train: tuple[DataSource, ...] = ()
    """Training rows of the stage: dialogues for sft, pairs for reward, prompts for critic and ppo.
    A string is short for {path = ...}."""
    eval: tuple[DataSource, ...] = ()
    """Held-out rows of the same kind."""
    ptx: tuple[DataSource, ...] = ()
    """Dialogues of the language-model loss mixed into PPO (ppo.ptx_coef)."""
    template: Literal["paper_en", "paper_zh", "chat_template"] = "paper_en"
    """Prompt template. Source: released code; chat_template takes the tokenizer's own."""
    system_prompt: str = ""
    """Text put before the first turn."""
    max_length: Positive = 2048
    """Longest prompt + response, tokens; older turns are dropped first. Source: 2048, P p.18."""
    step_delimiter: Annotated[str, Field(min_length=1)] = "\n\n"
    """Ends a step of a response, for step labels and rewards per step; the end of a response ends its last step.
    Where it is not set and a process model is used or trained further, that model's own. Source: ours; a blank line
    separates the paragraphs of a solution."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A bad row ends the run (error), or is left out, counted and listed (skip)."""

    @model_validator(mode="before")
    @classmethod
    def _paths(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        for key in ("train", "eval", "ptx"):
            value = data.get(key)
            if isinstance(value, str | dict):
                value = [value]
            if isinstance(value, list | tuple):
                data[key] = tuple({"path": item} if isinstance(item, str) else item for item in value)
        return data


class SamplingConfig(Section):
    """How responses are sampled."""

    backend: Literal["embedded", "vllm"] = "embedded"
    """What samples in critic, ppo and evaluate. embedded: the engine's own generator, on the weights that are trained;
    vllm: vLLM in the same processes, with a copy of the weights (ppomax[vllm])."""
    temperature: NonNegative = 0.8
    """Logits are divided by this, at least 1e-4; 0 is greedy. Source: 0.8, P p.18."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Nucleus: smallest set of tokens with at least this probability. Source: 0.9, P p.18."""
    top_k: Count = 0
    """Keep the k most likely tokens; 0 keeps all."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.1
    """Penalty on tokens generated so far (not the prompt), once per distinct token. Source: 1.1, P p.18."""
    length_penalty: NonNegative = 1.2
    """Exponent of the length in a response's score, sum of log-probs / tokens ^ length_penalty, by which evaluations
    choose among monitor.eval_best_of responses (with one there is no choice), and which `generate` reports; the larger
    it is, the better long responses do. Source: 1.2, P p.18."""
    max_new_tokens: Positive = 512
    """Longest response, tokens. Source: 512 (length curves, P p.13)."""
    min_new_tokens: Count = 0
    """EOS is not drawn, and stop sequences do not count, before the response has this many tokens."""
    batch_size: Positive = 64
    """Responses decoded at the same time on one replica."""
    tokens_per_step: Positive = 8192
    """Tokens that one step of generation runs through the model: those of running responses, then pieces of prompts."""
    page_size: Positive = 32
    """Tokens per page of the key / value cache. With multiples of 256, flash-attn, where it is installed, attends in
    decoding steps (on CUDA, bf16)."""
    cache_gib: NonNegative = 0.0
    """Memory of the key / value cache per GPU, GiB. 0: what the requests can need; on a GPU at most half of what is
    free when generation starts."""
    steps_ahead: Count | None = None
    """Steps that may be launched before the host has read the tokens of an earlier one; what is drawn beyond an end is
    dropped. Unset: 2 on a GPU, which then does not wait for the host, and 0 on a CPU."""
    cuda_graphs: bool = True
    """Replay decoding steps as CUDA graphs, one for each of some batch sizes (no effect on a CPU)."""

    @model_validator(mode="after")
    def _temperature_is_zero_or_enough(self) -> "SamplingConfig":
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(
                f"sampling.temperature = {self.temperature}: expected at least {MIN_TEMPERATURE}, or 0; set it to 0, "
                "which takes the likeliest token"
            )
        return self


class SftConfig(Section):
    """Supervised fine-tuning."""

    epochs: NonNegative = 2.0
    """Passes over the data when train.steps is 0. Source: 2, P p.11."""


class RewardConfig(Section):
    """Reward-model training."""

    labels: Literal["pairs", "steps"] = "pairs"
    """What data.train holds. pairs: preference pairs, Eq. 1 and 2; steps: solutions with a label per step, from which a
    process model learns (binary cross-entropy at the end of each step). Source: pairs, P p.4; steps is ours."""
    lm_coef: NonNegative = 1.0
    """Weight of the language-model loss on the chosen response, Eq. 2; no effect on process models. Source:
    beta_rm = 1, P p.9; 0 in the released script."""
    min_pairs: Positive = 4
    """Fewest pairs (with reward.labels = "steps", solutions) of a dynamic batch. Source: 4, P p.8."""
    max_pairs: Positive = 128
    """Most pairs (or solutions) of a dynamic batch. Source: 128, P p.8."""
    tokens_per_batch: Positive = 32768
    """A dynamic batch takes pairs (or solutions) until their tokens reach this number."""
    epochs: NonNegative = 1.0
    """Passes over the data when train.steps is 0. Source: about 1, P p.8."""


class CriticConfig(Section):
    """Critic pre-training (P p.15-16): the policy is frozen, only the value loss is trained."""

    stop_loss: NonNegative = 0.0
    """Stop when the value loss of one rollout falls below this; 0: run all train.steps."""


class RewardSource(Section):
    """One summand of the reward: its kind, its weight, and what its kind needs."""

    kind: Literal["model", "process", "math", "regex", "length", "function", "http"]
    """model: the reward model's score; process: the process model's judgement of each step; math: 1 where the response
    ends with the row's "answer", else 0; regex: 1 where pattern is found, else 0; length: minus the tokens by which the
    response is shorter or longer than it may be; function: your own Python function; http: a service."""
    name: Annotated[str, Field(pattern="^[A-Za-z0-9_]*$")] = ""
    """Its metric is reward/NAME; empty: the kind. Two rows may not share a name."""
    weight: float = 1.0
    """Factor of its values in the sum; 0 only measures."""
    per_step: bool = False
    """regex, function and http: a value for each step, given at its last token, instead of one for the response."""
    pattern: str = ""
    """regex: Python's `re.search`, with dots that match line ends."""
    min_tokens: Count = 0
    """length: the shortest response without penalty, tokens with EOS."""
    max_tokens: Count = 0
    """length: the longest response without penalty, tokens with EOS; 0: any."""
    path: str = ""
    """function: "module:function", imported from the current folder or the environment. It runs as part of the run."""
    url: str = ""
    """http: where responses are sent to, http:// or https://."""
    key_variable: str = ""
    """http: the environment variable with the key, sent as bearer token; empty: none."""
    batch_size: Positive = 32
    """http: responses in one request."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 30.0
    """http: seconds for one whole request and its answer."""
    retries: Count = 3
    """http: further tries after a lost connection, a timeout, or status 429 or 5xx."""

    @property
    def label(self) -> str:
        return self.name or self.kind

    @property
    def is_per_step(self) -> bool:
        return self.per_step or self.kind == "process"

    @model_validator(mode="after")
    def _fits_its_kind(self) -> "RewardSource":
        row = f"the row {self.label!r} of ppo.rewards"
        owners = {
            "per_step": ("regex", "function", "http"),
            "pattern": ("regex",),
            **dict.fromkeys(("min_tokens", "max_tokens"), ("length",)),
            "path": ("function",),
            **dict.fromkeys(("url", "key_variable", "batch_size", "timeout_seconds", "retries"), ("http",)),
        }
        for field, kinds in owners.items():
            if self.kind not in kinds and getattr(self, field) != type(self).model_fields[field].default:
                raise ValueError(f"{row} sets {field}, which {self.kind} does not have; it is for {', '.join(kinds)}")
        needed = {"regex": "pattern", "function": "path", "http": "url"}.get(self.kind)
        if needed and not getattr(self, needed):
            raise ValueError(f"{row} needs {needed} (`ppomax help ppo` says what for)")
        if self.kind == "length" and self.min_tokens == self.max_tokens == 0:
            raise ValueError(f"{row} needs min_tokens or max_tokens: without them no response is too short or too long")
        if 0 < self.max_tokens < self.min_tokens:
            raise ValueError(f"{row}: min_tokens {self.min_tokens} is larger than max_tokens {self.max_tokens}")
        _check_texts(row, self)
        return self


def _check_texts(row: str, source: RewardSource) -> None:
    try:
        re.compile(source.pattern)
    except re.error as error:
        raise ValueError(f"{row}: pattern {source.pattern!r} is no regular expression: {error}") from None
    if source.path and not re.fullmatch(r"[\w.]+:\w+", source.path):
        raise ValueError(f"{row}: path {source.path!r}; expected module:function, for instance my_rewards:brevity")
    if not source.url:
        return
    parts = urlsplit(source.url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError(f"{row}: url {source.url!r}; expected http://HOST[:PORT]/PATH or https://...")
    if "@" in parts.netloc:
        raise ValueError(
            f"{row}: url holds a password; put it into an environment variable and name that as key_variable"
        )


class PpoConfig(Section):
    """PPO-max and its variants; every detail of the paper's Fig. 5 is a switch."""

    preset: Literal["ppo_max", "moss_script_en", "moss_script_zh", "none"] = "ppo_max"
    """Fills what the file leaves unset. ppo_max: the paper's settings; moss_script_*: the released scripts'."""
    rollout_size: Positive = 128
    """Responses sampled per iteration, over all replicas. Source: 128, P p.11."""
    over_sampling_size: Count = 0
    """Responses under way in an iteration of `ppo`, over all replicas: the first rollout_size of them to end (by the
    tokens drawn for them in this iteration) are taken, and the long ones do not hold it up. More than rollout_size; 0
    turns it off. What is not taken is dropped: long responses are learned from less often than they are sampled."""
    partial_rollout: bool = False
    """Responses that ppo.over_sampling_size leaves unfinished are carried to the next iteration and go on under its
    weights, instead of being dropped. Their first tokens keep the log-probs of the weights that drew them: see
    ppo.rollout_correction. sampling.max_new_tokens counts a response over all iterations. Source: off, ours."""
    overlap_scoring: Count = 0
    """Reward model, reference and critic of `ppo` score responses that have ended, at least this many at a time, while
    others are still being sampled. 0: all of them afterwards. It changes nothing but the time."""
    minibatch_size: Positive = 32
    """Responses per optimizer step, over all replicas. Source: 32, P p.11."""
    epochs: Positive = 1
    """Passes over one rollout. Source: 1, P p.11."""
    kl_coef: NonNegative = 0.1
    """Weight of the token-level KL penalty, Eq. 19. Source: 0.1 (the plotted run of Fig. 7)."""
    kl_estimator: Literal["k1", "k2", "k3", "full"] = "k1"
    """KL(policy || reference) per token: from the sampled token (k1, k2, k3) or both whole distributions (full).
    Source: k1, released code."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """adaptive: kl_coef follows kl_target (Ziegler et al. 2019)."""
    kl_target: Annotated[float, Field(gt=0)] = 0.05
    """Mean k1 KL per token, nats, that the adaptive controller steers to."""
    kl_horizon: Positive = 10000
    """Responses after which the adaptive controller has corrected fully."""
    rewards: tuple[RewardSource, ...] = ()
    """What is summed to the reward; also that of `critic` and `evaluate`. Empty: the reward model alone. In a file each
    is a table [[ppo.rewards]]. Source: the reward model alone, P p.4; the rest is ours."""
    reward_scaling: Literal["none", "scale", "norm"] = "norm"
    """scale: scores / running std (Fig. 5 item 4); norm: (scores - running mean) / running std (item 5, Eq. 18)."""
    reward_clip: Annotated[float, Field(gt=0)] | None = 10.0
    """Scaled scores, and scaled rewards of steps, are clipped to +- this. Source: 10, default of the released code; the
    paper gives none."""
    advantage_norm: bool = False
    """Whiten the advantages of each minibatch over all replicas (item 6). Source: off in PPO-max."""
    advantage_clip: Annotated[float, Field(gt=0)] | None = None
    """Clip advantages (after advantage_norm) to +- this (item 6)."""
    value_clip: Annotated[float, Field(gt=0)] | None = 0.2
    """Clip new values to old values +- this in the value loss (item 7). Source: 0.2."""
    value_coef: NonNegative = 1.0
    """Weight of the value loss. Source: 1, released code."""
    critic_init: Literal["reward", "sft"] = "reward"
    """Critic from the reward model, or from the SFT model with a fresh head (item 8), where model.critic is empty."""
    gamma: Fraction = 1.0
    """Discount. Source: 1, released code."""
    lam: Fraction = 0.9
    """GAE lambda (item 10). Source: 0.9, P p.29."""
    objective: Literal["clip", "penalty"] = "clip"
    """clip: Eq. 15 (item 11); penalty: Eq. 14."""
    policy_clip: Annotated[float, Field(gt=0)] | tuple[float, float] | None = 0.2
    """Ratio clip: one number, (low, high), or unset ("none" in the file) for no clip. Source: 0.2, released code."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound of the loss for negative advantages, in units of the advantage."""
    penalty_beta: NonNegative = 0.1
    """Weight of KL(old policy || policy) in Eq. 14 (objective = "penalty")."""
    importance_sampling: bool = False
    """Ratio against the reference instead of the rollout policy (item 2)."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus (item 3). Source: 0 in PPO-max; 0.01 in Fig. 16."""
    entropy_target: Annotated[float, Field(gt=0)] | None = None
    """Thresholded bonus coef * |mean entropy - target|, nats; unset: plain bonus."""
    ptx_coef: NonNegative = 0.0
    """Weight of the language-model loss on data.ptx, Eq. 17."""
    ptx_ratio: Annotated[float, Field(gt=0)] = 1.0
    """ptx dialogues per response of a minibatch. Source: 1, released code."""
    target_kl: Annotated[float, Field(gt=0)] | None = None
    """Leave the epochs of a rollout when the k3 KL from the rollout policy exceeds this."""
    no_eos_penalty: NonNegative = 0.0
    """Subtracted from the scaled score of a response without EOS."""
    mask_no_eos: bool = False
    """Leave responses without EOS out of both losses."""
    old_logprobs: Literal["recompute", "rollout"] = "recompute"
    """Old log-probs from a forward pass of the trainer, or from the sampler's T = 1 logits."""
    rollout_correction: Literal["none", "truncated"] = "none"
    """truncated: each token's policy loss is weighted by min(pi_trainer / pi_sampler, rollout_correction_cap), both at
    T = 1 and before the update. It corrects a sampler whose numbers differ from the trainer's (vLLM, bf16), neither
    temperature nor top-p, and leaves the KL penalty alone."""
    rollout_correction_cap: Annotated[float, Field(gt=0)] = 2.0
    """Largest weight of ppo.rollout_correction."""

    @model_validator(mode="after")
    def _combinations(self) -> "PpoConfig":
        if self.rollout_size % self.minibatch_size:
            raise ValueError(
                f"ppo.rollout_size {self.rollout_size} is not a multiple of ppo.minibatch_size {self.minibatch_size}; "
                f"set ppo.minibatch_size to a divisor of {self.rollout_size}"
            )
        labels = [source.label for source in self.rewards]
        if len(set(labels)) < len(labels):
            raise ValueError(f"ppo.rewards has the names {labels}: two are the same; give each row a name of its own")
        for kind in ("model", "process"):
            if sum(source.kind == kind for source in self.rewards) > 1:
                raise ValueError(
                    f"ppo.rewards has two rows of the kind {kind}, but there is one such model; remove one"
                )
        if 0 < self.over_sampling_size <= self.rollout_size:
            raise ValueError(
                f"ppo.over_sampling_size {self.over_sampling_size} is not larger than ppo.rollout_size "
                f"{self.rollout_size}: no response could be left over; raise it, or set it to 0 (off)"
            )
        if self.partial_rollout and self.over_sampling_size == 0:
            raise ValueError(
                "ppo.partial_rollout is set but ppo.over_sampling_size is 0: no response is left unfinished; "
                f"set it to more than ppo.rollout_size {self.rollout_size}"
            )
        if self.overlap_scoring >= self.rollout_size:
            raise ValueError(
                f"ppo.overlap_scoring {self.overlap_scoring} is not smaller than ppo.rollout_size {self.rollout_size}: "
                "nothing would be scored early; lower it, or set it to 0 (off)"
            )
        if self.overlap_scoring and self.over_sampling_size:
            raise ValueError(
                "ppo.overlap_scoring and ppo.over_sampling_size are both set: which responses are taken is known only "
                "when the last of them has ended; set one of them to 0"
            )
        if isinstance(self.policy_clip, tuple) and min(self.policy_clip) <= 0:
            raise ValueError(f"ppo.policy_clip {self.policy_clip}: expected two positive numbers (low, high)")
        if self.rollout_correction != "none" and self.old_logprobs == "rollout":
            raise ValueError(
                f'ppo.rollout_correction is "{self.rollout_correction}" but ppo.old_logprobs = "rollout" leaves '
                'nothing to compare the sampler with; set ppo.old_logprobs = "recompute"'
            )
        if self.entropy_target is not None and self.entropy_coef == 0:
            raise ValueError("ppo.entropy_target is set but ppo.entropy_coef is 0; set it (0.01 in Fig. 16)")
        return self


class CheckpointConfig(Section):
    """Checkpoints of a running stage."""

    every: Count = 0
    """Save after every this many steps; 0: only the final Hugging Face folder."""
    keep: Positive = 2
    """Newest checkpoints kept."""
    keep_every: Count = 0
    """Checkpoints of steps that this divides are kept for ever; 0: none."""
    keep_best: Count = 0
    """Checkpoints kept besides for their held-out evaluation, made at their step (monitor.eval_every): lowest loss in
    `sft`, highest accuracy in `reward`, highest reward in `ppo`."""
    hf: bool = False
    """Write each trained role as a Hugging Face folder too, `step_N/hf/ROLE`. Training waits for it to be written."""
    asynchronous: bool = True
    """Write in a process beside each rank: training waits for a copy in host memory (as large as the rank's share of
    the checkpoint), not for the disk."""


Share = Annotated[float, Field(gt=0, lt=1)]
Growth = Annotated[float, Field(gt=1)]


class MonitorLimits(Section):
    """Where the detectors of `ppo` sound an alarm. The paper's numbers are of a 7B model: a small one moves further in
    a healthy run, above all its KL. docs/monitor.md has the calibration."""

    length_growth: Growth = 2.0
    """length_drift: mean response length over that of the first records. Source: healthy runs of Fig. 7 to 9 reach
    1.7 times their start."""
    length_share: Share = 0.4
    """length_drift: and at least this share of sampling.max_new_tokens. Source: 0.4 of 512, above Fig. 7's peak."""
    truncated: Share = 0.5
    """length_saturation: share of responses without EOS, and its rise over the first records. Source: goes to 1 within
    60 steps in Fig. 4."""
    saturation_share: Share = 0.95
    """length_saturation, for records without the share: mean length over sampling.max_new_tokens."""
    finished: Share = 0.02
    """dead_eos: share of responses that end by EOS falls to this. Source: 0 in Fig. 4."""
    length_shrink: Share = 0.3
    """length_collapse: mean response length over that of the first records. Source: to one token in Fig. 8."""
    kl: Annotated[float, Field(gt=0)] = 0.08
    """kl_runaway: mean k1 KL, nats per token. Source: healthy runs peak at 0.058 (Fig. 9), collapsed ones reach 0.1 to
    0.26."""
    kl_spike: Annotated[float, Field(gt=0)] = 0.5
    """kl_spike: the same of one record. Source: 0.93 in Fig. 16, 7 in Fig. 8."""
    nll_ratio: Share = 0.45
    """perplexity_collapse: log of the response perplexity over that of the first records. Source: 0.35 to 0.5 after
    collapse in Fig. 4 and 6, 0.65 at least in healthy runs."""
    paper_perplexity_ratio: Share = 0.15
    """paper_perplexity: log of the paper's perplexity metric over that of the first records. Source: 1.0025 from
    1.0168, its criterion in Fig. 17 to 19."""
    entropy_ratio: Share = 0.3
    """entropy_collapse: entropy over that of the first records. Ours: the paper plots none."""
    repetition: Share = 0.25
    """repetition: fall of distinct_4, the share of 4-grams of a response that are distinct. Ours."""
    value_loss_growth: Growth = 4.0
    """value_divergence: value loss over the least so far. Source: 0.11 to 0.55 in Fig. 4."""
    explained_variance: float = 0.2
    """value_divergence: no alarm while the critic explains more than this share of the returns' variance. Ours."""
    reward_std_growth: Growth = 2.0
    """reward_flattening: standard deviation of the scores over that of the first records. Source: "several-fold",
    Fig. 13."""
    reward_rise: Annotated[float, Field(gt=0)] = 2.0
    """reward_flattening: and rise of the mean score, in standard deviations of the first records. Ours."""


Action = Literal["off", "warn", "raise_kl", "stop", "rollback"]


class DetectorActions(Section):
    """What a single detector does, where that is not monitor.action."""

    length_drift: Action | None = None
    """Responses grow longer and longer."""
    length_saturation: Action | None = None
    """Responses run into the length limit."""
    dead_eos: Action | None = None
    """Responses do not end any more."""
    length_collapse: Action | None = None
    """Responses shrink to nothing."""
    kl_runaway: Action | None = None
    """The policy runs away from the reference."""
    kl_spike: Action | None = None
    """The policy jumps away from the reference."""
    perplexity_collapse: Action | None = None
    """The policy grows certain of every token."""
    paper_perplexity: Action | None = None
    """The paper's perplexity metric falls to 1."""
    entropy_collapse: Action | None = None
    """The policy's entropy is used up."""
    repetition: Action | None = None
    """Responses repeat themselves."""
    value_divergence: Action | None = None
    """The critic has lost the returns."""
    reward_flattening: Action | None = None
    """Rewards jump and their distribution flattens."""


class MonitorConfig(Section):
    """What is measured and shown, evaluations on held-out data, and what happens where a policy collapses."""

    action: Action = "warn"
    """What `ppo` does at an alarm. warn: an event in metrics.jsonl and a line; raise_kl: a larger weight of the KL
    penalty as well; stop: ends the run (exit code 6); rollback: goes back to the last healthy checkpoint and on with a
    larger weight of the KL penalty and a lower learning rate; off: nothing."""
    actions: DetectorActions = DetectorActions()
    """Other actions for single detectors."""
    limits: MonitorLimits = MonitorLimits()
    """Where the detectors sound an alarm."""
    baseline: Positive = 4
    """Records at the start of a run that the detectors compare with. Ours."""
    window: Positive = 3
    """Records over which metrics are averaged before the detectors see them. Ours."""
    confirm: Positive = 2
    """Records in a row that must be beyond a limit before the alarm, and as many below 0.8 of it before it can sound
    anew. Ours: a healthy run of Fig. 9 touches a KL of 0.058."""
    patience: Positive = 10
    """Records after which an alarm whose signal has stayed beyond its limit sounds again. Ours."""
    kl_factor: Annotated[float, Field(ge=1)] = 2.0
    """raise_kl and rollback multiply ppo.kl_coef by this each time. Ours; the paper compares 0.05, 0.1 and 0.2."""
    min_kl_coef: NonNegative = 0.05
    """And raise it to at least this. Source: the least that the paper tries (Fig. 15)."""
    max_kl_coef: NonNegative = 1.0
    """And to no more than this. Ours."""
    lr_factor: Annotated[float, Field(gt=0, le=1)] = 0.5
    """A rollback multiplies both learning rates by this. Ours."""
    max_rollbacks: Count = 2
    """Rollbacks of one run; the alarm after the last one ends it (exit code 6). Ours."""
    event_samples: Count = 3
    """Responses, with their text, that an event in metrics.jsonl shows."""
    eval_every: Count = 0
    """Evaluate on data.eval after every this many steps; 0: only at the end, and in `ppo` before the first step too."""
    eval_size: Positive = 128
    """Held-out rows used by one evaluation (the first ones of data.eval)."""
    eval_best_of: Positive = 1
    """Responses sampled for each held-out prompt by `evaluate` and the evaluations of `ppo`; the one with the best
    score (sampling.length_penalty) is evaluated. Source: 1, P p.17."""
    num_samples: Count = 8
    """Dialogues written out by an evaluation of `ppo`; `evaluate` writes all."""
    norms_every: Count = 10
    """`ppo` measures the norms of policy and critic weights after every this many iterations; 0: never."""
    tensorboard: bool = False
    """Metrics go to train.output/tensorboard as well (needs the package tensorboard)."""
    wandb: str = ""
    """Project of Weights & Biases that metrics go to as well (needs the package wandb, which takes its key and mode
    from the environment or its own login: WANDB_MODE=offline needs no network). Empty: none."""
    live: bool = False
    """A live view of the newest numbers instead of a line per step, where the first rank's output is a terminal."""
    trace: bool = False
    """`ppo` writes traces/rank_N.json: when each rank sampled, scored and trained which role, for chrome://tracing or
    ui.perfetto.dev. A GPU is waited for at the end of each span."""
    rollouts_every: Count = 0
    """`ppo` writes responses of every this many iterations, with the numbers of each token, to rollouts/step_N.jsonl;
    0: none. `ppomax report` shows them."""
    rollouts_size: Positive = 16
    """Responses written: the first ones of the rollout."""
    rollouts_format: Literal["jsonl", "parquet"] = "jsonl"
    """Parquet needs pyarrow."""


class TrainConfig(Section):
    """The run itself."""

    output: str = "runs/run"
    """Run folder: config.toml, versions.json, plan.json, metrics.jsonl, checkpoints and the final hf/ folder."""
    steps: Count = 0
    """Optimizer steps of sft and reward (0: from their epochs), PPO iterations (rollouts) of critic and ppo."""
    batch_size: Positive = 32
    """Dialogues per optimizer step of sft, over all replicas. Source: 1024, P p.11 (7B)."""
    tokens_per_microbatch: Positive = 8192
    """Tokens of one packed forward and backward pass on one replica. It changes memory, not results."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 42
    """Seed of every random draw."""
    resume: str = "never"
    """"auto": go on from the newest checkpoint of train.output, so that the same command continues the same run;
    "never"; or the path of a checkpoint."""
    stop_seconds: Positive = 25
    """Seconds from SIGTERM until a rank that has reached no end of a step ends without saving (exit code 143).
    Source: torchrun kills its processes 30 s after it has passed SIGTERM on."""
    max_skipped_steps: Count = 3
    """Optimizer steps in a row with a non-finite loss or gradient, or rollouts with a non-finite score, value or
    log-prob, that are skipped before the run stops (exit code 6). Skipping changes nothing, and a run that stops at
    once would meet the same numbers when it is resumed. Source: ours; Megatron stops at the first."""
    log_every: Positive = 1
    """Print a line after every this many steps; metrics.jsonl gets all of them."""


class RunConfig(Section):
    """The whole tree."""

    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    sampling: SamplingConfig = SamplingConfig()
    sft: SftConfig = SftConfig()
    reward: RewardConfig = RewardConfig()
    critic: CriticConfig = CriticConfig()
    ppo: PpoConfig = PpoConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
    train: TrainConfig = TrainConfig()

    @property
    def rewards(self) -> tuple[RewardSource, ...]:
        """ppo.rewards, or what it stands for where it is empty: the reward model."""
        return self.ppo.rewards or (RewardSource(kind="model"),)

    def has_reward(self, kind: str) -> bool:
        return any(source.kind == kind for source in self.rewards)
