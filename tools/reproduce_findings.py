"""What the paper found, and whether the runs of `make reproduce` show it: each finding is a rule over the runs of one
seed, so that no verdict is written by hand.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ppomax.tools.reproduce_results import Run

BySeed = Mapping[str, Run]
"""The runs of one seed by arm."""


@dataclass(frozen=True)
class Finding:
    """figure and paper: where and what the paper found. rule: what must hold here, in words. arms: those that `holds`
    looks at, of one seed.
    """

    figure: str
    paper: str
    rule: str
    arms: tuple[str, ...]
    holds: Callable[[BySeed], bool]


@dataclass(frozen=True)
class Verdict:
    finding: Finding
    num_yes: int
    num_seeds: int

    @property
    def text(self) -> str:
        if self.num_seeds == 0:
            return "not run"
        word = {0: "no", self.num_seeds: "yes"}.get(self.num_yes, "partly")
        return f"{word}, {self.num_yes} of {self.num_seeds} seeds"


def verdicts(runs: Sequence[Run]) -> list[Verdict]:
    """Each finding on every seed that has all its arms."""
    seeds = sorted({run.seed for run in runs})
    by_seed = {seed: {run.arm: run for run in runs if run.seed == seed} for seed in seeds}
    found = []
    for finding in FINDINGS:
        told = [finding.holds(arms) for arms in by_seed.values() if all(arm in arms for arm in finding.arms)]
        found.append(Verdict(finding, sum(told), len(told)))
    return found


def _collapses(arm: str) -> Callable[[BySeed], bool]:
    return lambda runs: runs[arm].outcome == "collapses"


def _holds(arm: str) -> Callable[[BySeed], bool]:
    return lambda runs: runs[arm].outcome == "holds"


def _lost(run: Run) -> float:
    """When half of the gain was lost: beyond the end where it never was."""
    return float("inf") if run.lost_after is None else run.lost_after


def _over_optimises(runs: BySeed) -> bool:
    run = runs["vanilla"]
    return run.outcome == "collapses" and run.evaluations[-1]["reward"] > run.best["reward"]


def _runs_away(runs: BySeed) -> bool:
    run = runs["vanilla"]
    return run.tail("response_length") > 2 * run.head("response_length") and run.tail("kl") > 10 * run.head("kl")


def _losses_look_fine(runs: BySeed) -> bool:
    run = runs["vanilla"]
    return run.outcome == "collapses" and run.tail("value_loss") < run.head("value_loss")


def _paper_perplexity_falls(runs: BySeed) -> bool:
    run = runs["vanilla"]
    return run.tail("perplexity_paper") - 1 < 0.5 * (run.head("perplexity_paper") - 1)


def _stays_near(runs: BySeed) -> bool:
    return runs["ppo_max"].outcome == "holds" and runs["ppo_max"].tail("kl") < 0.2 * runs["vanilla"].tail("kl")


def _later_than_vanilla(arm: str) -> Callable[[BySeed], bool]:
    return lambda runs: runs[arm].has_learned and _lost(runs[arm]) > _lost(runs["vanilla"])


def _sampling_drifts(runs: BySeed) -> bool:
    run = runs["importance_sampling"]
    return run.outcome == "collapses" or run.tail("kl") > 2 * runs["kl"].tail("kl")


def _looser_goes_further(runs: BySeed) -> bool:
    arms = [runs[arm] for arm in ("kl_double", "kl", "kl_half")]
    kl, reward = [run.tail("kl") for run in arms], [run.tail("reward") for run in arms]
    return kl == sorted(kl) and reward == sorted(reward)


def _same_end(runs: BySeed) -> bool:
    run, other = runs["ppo_max_critic_sft"], runs["ppo_max"]
    return run.outcome == "holds" and abs(run.final - other.final) < 0.1


def _pretraining_helps_the_critic(runs: BySeed) -> bool:
    trained, other = (runs[arm].records[0]["value_loss"] for arm in ("vanilla_critic_pretrained", "vanilla"))
    return bool(trained < 0.5 * other)


def _base_fails(runs: BySeed) -> bool:
    return runs["ppo_max_policy_base"].final < runs["ppo_max"].start


FINDINGS = (
    Finding(
        "4",
        "vanilla PPO: the reward goes from 3 to 15 while the win rate falls from 63 % to 23 %",
        "gold collapses, held-out reward ends above that at the best gold",
        ("vanilla",),
        _over_optimises,
    ),
    Finding(
        "4",
        "length goes to the limit, KL from 0 to 0.16",
        "length doubles and KL grows tenfold, last 5 iterations against first 5",
        ("vanilla",),
        _runs_away,
    ),
    Finding(
        "4",
        "losses look converged while the policy collapses",
        "value loss ends below its start in a run that collapses",
        ("vanilla",),
        _losses_look_fine,
    ),
    Finding(
        "4",
        "the plotted perplexity falls from 1.017 to 1.001",
        "what it has above 1 is halved",
        ("vanilla",),
        _paper_perplexity_falls,
    ),
    Finding(
        "8, 9",
        "PPO-max is stable, its KL reaches a plateau",
        "gold holds, and KL ends below a fifth of vanilla's",
        ("ppo_max", "vanilla"),
        _stays_near,
    ),
    Finding(
        "6",
        "reward scaling alone collapses, as vanilla does",
        "gold collapses",
        ("reward_scale",),
        _collapses("reward_scale"),
    ),
    Finding(
        "6",
        "reward normalised and clipped at 0.3 does not collapse in 1,000 steps",
        "gold holds",
        ("reward_clip_0.3",),
        _holds("reward_clip_0.3"),
    ),
    Finding(
        "6",
        "clipped at 0.8 it collapses, later than vanilla",
        "half of the gain is lost later than in vanilla",
        ("reward_clip_0.8", "vanilla"),
        _later_than_vanilla("reward_clip_0.8"),
    ),
    Finding(
        "6",
        "advantages normalised and clipped at 0.12: delayed",
        "half of the gain is lost later than in vanilla",
        ("advantage_clip_0.12", "vanilla"),
        _later_than_vanilla("advantage_clip_0.12"),
    ),
    Finding(
        "6",
        "clipped at 0.5: collapses",
        "gold collapses",
        ("advantage_clip_0.5",),
        _collapses("advantage_clip_0.5"),
    ),
    Finding("7", "a KL penalty keeps training stable", "gold holds", ("kl",), _holds("kl")),
    Finding("7", "so does a thresholded entropy bonus", "gold holds", ("entropy",), _holds("entropy")),
    Finding(
        "7",
        "importance sampling does not: KL and length still rise at the end",
        "gold collapses, or KL ends above twice that of the KL penalty",
        ("importance_sampling", "kl"),
        _sampling_drifts,
    ),
    Finding(
        "8",
        "a critic from the SFT model converges to the same",
        "gold holds, and ends within 0.1 of PPO-max",
        ("ppo_max_critic_sft", "ppo_max"),
        _same_end,
    ),
    Finding(
        "8",
        "pre-training the critic starts from a low value loss (0.24 instead of 15)",
        "value loss of the first iteration below half of vanilla's",
        ("vanilla_critic_pretrained", "vanilla"),
        _pretraining_helps_the_critic,
    ),
    Finding(
        "8",
        "it does not save vanilla PPO from collapse",
        "gold collapses",
        ("vanilla_critic_pretrained",),
        _collapses("vanilla_critic_pretrained"),
    ),
    Finding(
        "8",
        "a policy that starts from the pretrained model fails",
        "gold ends below that of the SFT policy",
        ("ppo_max_policy_base", "ppo_max"),
        _base_fails,
    ),
    Finding(
        "15",
        "the looser the KL penalty, the higher the reward and the farther the policy",
        "reward and KL of the last 5 iterations are in the order of the three weights",
        ("kl_half", "kl", "kl_double"),
        _looser_goes_further,
    ),
    Finding("19", "lambda 0 collapses", "gold collapses", ("lambda_0",), _collapses("lambda_0")),
    Finding("19", "lambda 1 collapses, later", "gold collapses", ("lambda_1",), _collapses("lambda_1")),
    Finding("19", "lambda 0.9 is stable", "gold holds", ("kl",), _holds("kl")),
)
