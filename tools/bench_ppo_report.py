"""The report of bench_ppo.py: README.md, results.json and a picture of where the time goes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from ppomax.tools.bench_parts import part_table

NUMBERS = (
    *("seconds", "tokens_per_second", "seconds / products", "trl_seconds", "trl / ours", "gpu_peak_gib"),
    *("host_rss_gib", "padding_of_packs", "padding_of_a_padded_batch"),
)
COLUMNS = ("seconds", "share", "tokens_per_second", "mfu", "products_seconds")


@dataclass(frozen=True)
class Extra:
    """What another tool measured: for results.json, and lines for README.md."""

    record: dict[str, Any]
    lines: list[str]


def write_report(
    folder: Path, results: Sequence[dict[str, Any]], environment: dict[str, Any], extras: Mapping[str, Extra]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment, "results": results, **{name: e.record for name, e in extras.items()}}
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    names = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    text = [
        f"# PPO iterations on {environment['device']}",
        "",
        f"`{environment['command']}`, commit {environment['commit']}, {environment['date']}, {environment['ranks']} "
        f"rank(s); {names}.",
        "",
    ]
    if results:
        limits = results[0]["ceilings"]
        text += [
            f"Ceilings, measured before ({limits['what']}): {limits['bytes_per_second'] / 1e9:.3g} GB/s, "
            f"{limits['flops_per_second'] / 1e12:.3g} TFLOP/s.",
            "",
            "![where the time goes](phases.png)",
            "",
            "![who does what when](timeline.png)",
            "",
        ]
        _picture(folder / "phases.png", results)
        _timeline(folder / "timeline.png", results)
    for result in results:
        text += _case(result)
    for extra in extras.values():
        text += extra.lines
    (folder / "README.md").write_text("\n".join(text))
    print(f"wrote {folder}/README.md and results.json")


def _case(result: dict[str, Any]) -> list[str]:
    work = result["workload"]
    shape = work["shape"]
    text = [
        f"## {result['case']}",
        "",
        f"Hidden {shape['hidden_size']}, {shape['num_layers']} layers, vocabulary {shape['vocab_size']}, "
        f"{work['dtype']}; {work['prompts']} prompts of {work['prompt_tokens']} tokens, responses of "
        f"{result['response_length']:.1f} in the mean (limit {work['max_new_tokens']}), "
        f"{work['minibatches']} optimizer steps. Medians of {result['iterations']} "
        "iterations.",
        "",
    ]
    for key in NUMBERS:
        if key in result:
            text.append(f"* {key.replace('_', ' ')}: {result[key]:.3g}")
    text += ["", f"| phase | {' | '.join(name.replace('_', ' ') for name in COLUMNS)} |", f"|{'---|' * 6}"]
    for phase, values in result["phases"].items():
        cells = (f"{values[name]:.3g}" if name in values else "" for name in COLUMNS)
        text.append(f"| {phase} | {' | '.join(cells)} |")
    text += [
        "",
        "Parts, of rank 0; rates of one rank. Least: operations or bytes that the part cannot do without, at the "
        "ceilings above; numbers that stay in a CPU's caches can be faster.",
        "",
    ]
    return [*text, *part_table(result["parts"]), ""]


def _picture(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """One bar per case, phases end to end; the products alone below it."""
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.9 * len(results)))
    phases = list(dict.fromkeys(phase for result in results for phase in result["phases"]))
    for row, result in enumerate(results):
        for key, height, offset in (("seconds", 0.45, 0.0), ("products_seconds", 0.2, 0.35)):
            begin = 0.0
            for number, phase in enumerate(phases):
                seconds = result["phases"].get(phase, {}).get(key, 0.0)
                label = phase if row == 0 and key == "seconds" else None
                axes.barh(row + offset, seconds, height, left=begin, color=f"C{number}", label=label)
                begin += seconds
    axes.set_yticks(range(len(results)), [result["case"] for result in results])
    axes.invert_yaxis()
    axes.set_xlabel("seconds of an iteration (thin: the matrix products alone)")
    axes.legend(ncols=len(phases), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def _timeline(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """The last iteration of each case: a row per rank, and what it worked on."""
    rows = [(result["case"], rank) for result in results for rank in range(len(result["timeline"]))]
    figure, axes = pyplot.subplots(figsize=(10, 1.2 + 0.6 * len(rows)))
    palette = pyplot.get_cmap("tab20")
    colours: dict[str, Any] = {}
    for row, (case, rank) in enumerate(rows):
        timelines = next(result["timeline"] for result in results if result["case"] == case)
        begin = min(event["start"] for events in timelines for event in events)
        for event in timelines[rank]:
            colour = colours.setdefault(event["name"], palette(len(colours) % palette.N))
            height = 0.7 if event["name"] == "rollout" else 0.45  # its steps lie in it
            place = float(row)
            for other in timelines[rank]:
                is_beside = other["start"] < event["end"] and event["start"] < other["end"] and other is not event
                if is_beside and "rollout" not in (event["name"], other["name"]):
                    height = 0.22  # two at a time, on half of the threads each
                    place = row + (0.12 if event["name"] > other["name"] else -0.12)
            axes.barh(place, event["end"] - event["start"], height, left=event["start"] - begin, color=colour)
    axes.set_yticks(range(len(rows)), [f"{case}, rank {rank}" for case, rank in rows])
    axes.invert_yaxis()
    axes.set_xlabel("seconds of the last iteration")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    axes.legend(handles, list(colours), ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
