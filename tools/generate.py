"""`ppomax generate`: responses of a model to a file of prompts, one JSON row each.

Rows are written as chunks of prompts end, into OUTPUT.partial, which takes the name OUTPUT when all are there. A
response depends on the seed and on the number of its prompt in the file, not on chunks, ranks or other prompts; the
first one to each prompt is that of `ppomax evaluate`. Text of a model is data: nothing in it is interpreted.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO, get_args

import torch
import torch.distributed as dist

from ppomax.engine.config import RunConfig
from ppomax.engine.data.chat import Template
from ppomax.engine.data.datasets import BadRow, PromptRow, fit_prompt
from ppomax.engine.data.readers import Format, Record, Turns, find_format, parse, read, read_category
from ppomax.engine.errors import ConfigError, DataError
from ppomax.engine.models.hf_config import read_shape
from ppomax.engine.parallel.collectives import raise_on_all
from ppomax.engine.ppo.evaluation import EVALUATION_STEP
from ppomax.engine.ppo.types import Rollout
from ppomax.engine.rollout.generate import generate, request_seeds
from ppomax.tools.inference import (
    Model,
    inference_config,
    load_template,
    open_model,
    printable,
    read_response,
    stop_sequences,
)

RESPONSES_PER_CHUNK = 4
"""In units of the responses that are decoded at the same time: what a crash can lose, and the idle places while the
last responses of a chunk end, stay small."""

Rows = list[dict[str, Any]]


def main(argv: Sequence[str]) -> None:
    """`ppomax generate MODEL --prompts FILE [--output FILE.jsonl] [section.field=value ...]`."""
    parser = argparse.ArgumentParser(prog="ppomax generate", description=__doc__, allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="Hugging Face folder of a language model")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="sampling.temperature=0, ...")
    parser.add_argument(
        "--prompts", required=True, metavar="FILE", help="any data file with prompts, or .txt: one prompt per line"
    )
    parser.add_argument("--format", choices=get_args(Format), help="of FILE (default: told from its first row)")
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", help="default: standard output")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="responses to each prompt (default 1)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="a response ends before TEXT; may be repeated"
    )
    parser.add_argument("--seed", type=int, help="short for train.seed=SEED")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.samples < 1:
        raise ConfigError(f"--samples {arguments.samples}: expected 1 or more")
    if "" in arguments.stop:
        raise ConfigError("--stop '': expected a text that ends a response")
    seed = [] if arguments.seed is None else [f"train.seed={arguments.seed}"]
    config = inference_config(arguments.model, [*arguments.overrides, *seed])
    template = load_template(config)
    prompts = read_prompts(arguments.prompts, arguments.format, config, template)
    check_output(arguments.output)
    with open_model(config, template) as model:
        writer = Writer(arguments.output, is_writer=dist.get_rank() == 0)
        respond_to_all(model, prompts, writer, samples=arguments.samples, stops=arguments.stop)


def read_prompts(path: str, format: Format | None, config: RunConfig, template: Template) -> list[PromptRow | BadRow]:
    """The prompts of a file in its order, and in their places the rows that are none, or are too long for the model.

    Raises DataError for a file that cannot be read or has no rows, ConfigError where its format cannot be told.
    """
    vocab_size = read_shape(config.model.policy).vocab_size
    limit = config.data.max_length - config.sampling.max_new_tokens
    rows: list[PromptRow | BadRow] = []
    for record in _read_text(path) if path.endswith(".txt") else read(path):
        try:
            if record.fault is not None:
                raise DataError(record.fault)
            format = format or find_format(path, record)
            turns, _ = parse(record.value, format, with_rejected=False)
            row = _prompt(turns, record.line, template, limit, vocab_size)
            rows.append(replace(row, category=read_category(record.value)))
        except DataError as error:
            rows.append(BadRow(path, record.line, str(error)))
    if not rows:
        raise DataError(f"{path} has no rows; give a file with prompts")
    return rows


def _read_text(path: str) -> Iterator[Record]:
    """Prompts of a text file, one per line; blank lines are none."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    for number, raw in enumerate(lines, 1):
        try:
            if raw.strip():
                yield Record(number, {"prompt": raw.decode("utf-8-sig")})
        except UnicodeDecodeError as error:
            yield Record(number, fault=f"byte {error.start} of the line is not UTF-8")


def _prompt(turns: Turns, line: int, template: Template, limit: int, vocab_size: int) -> PromptRow:
    tokens, kept = fit_prompt(turns, template, max_prompt_tokens=limit)
    if max(tokens) >= vocab_size:
        raise DataError(f"token id {max(tokens)} is outside the model's vocabulary of {vocab_size} tokens")
    return PromptRow(tokens, kept, source=0, line=line)


def check_output(path: Path | None) -> None:
    """Raises ConfigError where there is such a file already, or the rows of a run that did not end."""
    if path is None:
        return
    if path.exists():
        raise ConfigError(f"--output {path} exists; give another file, or remove this one")
    if _partial(path).exists():
        raise ConfigError(
            f"{_partial(path)} holds the rows of a run that did not end; remove it, or rename it to keep them"
        )


def _partial(path: Path) -> Path:
    return Path(f"{path}.partial")


class Writer:
    """JSON rows into a file that has its name when it is complete, or to standard output. Only one rank writes."""

    def __init__(self, path: Path | None, *, is_writer: bool) -> None:
        """Collective over the world. Raises ConfigError where the file cannot be made."""
        self.path, self.failure = path, f"{path or 'standard output'} cannot be written"
        self.file: TextIO | None = None
        with raise_on_all(ConfigError, self.failure):
            if is_writer:
                self.file = sys.stdout if path is None else _partial(path).open("x", encoding="utf-8")

    def write(self, rows: Rows) -> None:
        """Collective over the world."""
        with raise_on_all(ConfigError, self.failure):
            if self.file is not None:
                self.file.writelines(json_line(row) for row in rows)
                self.file.flush()

    def finish(self) -> None:
        """Names the complete file."""
        with raise_on_all(ConfigError, self.failure):
            if self.file is not None and self.path is not None:
                self.file.close()
                os.rename(_partial(self.path), self.path)


