"""`ppomax multiple-choice`: accuracy of a model on questions with options, by log-likelihood: the alignment tax.

Before and after PPO, on the same questions, with examples from --dev (the paper's Fig. 12 with C-Eval). DIR gets
results.json and questions.jsonl. Also under torchrun.
"""

import argparse
import json
import string
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist

from ppomax.engine.errors import ConfigError, DataError
from ppomax.engine.judge.multiple_choice import (
    Choice,
    Encoded,
    Language,
    Question,
    choose,
    encode_question,
    read_categories,
    read_questions,
    summarise_answers,
)
from ppomax.engine.judge.tables import Table
from ppomax.engine.models.roles import Role
from ppomax.engine.parallel.collectives import raise_on_all
from ppomax.engine.ppo.scoring import token_logprobs
from ppomax.engine.ppo.types import Rollout
from ppomax.tools.inference import inference_config, joined_ranks, load_model, load_template, printable

SEQUENCES_PER_CHUNK = 512
"""Prompts with an option each that are scored in one go: bounds the [B, T] tensors."""


def main(argv: Sequence[str]) -> None:
    """`ppomax multiple-choice MODEL --questions PATH [--dev PATH] --output DIR [section.field=value ...]`."""
    parser = argparse.ArgumentParser(prog="ppomax multiple-choice", description=__doc__, allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="Hugging Face folder of a language model")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="data.max_length=2048, ...")
    parser.add_argument("--questions", type=Path, required=True, metavar="PATH", help="file or folder, .csv or .jsonl")
    parser.add_argument("--dev", type=Path, metavar="PATH", help="questions with answers as examples, by subject")
    parser.add_argument("--shots", type=int, default=5, metavar="N", help="examples of --dev per prompt (default 5)")
    parser.add_argument("--language", choices=get_args(Language), default="en", help="of the prompt (default en)")
    parser.add_argument(
        "--choice",
        choices=get_args(Choice),
        default="letter",
        help="letter: the likeliest of A, B, C, D behind a list (default); option: the likeliest text per token",
    )
    parser.add_argument("--categories", type=Path, metavar="FILE.json", help='{"subject": "STEM", ...}')
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="results.json, questions.jsonl")
    given = parser.parse_intermixed_args(argv)
    if given.shots < 0:
        raise ConfigError(f"--shots {given.shots}: expected 0 or more")
    config = inference_config(given.model, given.overrides)
    template = load_template(config)
    questions = _questions(given)
    examples = _examples(given)
    encoded = [
        encode_question(
            question,
            examples.get(question.subject, [])[: given.shots],
            template.tokenizer,
            language=given.language,
            choice=given.choice,
            max_tokens=config.data.max_length,
        )
        for question in questions
    ]
    with joined_ranks(config):
        role = load_model(config, template).role
        logprobs = score_options(
            role, encoded, pad_id=template.tokenizer.pad_id, tokens_per_microbatch=config.train.tokens_per_microbatch
        )
        with raise_on_all(ConfigError, f"{given.output} cannot be written"):
            if dist.get_rank() == 0:
                _write(given, questions, encoded, logprobs)


