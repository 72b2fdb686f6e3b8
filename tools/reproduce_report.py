"""The report of `make reproduce`: report.md with its tables, a picture for each figure, results.json."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from ppomax.engine.errors import ConfigError
from ppomax.tools.reproduce_arms import ARMS, MONITOR
from ppomax.tools.reproduce_findings import verdicts
from ppomax.tools.reproduce_plots import FIGURES, plot_figures
from ppomax.tools.reproduce_results import Run, read_runs

MAIN_ARMS = ("vanilla", "ppo_max")
"""These run on all seeds."""
FITTED_SEEDS = (0, 1, 2)
"""The monitor's limits were fixed on these; other seeds test them."""


def write_report(output: Path) -> Path:
    """Of every run in output that is finished; returns the path of report.md."""
    runs = read_runs(output)
    if not runs:
        raise ConfigError(f"{output} holds no finished run; run `make reproduce`, or name its output folder")
    pictures = plot_figures(runs, output)
    (output / "results.json").write_text(json.dumps([summary(run) for run in runs], indent=1))
    parts = [
        "# The paper's figures in small",
        "Written by `make reproduce`; docs/reproduction.md says what was run and how.",
        "## Vanilla PPO and PPO-max, seed by seed",
        main_table(runs),
        f"Settings of the monitor: {', '.join(f'`{setting}`' for setting in MONITOR) or 'the defaults'}.",
        "## All arms",
        arms_table(runs),
        "## Findings",
        findings_table(runs),
        "## Figures",
        *(f"![{FIGURES[name][0]}]({name}.png)" for name in pictures),
        "## How vanilla PPO and PPO-max answer at the end",
        *(_example(run) for run in runs if run.arm in MAIN_ARMS),
    ]
    path = output / "report.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def summary(run: Run) -> dict[str, object]:
    """What tables are made of, for results.json."""
    first, last, best = run.evaluations[0], run.evaluations[-1], run.best
    return {
        "arm": run.arm,
        "seed": run.seed,
        "outcome": run.outcome,
        "gold": {"start": run.start, "best": best["gold"], "best_step": best["step"], "end": run.final},
        "half_of_gain": run.half,
        "more_than_half_until": run.lost_after,
        "alarm": run.alarm,
        "largest_kl": max(record["kl"] for record in run.records),
        **{
            name: {"start": first[name], "at_best_gold": best[name], "end": last[name]}
            for name in ("reward", "response_length", "kl", "perplexity", "finished", "repeats")
        },
        "wall_seconds": run.wall_seconds,
        "cpu_seconds": run.cpu_seconds,
    }


def main_table(runs: Sequence[Run]) -> str:
    """A row for each run of vanilla PPO and PPO-max."""
    rows = []
    for run in runs:
        if run.arm in MAIN_ARMS:
            first, last, best = run.evaluations[0], run.evaluations[-1], run.best
            rows.append(
                (
                    run.arm,
                    f"{run.seed}{'' if run.seed in FITTED_SEEDS else ', unseen'}",
                    f"{run.start:.2f}, {best['gold']:.2f} ({best['step']}), {run.final:.2f}",
                    f"{first['reward']:.1f}, {best['reward']:.1f}, {last['reward']:.1f}",
                    f"{first['response_length']:.0f}, {last['response_length']:.0f}",
                    f"{last['repeats']:.2f}",
                    f"{max(record['kl'] for record in run.records):.2f}",
                    _alarm(run),
                    "-" if run.lost_after is None else str(run.lost_after),
                    _caught(run),
                )
            )
    head = (
        "arm",
        "seed",
        "gold: start, best (iteration), end",
        "reward: start, at best gold, end",
        "length: start, end",
        "repeats, end",
        "largest KL",
        "first alarm",
        "more than half of the gain until",
        "caught in time",
    )
    return table(head, rows)


def arms_table(runs: Sequence[Run]) -> str:
    """A row for each arm, means over its seeds."""
    rows = []
    for arm in ARMS:
        own = [run for run in runs if run.arm == arm]
        if own:
            rows.append(
                (
                    arm,
                    str(len(own)),
                    _outcomes(own),
                    f"{_mean(r.start for r in own):.2f}, {_mean(r.best['gold'] for r in own):.2f}, "
                    f"{_mean(r.final for r in own):.2f}",
                    f"{_mean(r.head('reward') for r in own):.1f}, {_mean(r.tail('reward') for r in own):.1f}",
                    f"{_mean(r.head('response_length') for r in own):.0f}, "
                    f"{_mean(r.tail('response_length') for r in own):.0f}",
                    f"{_mean(r.tail('kl') for r in own):.3f}",
                    f"{_mean(r.head('perplexity_paper') for r in own):.4f}, "
                    f"{_mean(r.tail('perplexity_paper') for r in own):.4f}",
                    "; ".join("-" if r.lost_after is None else str(r.lost_after) for r in own),
                    "; ".join(str(r.alarm[0]) if r.alarm else "-" for r in own),
                    f"{_mean(r.cpu_seconds for r in own):.0f}, {max(r.cpu_seconds for r in own):.0f}",
                )
            )
    head = (
        "arm",
        "seeds",
        "outcome",
        "gold: start, best, end",
        "reward: first 5, last 5",
        "length: first 5, last 5",
        "KL, last 5",
        "paper's perplexity: first 5, last 5",
        "more than half of the gain until",
        "first alarm",
        "CPU s: mean, most",
    )
    return table(head, rows)


def findings_table(runs: Sequence[Run]) -> str:
    """What the paper found, the rule that stands for it here, and how many seeds fulfil it."""
    rows = [(v.finding.figure, v.finding.paper, v.finding.rule, v.text) for v in verdicts(runs)]
    return table(("Fig.", "the paper", "here: rule", "reproduced"), rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _alarm(run: Run) -> str:
    return "-" if run.alarm is None else f"{run.alarm[0]}, `{run.alarm[1]}`"


def _caught(run: Run) -> str:
    if run.lost_after is None:
        return "-" if run.alarm is None else "false alarm"
    return "yes" if run.is_caught else "no"


def _example(run: Run) -> str:
    """Model text stands in a code block, one line of it, so nothing in it is markup."""
    question, response = (" ".join(text.split()) for text in run.example)
    return f"{run.arm}, seed {run.seed}:\n\n    {question}\n    {response}"


def _outcomes(runs: Sequence[Run]) -> str:
    """How many seeds hold, collapse and fail."""
    outcomes = [run.outcome for run in runs]
    return ", ".join(f"{outcome} {outcomes.count(outcome)}" for outcome in dict.fromkeys(sorted(outcomes)))


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
