"""`ppomax evaluate-reward`: accuracy, calibration and length bias of a reward model on a file of preference pairs.

DIR gets results.json and pairs.jsonl: scores and lengths of every pair. Also under torchrun.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ppomax.engine.config import DataSource
from ppomax.engine.data.datasets import Dataset, PairRow, load_pairs
from ppomax.engine.errors import ConfigError, DataError
from ppomax.engine.judge.calibration import describe_margins
from ppomax.engine.judge.tables import Table
from ppomax.engine.models.roles import load_role, role_groups
from ppomax.engine.parallel.collectives import raise_on_all
from ppomax.engine.ppo.evaluation import pair_sequences
from ppomax.engine.ppo.scoring import sequence_scores
from ppomax.tools.inference import joined_ranks, load_template, score_config


def main(argv: Sequence[str]) -> None:
    """`ppomax evaluate-reward MODEL --pairs FILE --output DIR [section.field=value ...]`."""
    parser = argparse.ArgumentParser(prog="ppomax evaluate-reward", description=__doc__, allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="Hugging Face folder of a reward model")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="data.on_bad_row=skip, ...")
    parser.add_argument(
        "--pairs", required=True, action="append", metavar="FILE[=CATEGORY]", help="hh or pairs file; may be repeated"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for results.json and pairs.jsonl")
    given = parser.parse_intermixed_args(argv)
    config = score_config(given.model, given.overrides)
    template = load_template(config)
    sources = [_source(text) for text in given.pairs]
    dataset = load_pairs(config.data, sources, template)
    with joined_ranks(config):
        reward = load_role("reward", given.model, config, role_groups(config)["reward"], scalar=True)
        limit = config.train.tokens_per_microbatch
        scores = sequence_scores(reward, pair_sequences(dataset.rows), tokens_per_microbatch=limit)
        reward.groups.give_to_all(scores)
        with raise_on_all(ConfigError, f"{given.output} cannot be written"):
            if dist.get_rank() == 0:
                print(dataset.summary())
                _write(given, dataset, scores.view(-1, 2).cpu())


def _source(text: str) -> DataSource:
    path, _, category = text.partition("=")
    return DataSource(path=path, category=category)


def _write(given: argparse.Namespace, dataset: Dataset[PairRow], scores: torch.Tensor) -> None:
    rows = dataset.rows
    if not bool(scores.isfinite().all()):
        raise DataError(f"{given.model} gives {int((~scores.isfinite()).sum())} scores that are no numbers")
    differences = torch.tensor([len(row.chosen) - len(row.rejected) for row in rows])
    margins = scores.double()[:, 0] - scores.double()[:, 1]
    result = describe_margins(margins, differences, [row.category for row in rows])
    given.output.mkdir(parents=True, exist_ok=True)
    content = {"model": given.model, "pairs": given.pairs, "num_skipped": len(dataset.skipped), **result}
    (given.output / "results.json").write_text(json.dumps(content, indent=1, allow_nan=False))
    with (given.output / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for row, (chosen, rejected) in zip(rows, scores.tolist(), strict=True):
            lengths = [len(row.chosen) - row.prompt_length, len(row.rejected) - row.prompt_length]
            record = {"source": row.source, "line": row.line, "chosen": chosen, "rejected": rejected}
            file.write(json.dumps(record | {"lengths": lengths, "category": row.category}) + "\n")
    print(_report(result))
    print(f"wrote {given.output / 'results.json'} and {given.output / 'pairs.jsonl'}")


def _report(result: dict[str, Any]) -> str:
    """Tables for a terminal: accuracy, reliability, length."""
    accuracies = [
        (name, str(found["num_pairs"]), _share(found), f"{found['margin_mean']:.3f}", f"{found['margin_std']:.3f}")
        for name, found in [("all", result), *result["categories"].items()]
    ]
    reliability = [
        (
            f"{row['from']:.2f} to {row['to']:.2f}",
            str(row["num_pairs"]),
            f"{row['confidence']:.3f}",
            f"{row['accuracy']:.3f}",
        )
        for row in result["calibration"]["bins"]
        if row["num_pairs"]
    ]
    lengths = [
        (f"{row['from']} to {row['to']}", str(row["num_pairs"]), _share(row)) for row in result["length"]["bins"]
    ]
    length = result["length"]
    lines = [
        Table(("pairs", "n", "accuracy", "margin", "std"), tuple(accuracies), num_texts=1).text(),
        "",
        f"expected calibration error {result['calibration']['expected_calibration_error']:.3f}, log loss "
        f"{result['log_loss']:.3f} (a coin: {math.log(2):.3f})",
        Table(("confidence", "n", "mean", "accuracy"), tuple(reliability), num_texts=1).text(),
        "",
        Table(("chosen longer by (tokens)", "n", "accuracy"), tuple(lengths), num_texts=1).text(),
    ]
    if length["prefers_longer"] is not None:
        low, high = length["prefers_longer_interval"]
        lines.append(
            f"prefers the longer response in {100 * length['prefers_longer']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
            f" of the pairs; chosen is the longer one in {100 * length['longer_is_chosen']:.1f} %"
        )
    return "\n".join(lines)


def _share(found: dict[str, Any]) -> str:
    low, high = found["accuracy_interval"]
    return f"{100 * found['accuracy']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
