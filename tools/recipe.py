"""The whole recipe in one command: SFT, reward model, critic pre-training, PPO-max, evaluation before and after; then a
summary.

`ppomax recipe CONFIG_FOLDER OUTPUT` reads sft.toml, reward.toml, critic.toml, ppo.toml and evaluate.toml of the
folder and chains the stages: each starts from the Hugging Face folder that the one before it wrote. The stages run in
this process, on one device; for many ranks start them one by one with torchrun (examples/README.md).
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ppomax.engine.config import RunConfig
from ppomax.engine.config_checks import check_paths
from ppomax.engine.config_file import load_config
from ppomax.engine.errors import ConfigError, PpomaxError, RunStopped
from ppomax.engine.parallel.layout import check_layout
from ppomax.engine.stage import stage_function
from ppomax.tools.plots import plot_recipe
from ppomax.tools.report import write_report

MARKER = "recipe.json"
CHAINED = ("model.policy", "model.reward", "model.critic", "model.reference", "train.output")
Gold = Callable[[Sequence[str], str], bool]


def main(argv: Sequence[str]) -> None:
    """`ppomax recipe CONFIG_FOLDER OUTPUT [section.field=value ...]`."""
    parser = argparse.ArgumentParser(prog="ppomax recipe", description=__doc__)
    parser.add_argument(
        "configs", type=Path, help="folder with sft.toml, reward.toml, critic.toml, ppo.toml, evaluate.toml"
    )
    parser.add_argument(
        "output", type=Path, help="folder that gets one folder per stage, plots, samples and summary.json"
    )
    parser.add_argument("overrides", nargs="*", help="section.field=value, applied to every stage")
    arguments = parser.parse_args(argv)
    run_recipe(arguments.configs, arguments.output, overrides=arguments.overrides)


def run_recipe(
    configs: Path, output: Path, *, overrides: Sequence[str] = (), gold: Gold | None = None
) -> dict[str, Any]:
    """Runs the five stages and writes summary.json, report.html, samples.md and plots/; returns the summary.

    gold: the data generator's own rule, (texts of the prompt's turns, response) -> follows it; None where there is
    none.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "the recipe runs in one process; on many ranks start its stages one by one (examples/README.md)"
        )
    resolved = _resolve(configs, output, overrides)
    _prepare_output(output)
    seconds = {}
    for name, (command, config) in resolved.items():
        print(f"\n== {name}: writes {config.train.output}", flush=True)
        started = time.perf_counter()
        try:
            stage_function(command)(config)
        except RunStopped as reason:
            raise PpomaxError(
                f"the recipe ends in {name}, which {reason}; a recipe starts from its first stage"
            ) from None
        seconds[name] = round(time.perf_counter() - started, 1)
    summary = _summarise(output, seconds, gold)
    (output / "summary.json").write_text(json.dumps(summary, indent=1))
    plot_recipe(output)
    write_report([output / "ppo"], output / "report.html")
    _write_samples(output)
    _show(summary, output)
    return summary


def _resolve(configs: Path, output: Path, overrides: Sequence[str]) -> dict[str, tuple[str, RunConfig]]:
    """The configuration of every stage, all checked before the first one runs."""
    chained = [override for override in overrides if override.partition("=")[0].strip() in CHAINED]
    if chained:
        raise ConfigError(
            f"{', '.join(chained)}: the recipe sets the folders of its stages itself; "
            f"give the output folder as argument, and a base model in {configs / 'sft.toml'}"
        )
    sft, reward, critic, ppo = (output / name / "hf" for name in ("sft", "reward", "critic", "ppo"))
    stages: dict[str, tuple[str, list[str]]] = {
        "sft": ("sft", []),
        "reward": ("reward", [f"model.policy={sft}"]),
        "critic": ("critic", [f"model.policy={sft}", f"model.reward={reward}"]),
        "ppo": ("ppo", [f"model.policy={sft}", f"model.reward={reward}", f"model.critic={critic}"]),
        "before": ("evaluate", [f"model.policy={sft}", f"model.reward={reward}", f"model.reference={sft}"]),
        "after": ("evaluate", [f"model.policy={ppo}", f"model.reward={reward}", f"model.reference={sft}"]),
    }
    resolved = {}
    for name, (command, paths) in stages.items():
        file = configs / f"{command}.toml"
        if not file.is_file():
            raise ConfigError(
                f"{file} is missing; the recipe needs sft, reward, critic, ppo and evaluate.toml in {configs}"
            )
        config = load_config(str(file), [*paths, f"train.output={output / name}", *overrides], command=command)
        check_layout(config, 1)
        if command == "reward" and not config.data.eval:
            raise ConfigError(f"{file}: data.eval is empty; the summary needs the reward model's held-out accuracy")
        # Earlier stages write the folders in `paths`; everything else that the stage reads must be there now.
        unwritten = {path.partition("=")[0].removeprefix("model."): "" for path in paths}
        check_paths(config.model_copy(update={"model": config.model.model_copy(update=unwritten)}), command)
        resolved[name] = (command, config)
    return resolved


