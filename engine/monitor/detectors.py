"""What a collapsing policy shows in its metrics: one function per detector, from smoothed metrics to a score.

A score is the way from the run's own baseline (0) to the limit of [monitor.limits] (1). Pure Python over records of
metrics.jsonl, so that any run can be replayed. Limits and their sources: docs/monitor.md.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ppomax.engine.config_monitor import MonitorLimits

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class View:
    """What a detector looks at. now: metrics averaged over the last records. last: of this record alone. baseline: of
    the first records. best_value_loss: the least smoothed value loss so far. max_length: the most tokens that a
    response can have. A metric that the records lack is missing.
    """

    now: Metrics
    last: Metrics
    baseline: Metrics
    best_value_loss: float
    max_length: int
    limits: MonitorLimits


@dataclass(frozen=True)
class Detector:
    """score: of a View, None where its metrics are missing. metrics: what it reads, for the event. worst: the number of
    single responses that orders them, largest first ("-" before it: smallest first). confirm: False where one record is
    enough, and is not smoothed. paper: what the paper found.
    """

    name: str
    score: Callable[[View], float | None]
    metrics: tuple[str, ...]
    worst: str
    severity: str
    what: str
    paper: str
    confirm: bool = True


def _growth(view: View, name: str, limit: float) -> float | None:
    """From the baseline (0) to `limit` times it (1)."""
    now, base = view.now.get(name), view.baseline.get(name)
    if now is None or base is None or base <= 0:
        return None
    return (now / base - 1) / (limit - 1)


def length_drift(view: View) -> float | None:
    growth = _growth(view, "response_length", view.limits.length_growth)
    if growth is None:
        return None
    return min(growth, view.now["response_length"] / (view.limits.length_share * view.max_length))


def length_saturation(view: View) -> float | None:
    share, base = view.now.get("truncated"), view.baseline.get("truncated")
    if share is None or base is None:
        length = view.now.get("response_length")
        return None if length is None else length / (view.limits.saturation_share * view.max_length)
    rise = (share - base) / min(view.limits.truncated, max(1 - base, 1e-9))
    return min(share / view.limits.truncated, rise)


def dead_eos(view: View) -> float | None:
    share, base = view.now.get("finished"), view.baseline.get("finished")
    if share is None or base is None:
        return None
    limit = view.limits.finished
    return float(share <= limit) if base <= 2 * limit else (base - share) / (base - limit)


def length_collapse(view: View) -> float | None:
    return _growth(view, "response_length", view.limits.length_shrink)


def kl_runaway(view: View) -> float | None:
    kl = view.now.get("kl")
    return None if kl is None else kl / view.limits.kl


def kl_spike(view: View) -> float | None:
    kl = view.last.get("kl")
    return None if kl is None else kl / view.limits.kl_spike


def perplexity_collapse(view: View) -> float | None:
    logs = _logs(view, "perplexity")
    return None if logs is None else (1 - logs) / (1 - view.limits.nll_ratio)


def paper_perplexity(view: View) -> float | None:
    logs = _logs(view, "perplexity_paper")
    return None if logs is None else (1 - logs) / (1 - view.limits.paper_perplexity_ratio)


def entropy_collapse(view: View) -> float | None:
    return _growth(view, "entropy", view.limits.entropy_ratio)


def repetition(view: View) -> float | None:
    now, base = view.now.get("distinct_4"), view.baseline.get("distinct_4")
    return None if now is None or base is None else (base - now) / view.limits.repetition


def value_divergence(view: View) -> float | None:
    loss = view.now.get("value_loss")
    if loss is None or not 0 < view.best_value_loss < math.inf or loss <= 0:
        return None
    growth = math.log(loss / view.best_value_loss) / math.log(view.limits.value_loss_growth)
    # A loss that grows because returns spread is no divergence while the critic still explains them.
    explains = view.now.get("explained_variance", 0.0) > view.limits.explained_variance
    return min(growth, 0.5) if explains else growth


def reward_flattening(view: View) -> float | None:
    spread = _growth(view, "reward_std", view.limits.reward_std_growth)
    if spread is None or "reward" not in view.now:
        return None
    rise = (view.now["reward"] - view.baseline["reward"]) / view.baseline["reward_std"]
    return min(spread, rise / view.limits.reward_rise)


def _logs(view: View, name: str) -> float | None:
    """log of a perplexity over that of the baseline."""
    now, base = view.now.get(name), view.baseline.get(name)
    if now is None or base is None or base <= 1 or now <= 0:
        return None
    return math.log(now) / math.log(base)


DETECTORS = (
    Detector(
        "length_drift",
        length_drift,
        ("response_length", "truncated"),
        "response_length",
        "warning",
        "responses grow longer and longer",
        "Fig. 4: 145 tokens at step 200, 266 at 400, the limit at 460, while the reward still rises; healthy runs of "
        "Fig. 7 to 9 stay below 1.7 times their start",
    ),
    Detector(
        "length_saturation",
        length_saturation,
        ("truncated", "response_length"),
        "response_length",
        "critical",
        "responses run into the length limit",
        "Fig. 4 and 6: every collapsed run writes 512 tokens, the limit, within 60 steps",
    ),
    Detector(
        "dead_eos",
        dead_eos,
        ("finished", "response_length"),
        "response_length",
        "critical",
        "responses do not end any more",
        "Fig. 4: a mean length of exactly 512: not one response ends",
    ),
    Detector(
        "length_collapse",
        length_collapse,
        ("response_length",),
        "-response_length",
        "critical",
        "responses shrink to nothing",
        "Fig. 8: a policy without supervised fine-tuning ends at responses of one token, with a KL of 7",
    ),
    Detector(
        "kl_runaway",
        kl_runaway,
        ("kl",),
        "kl",
        "critical",
        "the policy runs away from the reference",
        "Fig. 4: KL 0.007 at step 300, 0.048 at 400, 0.109 at 500; healthy runs peak at 0.058 (Fig. 9)",
    ),
    Detector(
        "kl_spike",
        kl_spike,
        ("kl",),
        "kl",
        "critical",
        "the policy jumps away from the reference",
        "Fig. 16: KL 0.93 at step 330 under an unclipped entropy bonus, before the length saturates; Fig. 8: 7",
        confirm=False,
    ),
    Detector(
        "perplexity_collapse",
        perplexity_collapse,
        ("perplexity",),
        "-nll",
        "critical",
        "the policy grows certain of every token",
        "Fig. 4 and 6: the mean negative log-likelihood is 1.9 to 2.0 nats at the start, 0.65 to 0.95 after collapse",
    ),
    Detector(
        "paper_perplexity",
        paper_perplexity,
        ("perplexity_paper", "response_length"),
        "response_length",
        "critical",
        "the paper's perplexity metric falls to 1",
        "Fig. 17 to 19 call a run collapsed below 1.0025, from 1.0168 at the start",
    ),
    Detector(
        "entropy_collapse",
        entropy_collapse,
        ("entropy",),
        "-nll",
        "warning",
        "the policy's entropy is used up",
        "the paper does not plot the entropy; its section 5.2 names the policy's certainty as a sign of collapse",
    ),
    Detector(
        "repetition",
        repetition,
        ("distinct_4",),
        "-distinct_4",
        "warning",
        "responses repeat themselves",
        "the released code's maintainers: a failed model repeats a sentence until the length limit",
    ),
    Detector(
        "value_divergence",
        value_divergence,
        ("value_loss", "explained_variance"),
        "reward",
        "warning",
        "the critic has lost the returns",
        "Fig. 4: the value loss is 0.11 at step 400 and 0.55 from 500 on; healthy runs (Fig. 8) fall to 0.0045",
    ),
    Detector(
        "reward_flattening",
        reward_flattening,
        ("reward", "reward_std"),
        "reward",
        "warning",
        "rewards jump and their distribution flattens",
        "Fig. 4: 4.9 to 9.6 between steps 400 and 500; Fig. 13: flat from step 800 on, with a tail to 30",
    ),
)
METRICS_READ = tuple(sorted({name for detector in DETECTORS for name in detector.metrics}))
