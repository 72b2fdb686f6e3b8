"""One picture for each figure of the paper that `make reproduce` repeats in small. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from ppomax.tools.reproduce_results import Run

FIGURES = {
    "figure_04": ("Fig. 4: vanilla PPO", ("vanilla",)),
    "figure_06": (
        "Fig. 6: scores and advantages, scaled and clipped",
        (
            "vanilla",
            "reward_scale",
            "reward_clip_0.3",
            "reward_clip_0.8",
            "advantage_clip_0.12",
            "advantage_clip_0.5",
        ),
    ),
    "figure_07": ("Fig. 7: constraints on the policy", ("vanilla", "kl", "entropy", "importance_sampling")),
    "figure_08": (
        "Fig. 8: what policy and critic start from",
        ("ppo_max", "ppo_max_critic_sft", "ppo_max_policy_base", "vanilla_critic_pretrained"),
    ),
    "figure_09": ("Fig. 9: PPO-max beside vanilla PPO", ("vanilla", "ppo_max")),
    "figure_15": ("Fig. 15: weight of the KL penalty", ("kl_half", "kl", "kl_double")),
    "figure_19": ("Fig. 19: lambda 0, 0.9 and 1, with the KL penalty", ("lambda_0", "kl", "lambda_1")),
}
PANELS = {
    "reward": "held-out reward (proxy)",
    "gold": "held-out gold judgement",
    "response_length": "response length, tokens",
    "kl": "KL to SFT, nats per token",
    "perplexity_paper": "perplexity, the paper's",
}
OF_ITERATIONS = ("perplexity_paper",)
"""Panels of what held-out evaluations do not measure: from the rollouts."""


def plot_figures(runs: Sequence[Run], folder: Path) -> list[str]:
    """Writes NAME.png for each figure of which there are runs; returns the names."""
    return [name for name, (title, arms) in FIGURES.items() if _plot(runs, title, arms, folder / f"{name}.png")]


def _plot(runs: Sequence[Run], title: str, arms: Sequence[str], path: Path) -> bool:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [run for run in runs if run.arm in arms]
    if not shown:
        return False
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(3.6 * len(PANELS), 3.5), layout="constrained")
    colours = {arm: f"C{number}" for number, arm in enumerate(arms)}
    for axis, (metric, label) in zip(axes, PANELS.items(), strict=True):
        labelled = set()
        for run in shown:
            rows = run.records if metric in OF_ITERATIONS else run.evaluations
            name = run.arm.replace("_", " ") if run.arm not in labelled else None
            labelled.add(run.arm)
            axis.plot(
                [row["step"] for row in rows],
                [row[metric] for row in rows],
                color=colours[run.arm],
                alpha=0.75,
                linewidth=1.3,
                label=name,
            )
            if metric == "gold" and run.alarm is not None:
                axis.axvline(run.alarm[0], color=colours[run.arm], linestyle=":", linewidth=1)
        axis.set_xlabel("PPO iteration")
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{title}. A line for each seed; dotted: the monitor's first alarm", fontsize=11)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
    return True
