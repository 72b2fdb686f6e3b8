"""What is watched and written: [monitor] (config.py)."""

from typing import Annotated, Literal

from pydantic import Field

from ppomax.engine.config_section import Count, Growth, NonNegative, Positive, Section, Share


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