def _prepare_output(output: Path) -> None:
    """An empty output folder; an earlier recipe's is replaced, anything else is left alone."""
    if output.exists() and any(output.iterdir()):
        if not (output / MARKER).is_file():
            raise ConfigError(f"{output} is not empty and no earlier recipe wrote it; give another folder")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).write_text(json.dumps({"written_by": "ppomax recipe"}))


def _summarise(output: Path, seconds: dict[str, float], gold: Gold | None) -> dict[str, Any]:
    from ppomax.tools.verify_export import max_logit_difference

    before, after = (_read(output / name / "evaluation.json") for name in ("before", "after"))
    summary: dict[str, Any] = {
        "reward_model_accuracy": _read(output / "reward" / "reward_eval.json")["accuracy"],
        "reward_before": before["reward"],
        "reward_std_before": before["reward_std"],
        "reward_after": after["reward"],
        "kl": after["kl"],
        "response_length_before": before["response_length"],
        "response_length_after": after["response_length"],
        "perplexity_before": before["perplexity"],
        "perplexity_after": after["perplexity"],
    }
    samples = {name: read_lines(output / name / "samples.jsonl") for name in ("before", "after")}
    if gold is not None:
        for name, rows in samples.items():
            summary[f"gold_{name}"] = sum(_is_gold(row, gold) for row in rows) / len(rows)
    summary["export_max_logit_diff"] = max_logit_difference(str(output / "ppo" / "hf"))
    summary["seconds_by_stage"] = seconds
    summary["seconds"] = round(sum(seconds.values()), 1)
    return summary


def _is_gold(row: dict[str, Any], gold: Gold) -> bool:
    return bool(row["finished"]) and gold([turn["text"] for turn in row["prompt"]], row["response"])


def _write_samples(output: Path, num_samples: int = 8) -> None:
    """samples.md: responses to the same prompts before and after PPO; model text stands in code blocks, so nothing in
    it
    is markup.
    """
    lines = ["# Responses to held-out prompts, before (SFT) and after PPO-max", ""]
    before, after = (read_lines(output / name / "samples.jsonl")[:num_samples] for name in ("before", "after"))
    for number, (old, new) in enumerate(zip(before, after, strict=True), start=1):
        lines += [f"## Prompt {number}", ""]
        lines += [f"    {turn['role']}: {_one_line(turn['text'])}" for turn in old["prompt"]]
        for name, row in (("before", old), ("after", new)):
            lines += ["", f"{name} (reward {row['reward']:.2f}):", "", f"    {_one_line(row['response'])}"]
        lines.append("")
    (output / "samples.md").write_text("\n".join(lines))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _show(summary: dict[str, Any], output: Path) -> None:
    table = Table(title="Recipe: held-out results", title_justify="left")
    for column in ("", "before (SFT)", "after PPO-max"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("reward", f"{summary['reward_before']:.3f}", f"{summary['reward_after']:.3f}")
    if "gold_before" in summary:
        table.add_row("share that follows the rule", f"{summary['gold_before']:.3f}", f"{summary['gold_after']:.3f}")
    for name, label in (("response_length", "response length, tokens"), ("perplexity", "perplexity of the response")):
        table.add_row(label, f"{summary[name + '_before']:.2f}", f"{summary[name + '_after']:.2f}")
    table.add_row("KL to SFT, nats per token", "0", f"{summary['kl']:.4f}")
    console = Console()
    console.print()
    console.print(table)
    rise = (summary["reward_after"] - summary["reward_before"]) / max(summary["reward_std_before"], 1e-9)
    console.print(
        f"reward rose by {rise:.2f} standard deviations of the SFT policy's rewards; "
        f"reward-model accuracy {summary['reward_model_accuracy']:.3f}; "
        f"largest logit difference to transformers {summary['export_max_logit_diff']:.1e}; {summary['seconds']:.0f} s",
        highlight=False,
    )
    for name in ("summary.json", "report.html", "samples.md", "plots", "ppo/hf"):
        console.print(f"wrote {output / name}", highlight=False)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