def json_line(row: dict[str, Any]) -> str:
    """One line of JSON: text as it is but for characters that a terminal would obey, which JSON can escape."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    if text.isprintable():
        return text + "\n"
    return "".join(c if printable(c) == c else json.dumps(c)[1:-1] for c in text) + "\n"


def respond_to_all(
    model: Model, prompts: Sequence[PromptRow | BadRow], writer: Writer, *, samples: int, stops: Sequence[str]
) -> None:
    """Writes `samples` rows for each prompt and one for each bad row, in the order of the file.

    Collective over the world. Raises DataError where all rows are bad, after their errors are written.
    """
    config = model.config
    seeds = torch.stack(
        [request_seeds(config.train.seed, EVALUATION_STEP, len(prompts), sample=s) for s in range(samples)], dim=1
    )
    places = config.sampling.batch_size * model.role.groups.layout.dp * RESPONSES_PER_CHUNK
    chunk = max(1, places // samples)
    progress = Progress(len(prompts), is_shown=dist.get_rank() == 0)
    for first in range(0, len(prompts), chunk):
        rows = respond(model, prompts[first : first + chunk], seeds[first : first + chunk], stops=stops)
        writer.write(rows)
        progress.add(rows, min(chunk, len(prompts) - first))
    writer.finish()
    bad = [row for row in prompts if isinstance(row, BadRow)]
    if len(bad) == len(prompts):
        raise DataError(f"no row of {bad[0].path} is a usable prompt; first fault: {bad[0]}")


def respond(model: Model, prompts: Sequence[PromptRow | BadRow], seeds: torch.Tensor, *, stops: Sequence[str]) -> Rows:
    """The rows of some prompts. seeds [len(prompts), samples] int64. Every rank must call it."""
    good = [number for number, row in enumerate(prompts) if isinstance(row, PromptRow)]
    tokens = [row.tokens for row in prompts if isinstance(row, PromptRow)]
    samples = seeds.shape[1]
    responses: dict[int, Rows] = {}
    if good:
        rollout = generate(
            model.role,
            tokens,
            model.config.sampling,
            seeds=seeds[good].flatten(),
            eos_id=model.tokenizer.eos_id,
            pad_id=model.tokenizer.pad_id,
            max_length=model.config.data.max_length,
            samples=samples,
            stop_sequences=stop_sequences(stops, model.tokenizer),
        )
        made = read_rollout(rollout, model, stops)
        responses = {number: made[i * samples : (i + 1) * samples] for i, number in enumerate(good)}
    rows: Rows = []
    for number, row in enumerate(prompts):
        if isinstance(row, BadRow):
            rows.append({"line": row.line, "error": row.fault})
        else:
            prompt = [{"role": "user" if t.role == "human" else "assistant", "content": t.text} for t in row.turns]
            more = {"category": row.category} if row.category else {}
            rows += [
                {"line": row.line, "sample": s, "prompt": prompt, **r, **more} for s, r in enumerate(responses[number])
            ]
    return rows


def read_rollout(rollout: Rollout, model: Model, stops: Sequence[str]) -> Rows:
    """response, finish, num_tokens, mean_logprob, score and num_prompt_tokens of every row of a rollout.

    score: as in engine/rollout/candidates.py, of the tokens that count.
    """
    columns = (rollout.tokens, rollout.sampling_logprobs, rollout.prompt_lengths, rollout.lengths, rollout.finished)
    rows: Rows = []
    for tokens, logprobs, start, end, finished in zip(*(column.tolist() for column in columns), strict=True):
        response = read_response(
            tokens[start:end],
            logprobs[start - 1 : end - 1],
            finished=finished,
            tokenizer=model.tokenizer,
            stops=stops,
            min_new_tokens=model.config.sampling.min_new_tokens,
        )
        mean = response.mean_logprob if response.mean_logprob is not None else math.nan
        score = mean * max(1, response.num_tokens) ** (1 - model.config.sampling.length_penalty)
        rows.append(
            {
                "response": response.text,
                "finish": response.finish,
                "num_tokens": response.num_tokens,
                "mean_logprob": mean if math.isfinite(mean) else None,
                "score": score if math.isfinite(score) else None,
                "num_prompt_tokens": start,
            }
        )
    return rows


class Progress:
    """A line on standard error after each chunk: prompts done, rows that failed, tokens per second of generation."""

    def __init__(self, num_prompts: int, *, is_shown: bool) -> None:
        self.num_prompts, self.is_shown = num_prompts, is_shown
        self.done = self.failed = self.tokens = 0
        self.started = time.perf_counter()

    def add(self, rows: Rows, num_prompts: int) -> None:
        self.done += num_prompts
        self.failed += sum("error" in row for row in rows)
        self.tokens += sum(row.get("num_tokens", 0) for row in rows)
        if not self.is_shown:
            return
        rate = self.tokens / (time.perf_counter() - self.started)
        failed = f", {self.failed} failed" if self.failed else ""
        line = f"{self.done}/{self.num_prompts} prompts{failed}, {self.tokens} tokens, {rate:.0f} tokens/s"
        if sys.stderr.isatty():
            line = f"\r{line}\x1b[K" + ("\n" if self.done == self.num_prompts else "")
        else:
            line += "\n"
        sys.stderr.write(line)
        sys.stderr.flush()