def _questions(given: argparse.Namespace) -> list[Question]:
    questions = read_questions(given.questions)
    if given.categories is None:
        return questions
    try:
        categories = read_categories(given.categories, json.loads(given.categories.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"--categories {given.categories} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"--categories {given.categories} is not JSON") from None
    return [replace(question, category=categories.get(question.subject, "")) for question in questions]


def _examples(given: argparse.Namespace) -> dict[str, list[Question]]:
    """Examples by subject; every subject without enough of them is left with those that it has."""
    examples: dict[str, list[Question]] = {}
    for question in read_questions(given.dev) if given.dev else ():
        examples.setdefault(question.subject, []).append(question)
    return examples


def score_options(
    role: Role, encoded: Sequence[Encoded], *, pad_id: int, tokens_per_microbatch: int
) -> list[list[float]]:
    """Sum of the log-probs, nats, of each option's tokens behind its prompt. Every rank must call it."""
    sequences = [(row.prompt, option) for row in encoded for option in row.options]
    sums: list[float] = []
    for first in range(0, len(sequences), SEQUENCES_PER_CHUNK):
        rollout = _as_rollout(sequences[first : first + SEQUENCES_PER_CHUNK], pad_id, role.device)
        logprobs, _ = token_logprobs(role, rollout, tokens_per_microbatch=tokens_per_microbatch)
        role.groups.give_to_all(logprobs)
        sums += logprobs.double().sum(1).tolist()
    rest = iter(sums)
    return [[next(rest) for _ in row.options] for row in encoded]


def _as_rollout(sequences: Sequence[tuple[list[int], list[int]]], pad_id: int, device: torch.device) -> Rollout:
    """Prompts with options in the place of responses."""
    starts = torch.tensor([len(prompt) for prompt, _ in sequences])
    lengths = torch.tensor([len(prompt) + len(option) for prompt, option in sequences])
    tokens = torch.full((len(sequences), int(lengths.max())), pad_id)
    for b, (prompt, option) in enumerate(sequences):
        tokens[b, : lengths[b]] = torch.tensor([*prompt, *option])
    columns = torch.arange(tokens.shape[1] - 1)
    mask = (columns >= starts[:, None] - 1) & (columns < lengths[:, None] - 1)
    unknown = torch.zeros(mask.shape, device=device)
    finished = torch.zeros(len(sequences), dtype=torch.bool, device=device)
    return Rollout(tokens.to(device), starts.to(device), lengths.to(device), mask.to(device), finished, unknown)


def _write(
    given: argparse.Namespace,
    questions: Sequence[Question],
    encoded: Sequence[Encoded],
    logprobs: Sequence[Sequence[float]],
) -> None:
    if any(x != x for row in logprobs for x in row):
        raise DataError(f"{given.model} gives log-probs that are no numbers; is the model damaged?")
    sizes = [[len(option) for option in row.options] for row in encoded]
    choices = [choose(row, size, given.choice) for row, size in zip(logprobs, sizes, strict=True)]
    result = summarise_answers(questions, choices)
    fewer = sum(row.num_shots < given.shots for row in encoded)
    settings = {
        "model": given.model,
        "questions": str(given.questions),
        "dev": None if given.dev is None else str(given.dev),
        "shots": given.shots,
        "num_with_fewer_shots": fewer,
        "language": given.language,
        "choice": given.choice,
    }
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "results.json").write_text(json.dumps(settings | result, indent=1), encoding="utf-8")
    with (given.output / "questions.jsonl").open("w", encoding="utf-8") as file:
        for question, row, size, chosen in zip(questions, logprobs, sizes, choices, strict=True):
            record = {
                "subject": question.subject,
                "line": question.line,
                "answer": string.ascii_uppercase[question.answer],
                "choice": string.ascii_uppercase[chosen],
                "logprobs": list(row),
                "num_tokens": size,
            }
            file.write(json.dumps(record) + "\n")
    print(printable(answer_table(result).text()))
    if fewer and given.dev is not None:
        print(f"{fewer} of {len(questions)} questions had fewer than {given.shots} examples")
    print(f"wrote {given.output / 'results.json'} and {given.output / 'questions.jsonl'}")


def answer_table(result: dict[str, Any]) -> Table:
    """A row per category and one for all, in per cent: the mean of the subjects (Fig. 12), the share of questions."""
    rows = []
    for name, found in [*result["categories"].items(), ("average", result)]:
        low, high = found["accuracy_interval"]
        share = f"{100 * found['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        rows.append((name, f"{100 * found['average']:.1f}", share, str(found["num_questions"])))
    return Table(("category", "mean of subjects %", "of questions %", "n"), tuple(rows), num_texts=1)
