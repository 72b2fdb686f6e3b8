"""The runs of the paper whose curves are quoted as numbers (arXiv 2307.04964; docs/monitor.md), as records to replay.

Numbers are digitised from the paper's figures and end points of lines between which we interpolate: real curves bend.
Runs of Fig. 4, 6, 7 and 14 to 19 begin at the same SFT model; where the start of a curve is not quoted, it is START.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

Points = dict[int, float]
START = {"response_length": 117.0, "kl": 0.0, "perplexity_paper": 1.0168}
STEPS_PER_RECORD = 4
"""Optimizer steps per rollout: 128 responses in minibatches of 32."""
MAX_LENGTH = 512


@dataclass(frozen=True)
class PaperRun:
    """label: ours, from the text; reason: what it rests on. collapse: the step at which the paper's perplexity metric
    passes 1.0025 or the length 500, whichever is quoted. curves: metric -> {step: value}.
    """

    name: str
    label: Literal["healthy", "collapsed", "drifting"]
    reason: str
    curves: dict[str, Points] = field(default_factory=dict)
    collapse: int | None = None

    def records(self) -> list[dict[str, float]]:
        """One per rollout; a metric is there between its first and its last quoted step."""
        end = max(step for points in self.curves.values() for step in points)
        records = []
        for step in range(0, end + 1, STEPS_PER_RECORD):
            record = {"step": float(step)}
            for name, points in self.curves.items():
                if min(points) <= step <= max(points):
                    record[name] = interpolate(points, step)
            if "perplexity_paper" in record and "response_length" in record:
                record["perplexity"] = math.exp(math.log(record["perplexity_paper"]) * record["response_length"])
            records.append(record)
        return records


def interpolate(points: Points, step: int) -> float:
    """Linear between the two quoted steps around `step`."""
    steps = sorted(points)
    right = next(i for i, known in enumerate(steps) if known >= step)
    if steps[right] == step:
        return points[steps[right]]
    low, high = steps[right - 1], steps[right]
    return points[low] + (points[high] - points[low]) * (step - low) / (high - low)


def lengths(**points: float) -> Points:
    return {0: START["response_length"], **{int(key[1:]): value for key, value in points.items()}}


def kls(**points: float) -> Points:
    return {0: START["kl"], **{int(key[1:]): value for key, value in points.items()}}


def perplexities(**points: float) -> Points:
    return {0: START["perplexity_paper"], **{int(key[1:]): value for key, value in points.items()}}


def below_criterion(step: int, **points: float) -> dict[str, Points]:
    """Only the step at which the perplexity metric passes 1.0025 is quoted; a collapsed one then stays at 1.002 or
    below.
    """
    points |= {f"s{step}": 1.0025, f"s{step + 4}": 1.002, f"s{step + 40}": 1.002}
    return {"perplexity_paper": perplexities(**points)}


NOISY_PLATEAU = {1000 + 500 * i: 0.043 + (0.01 if i % 2 else -0.01) for i in range(19)}
"""Fig. 9: 0.043 +- 0.01."""

RUNS = (
    PaperRun(
        "Fig. 7 KL penalty",
        "healthy",
        '"only a penalty of the policy entropy or KL divergence can provide a long-lasting stable optimization"',
        {
            "response_length": lengths(s270=181, s800=122),
            "kl": kls(s190=-0.017, s800=-0.005),
            "perplexity_paper": perplexities(s300=1.009, s800=1.014),
        },
    ),
    PaperRun(
        "Fig. 7 entropy bonus",
        "healthy",
        "the same sentence; the other stable penalty",
        {
            "response_length": lengths(s320=178, s800=120),
            "kl": kls(s190=-0.005, s800=0.012),
            "perplexity_paper": perplexities(s300=1.011, s800=1.014),
        },
    ),
    PaperRun(
        "Fig. 7 KL + importance sampling",
        "healthy",
        "has the KL penalty; flat curves",
        {
            "response_length": lengths(s400=130, s800=100),
            "kl": kls(s190=-0.002, s800=-0.002),
            "perplexity_paper": perplexities(s800=1.017),
        },
    ),
    PaperRun(
        "Fig. 8 PPO-max",
        "healthy",
        "the paper's recipe",
        {
            "response_length": {0: 102, 350: 169, 800: 120},
            "kl": kls(s800=-0.002),
            "reward": {0: 3.25, 800: 3.87},
            "value_loss": {0: 17.9, 200: 1.7, 300: 0.2, 800: 0.0045},
        },
    ),
    PaperRun(
        "Fig. 8 critic from SFT",
        "healthy",
        "converges to the same as PPO-max",
        {
            "kl": kls(s420=0.035, s800=0.003),
            "reward": {0: 3.35, 800: 3.72},
            "value_loss": {0: 1.8, 300: 0.2, 800: 0.0045},
        },
    ),
    PaperRun(
        "Fig. 9 PPO-max, 10,000 steps",
        "healthy",
        "plateaus of reward, length and KL over 10,000 steps",
        {
            "response_length": {0: 155, 700: 143, 2300: 230, 10000: 230},
            "kl": {0: 0.0, 500: 0.058, **NOISY_PLATEAU},
            "reward": {0: 0.75, 1000: 1.2, 2000: 1.75, 3000: 2.0, 10000: 2.1},
            "perplexity_paper": {0: 1.0185, 2300: 1.008, 10000: 1.0095},
        },
    ),
    PaperRun(
        "Fig. 15 KL weight 0.05",
        "healthy",
        "stable; all fluctuate in the first 300 steps",
        {"response_length": lengths(s250=184), "kl": kls(s200=-0.012, s700=-0.003)},
    ),
    PaperRun(
        "Fig. 15 KL weight 0.2",
        "healthy",
        "stable; all fluctuate in the first 300 steps",
        {"response_length": lengths(s240=156), "kl": kls(s200=-0.018, s700=-0.005)},
    ),
    PaperRun(
        "Fig. 4 vanilla PPO",
        "collapsed",
        "win rate 63 % at step 300, 23 % at 990",
        {
            "response_length": lengths(s200=145, s400=266, s460=512, s990=512),
            "kl": kls(s200=-0.006, s300=0.007, s400=0.048, s500=0.109, s990=0.164),
            "reward": {0: 2.95, 200: 4.06, 300: 4.25, 400: 4.87, 500: 9.57, 600: 11.6, 990: 14.6},
            "perplexity_paper": perplexities(s200=1.0132, s400=1.0048, s460=1.0018, s990=1.0013),
            "value_loss": {0: 15.0, 200: 0.51, 300: 0.21, 400: 0.11, 500: 0.55, 990: 0.55},
        },
        440,
    ),
    PaperRun(
        "Fig. 6 reward scaling",
        "collapsed",
        '"the same pattern as vanilla"',
        {"response_length": lengths(s600=500), "kl": kls(s600=0.096, s990=0.126)},
        580,
    ),
    PaperRun(
        "Fig. 6 reward normalisation 0.8",
        "collapsed",
        "length at the limit from step 840",
        {"response_length": lengths(s840=500), "kl": kls(s600=0.024, s990=0.125)},
        800,
    ),
    PaperRun(
        "Fig. 6 advantage normalisation 0.5",
        "collapsed",
        "length at the limit from step 810",
        {"response_length": lengths(s810=500), "kl": kls(s600=0.031, s990=0.261)},
        740,
    ),
    PaperRun(
        "Fig. 8 pretrained policy",
        "collapsed",
        "one token, KL 7: total failure",
        {"response_length": {0: 102, 300: 1, 800: 1}, "kl": {0: 0.0, 300: 7.0, 800: 7.0}},
        300,
    ),
    PaperRun(
        "Fig. 8 pre-trained critic, vanilla PPO",
        "collapsed",
        "length 500 at step 570",
        {"response_length": lengths(s570=500), "kl": kls(s990=0.21)},
        570,
    ),
    PaperRun(
        "Fig. 14 advantage normalisation, value clip",
        "collapsed",
        "length at the limit from step 620",
        {"response_length": lengths(s620=500, s990=511), "kl": kls(s990=0.120)},
        570,
    ),
    PaperRun(
        "Fig. 14 reward normalisation, value clip",
        "collapsed",
        "length at the limit from step 930",
        {"response_length": lengths(s930=500, s990=510), "kl": kls(s990=0.135)},
        860,
    ),
    PaperRun(
        "Fig. 14 all three",
        "collapsed",
        "the paper's perplexity criterion at step 980",
        {"response_length": lengths(s990=413), "kl": kls(s990=0.236)},
        980,
    ),
    PaperRun(
        "Fig. 16 entropy bonus without clip",
        "collapsed",
        "KL 0.93, then length at the limit",
        {"response_length": lengths(s290=40, s400=512, s500=512), "kl": kls(s330=0.93)},
        330,
    ),
    PaperRun("Fig. 17 no clip", "collapsed", "the paper's criterion", below_criterion(580), 580),
    PaperRun("Fig. 17 clip 0.5", "collapsed", "the paper's criterion", below_criterion(640), 640),
    PaperRun("Fig. 18 gradient clip 0.5", "collapsed", "the paper's criterion", below_criterion(610), 610),
    PaperRun("Fig. 18 gradient clip 1", "collapsed", "the paper's criterion", below_criterion(710), 710),
    PaperRun("Fig. 19 lambda 0", "collapsed", "the paper's criterion", below_criterion(490, s300=1.026), 490),
    PaperRun("Fig. 19 lambda 1", "collapsed", "the paper's criterion", below_criterion(830), 830),
    PaperRun(
        "Fig. 6 reward normalisation 0.3",
        "drifting",
        "stable but trending up: never below the criterion, never at the limit",
        {"response_length": lengths(s990=242), "kl": kls(s600=0.002, s990=0.026)},
    ),
    PaperRun(
        "Fig. 6 advantage normalisation 0.12",
        "drifting",
        "delayed: not collapsed at step 990",
        {"response_length": lengths(s990=246), "kl": kls(s600=0.004, s990=0.081)},
    ),
    PaperRun(
        "Fig. 7 importance sampling",
        "drifting",
        "length and KL still rise at step 800",
        {
            "response_length": lengths(s780=155),
            "kl": kls(s190=-0.003, s800=0.072),
            "perplexity_paper": perplexities(s800=1.010),
        },
    ),
    PaperRun(
        "Fig. 14 reward and advantage normalisation",
        "drifting",
        "never below the criterion, KL 0.147 at step 990",
        {"response_length": lengths(s990=271), "kl": kls(s990=0.147)},
    ),
    PaperRun(
        "Fig. 14 reward scaling, advantage and value clip",
        "drifting",
        "the paper calls the pair convergent; KL 0.157 at step 990",
        {"response_length": lengths(s990=294), "kl": kls(s990=0.157)},
    ),
)
