"""Every setting of a run: one strict, frozen tree, checked before any process group exists.

This file holds the fields and what can be checked from them alone. `config_file.py` reads TOML, applies presets and
overrides, and turns pydantic's complaints into `ConfigError`s. A function takes the section it needs, not the tree.
Fields named "source" give where the paper (arXiv 2307.04964, "P p.N") or its released code sets the value.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ppomax.engine.config_models import ModelConfig, OptimConfig, ParallelConfig
from ppomax.engine.config_monitor import MonitorConfig
from ppomax.engine.config_ppo import PpoConfig, RewardSource
from ppomax.engine.config_section import Count, NonNegative, Positive, Section

MIN_TEMPERATURE = 1e-4
"""Of kernels/sampling.py, which refuses what is colder."""


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
