"""Rollouts on disk, for people to read: text and numbers of each token of some responses of an iteration."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ppomax.engine.config_monitor import MonitorConfig
from ppomax.engine.data.text_stream import token_pieces
from ppomax.engine.data.tokenizer import Tokenizer
from ppomax.engine.ppo.types import Experience

COLUMNS = ("logprobs", "ref_logprobs", "kl", "advantages", "values", "token_rewards")
"""Of Experience: one number per token of a response."""


def write_rollouts(
    folder: Path, step: int, experience: Experience, tokenizer: Tokenizer, monitor: MonitorConfig
) -> None:
    """Writes folder/rollouts/step_NNNNNN.jsonl (or .parquet): a row per response, monitor.rollouts_size at most.

    For one rank to call: it has the global batch. The file appears when it is complete.
    """
    rows = rollout_rows(step, experience, tokenizer, monitor.rollouts_size)
    (folder / "rollouts").mkdir(parents=True, exist_ok=True)
    path = folder / "rollouts" / f"step_{step:06d}.{monitor.rollouts_format}"
    write: Callable[[Path, list[dict[str, Any]]], None] = {"jsonl": _jsonl, "parquet": _parquet}[path.suffix[1:]]
    partial = path.with_name(f"{path.name}.partial")
    write(partial, rows)
    os.replace(partial, path)


def rollout_rows(step: int, experience: Experience, tokenizer: Tokenizer, num_rows: int) -> list[dict[str, Any]]:
    """What is written: step, index in the rollout, prompt and response as text, finished (by EOS), score (raw), length
    (tokens), and of every token of the response: tokens (its id), pieces (its text), COLUMNS.

    Pieces of a response are together its text, special tokens included. A number that is not finite is null. One
    transfer from the device.
    """
    rollout = experience.rollout
    n, width = rollout.tokens[:num_rows].shape
    parts = [rollout.tokens, rollout.prompt_lengths, rollout.lengths, rollout.finished, experience.scores]
    parts += [getattr(experience, name) for name in COLUMNS]
    # float64 holds ids, lengths and fp32 exactly.
    flat = torch.cat([part[:num_rows].double().flatten() for part in parts]).cpu()
    sizes = [n * width, n, n, n, n, *[n * (width - 1)] * len(COLUMNS)]
    tokens, prompt_lengths, lengths, finished, scores, *columns = flat.split(sizes)
    rows = []
    for b, ids in enumerate(tokens.view(n, width).long().tolist()):
        start, end = int(prompt_lengths[b]), int(lengths[b])
        pieces = token_pieces(tokenizer, ids[:end])
        row = {
            "step": step,
            "index": b,
            "prompt": "".join(pieces[:start]),
            "response": "".join(pieces[start:]),
            "finished": bool(finished[b]),
            "score": _number(float(scores[b])),
            "length": end - start,
            "tokens": ids[start:end],
            "pieces": pieces[start:],
        }
        for name, column in zip(COLUMNS, columns, strict=True):
            # Column t is about token t + 1.
            row[name] = [_number(x) for x in column.view(n, width - 1)[b, start - 1 : end - 1].tolist()]
        rows.append(row)
    return rows


def _number(x: float) -> float | None:
    """Seven digits are what fp32 has; JSON has no NaN."""
    return float(f"{x:.7g}") if math.isfinite(x) else None


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
