"""PPO-max and its rewards: [ppo] (config.py)."""

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from ppomax.engine.config_section import Count, Fraction, NonNegative, Positive, Section


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
