"""PNG plots of a recipe's runs: reward, KL, response length, perplexity, losses, score histograms."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

PPO_CURVES = {
    "reward": ("reward",),
    "kl": ("kl",),
    "response_length": ("response_length",),
    "perplexity": ("perplexity", "ref_perplexity"),
    "ppo_losses": ("policy_loss", "value_loss"),
}
UNITS = {
    "reward": "raw reward-model score",
    "kl": "KL to the SFT policy (k1), nats per token",
    "response_length": "response length, tokens",
    "perplexity": "perplexity of the response",
    "ppo_losses": "loss",
    "sft_loss": "negative log-likelihood, nats per token",
    "reward_model_loss": "loss",
    "critic_loss": "value loss",
}


def plot_recipe(output: Path) -> None:
    """Writes output/plots/*.png from the stages' metrics.jsonl, samples and reward_eval.json."""
    folder = output / "plots"
    folder.mkdir(exist_ok=True)
    ppo = _records(output / "ppo", "ppo")
    held_out = _records(output / "ppo", "evaluation")
    for name, keys in PPO_CURVES.items():
        extra = held_out if name in ("reward", "kl", "response_length", "perplexity") else []
        _curves(folder / f"{name}.png", ppo, keys, "PPO iteration", UNITS[name], held_out=extra)
    sft, reward, critic = (_records(output / name, name) for name in ("sft", "reward", "critic"))
    _curves(folder / "sft_loss.png", sft, ("loss",), "optimizer step", UNITS["sft_loss"])
    _curves(
        folder / "reward_model_loss.png",
        reward,
        ("ranking_loss", "accuracy"),
        "optimizer step",
        UNITS["reward_model_loss"],
    )
    _curves(folder / "critic_loss.png", critic, ("value_loss",), "rollout", UNITS["critic_loss"])
    scores = [
        [json.loads(line)["reward"] for line in (output / name / "samples.jsonl").read_text().splitlines()]
        for name in ("before", "after")
    ]
    _histogram(
        folder / "scores.png", scores, ("before (SFT)", "after PPO-max"), "raw reward-model score, held-out prompts"
    )
    differences = json.loads((output / "reward" / "reward_eval.json").read_text())["differences"]
    _histogram(
        folder / "preference_differences.png", [differences], ("held-out pairs",), "score of chosen minus rejected"
    )


def _records(folder: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def _curves(
    path: Path,
    records: Sequence[dict[str, Any]],
    keys: Sequence[str],
    x_label: str,
    y_label: str,
    *,
    held_out: Sequence[dict[str, Any]] = (),
) -> None:
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for key in keys:
        points = [(row["step"], row[key]) for row in records if key in row]
        axes.plot(*zip(*points, strict=True), label=key) if points else None
    points = [(row["step"], row[keys[0]]) for row in held_out if keys[0] in row]
    if points:
        axes.plot(*zip(*points, strict=True), "o--", label=f"{keys[0]}, held out")
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _histogram(path: Path, groups: Sequence[Sequence[float]], labels: Sequence[str], x_label: str) -> None:
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    low, high = min(min(group) for group in groups), max(max(group) for group in groups)
    bins = [low + (high - low) * i / 30 for i in range(31)] if high > low else 10
    for group, label in zip(groups, labels, strict=True):
        axes.hist(group, bins=bins, alpha=0.6, label=label)
    axes.set(xlabel=x_label, ylabel="samples")
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
