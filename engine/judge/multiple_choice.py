"""Multiple-choice questions: files, few-shot prompts, choices from log-likelihoods, averages of subjects.

Files are those of C-Eval and its like: .csv or .jsonl with question, A, B, C, D and answer; one file per subject, or a
column subject. Options go on from A as far as columns are there.
"""

import csv
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ppomax.engine.data.readers import SUFFIXES, read
from ppomax.engine.data.tokenizer import Tokenizer
from ppomax.engine.errors import ConfigError, DataError
from ppomax.engine.judge.intervals import LEVEL, wilson

Language = Literal["en", "zh"]
Choice = Literal["letter", "option"]
SPLITS = ("_dev", "_val", "_test")
"""Ends of file names that do not belong to the subject."""
LARGEST_CELL = 2**24


@dataclass(frozen=True)
class Question:
    """options: texts of A, B, ...; answer: index of the right one. line: where it was read."""

    subject: str
    text: str
    options: tuple[str, ...]
    answer: int
    category: str
    line: int


@dataclass(frozen=True)
class Wording:
    """What stands around questions. after_answer: between "Answer:" and what is chosen."""

    head: str
    answer: str
    after_answer: str


WORDINGS: dict[Language, Wording] = {
    "en": Wording("The following are multiple choice questions (with answers) about {subject}.", "Answer:", " "),
    "zh": Wording("以下是关于{subject}的单项选择题,请选出其中的正确答案。", "答案:", ""),
}


def read_questions(path: Path) -> list[Question]:
    """Questions of a file, or of all .csv and .jsonl files of a folder in the order of their names.

    Raises DataError for what cannot be read and for a bad row, with its line.
    """
    paths = sorted(p for p in path.iterdir() if p.name.endswith((".csv", *SUFFIXES))) if path.is_dir() else [path]
    questions = []
    for file in paths:
        stem = file.name.split(".")[0]
        subject = next((stem.removesuffix(split) for split in SPLITS if stem.endswith(split)), stem)
        for line, row in _rows(file):
            try:
                questions.append(_question(row, subject, line))
            except DataError as error:
                raise DataError(f"{file} line {line}: {error}") from None
    if not questions:
        raise DataError(f"{path} has no questions; expected .csv or .jsonl with question, A, B, C, D, answer")
    return questions


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    if not path.name.endswith(".csv"):
        for record in read(str(path)):
            if record.fault is not None:
                raise DataError(f"{path} line {record.line}: {record.fault}")
            yield record.line, record.value
        return
    limit = csv.field_size_limit(LARGEST_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            for row in reader:
                yield reader.line_num, row
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no CSV file in UTF-8: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _question(row: Any, subject: str, line: int) -> Question:
    if not isinstance(row, dict):
        raise DataError("expected an object with question, A, B, C, D and answer")
    options = []
    for letter in string.ascii_uppercase:
        if not isinstance(row.get(letter), str):
            break
        options.append(row[letter].strip())
    text, answer = row.get("question"), row.get("answer")
    if not isinstance(text, str) or not text.strip():
        raise DataError("the question is empty")
    if len(options) < 2 or not all(options):
        raise DataError(f"{len(options)} options, or an empty one; expected texts in A, B, C, D")
    letters = string.ascii_uppercase[: len(options)]
    answer = answer.strip() if isinstance(answer, str) else ""
    if len(answer) != 1 or answer not in letters:
        raise DataError(f"the answer is {answer[:20]!r}; expected one of {', '.join(letters)}")
    own, category = row.get("subject"), row.get("category")
    return Question(
        own if isinstance(own, str) and own else subject,
        text.strip(),
        tuple(options),
        letters.index(answer),
        category if isinstance(category, str) else "",
        line,
    )


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt and of each option behind it; num_shots: examples that fit in front of the question."""

    prompt: list[int]
    options: list[list[int]]
    num_shots: int


def encode_question(
    question: Question,
    examples: Sequence[Question],
    tokenizer: Tokenizer,
    *,
    language: Language,
    choice: Choice,
    max_tokens: int,
) -> Encoded:
    """The few-shot prompt of a question. Where it is too long, the last examples are left out.

    choice: "letter" lists the options and asks for a letter; "option" asks for the text itself, without a list.
    Raises DataError where the question does not fit alone.
    """
    wording = WORDINGS[language]
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    options = [
        tokenizer.encode(wording.after_answer + _chosen(question, i, choice), continues=True)
        for i in range(len(question.options))
    ]
    longest = max(map(len, options))
    blocks = [_block(example, wording, choice) + wording.after_answer for example in examples]
    blocks = [block + _chosen(e, e.answer, choice) for block, e in zip(blocks, examples, strict=True)]
    for num_shots in range(len(examples), -1, -1):
        head = wording.head.format(subject=question.subject.replace("_", " "))
        text = "\n\n".join([head, *blocks[:num_shots], _block(question, wording, choice)])
        prompt = start + tokenizer.encode(text)
        if len(prompt) + longest <= max_tokens:
            return Encoded(prompt, options, num_shots)
    raise DataError(
        f"line {question.line} of {question.subject}: {len(prompt) + longest} tokens without an example, more than the "
        f"{max_tokens} that fit; raise data.max_length, or leave the question out"
    )


def _block(question: Question, wording: Wording, choice: Choice) -> str:
    listed = zip(string.ascii_uppercase, question.options, strict=False) if choice == "letter" else ()
    return "\n".join([question.text, *(f"{letter}. {text}" for letter, text in listed), wording.answer])


def _chosen(question: Question, index: int, choice: Choice) -> str:
    return string.ascii_uppercase[index] if choice == "letter" else question.options[index]


def choose(logprobs: Sequence[float], num_tokens: Sequence[int], choice: Choice) -> int:
    """The option with the largest log-likelihood; of texts ("option") the largest per token, so that length does not
    decide. The first of equal ones.
    """
    scores = [x / n if choice == "option" else x for x, n in zip(logprobs, num_tokens, strict=True)]
    return max(range(len(scores)), key=scores.__getitem__)


def summarise_answers(questions: Sequence[Question], choices: Sequence[int]) -> dict[str, Any]:
    """Accuracy per subject with its interval; per category and over all the mean of the subjects, as C-Eval has it, and
    beside it the share of questions with its interval.
    """
    subjects: dict[str, dict[str, Any]] = {}
    for question, chosen in zip(questions, choices, strict=True):
        row = subjects.setdefault(question.subject, {"category": question.category, "right": 0, "num_questions": 0})
        row["right"] += chosen == question.answer
        row["num_questions"] += 1
    for row in subjects.values():
        row |= _shares([row])
    names = dict.fromkeys(row["category"] for row in subjects.values() if row["category"])
    categories = {name: _shares([row for row in subjects.values() if row["category"] == name]) for name in names}
    return {"level": LEVEL, **_shares(list(subjects.values())), "categories": categories, "subjects": subjects}


def _shares(subjects: Sequence[dict[str, Any]]) -> dict[str, Any]:
    right, total = (sum(row[name] for row in subjects) for name in ("right", "num_questions"))
    return {
        "average": sum(row["right"] / row["num_questions"] for row in subjects) / len(subjects),
        "num_questions": total,
        "accuracy": right / total,
        "accuracy_interval": list(wilson(right, total)),
    }


def read_categories(path: Path, content: Any) -> dict[str, str]:
    """Category by subject, of {"subject": "STEM"} or C-Eval's {"subject": ["English", "Chinese", "STEM"]}."""
    try:
        found = {str(k): v if isinstance(v, str) else v[-1] for k, v in content.items()}
    except (AttributeError, TypeError, IndexError, KeyError):
        found = {}
    if not found or not all(isinstance(v, str) for v in found.values()):
        raise ConfigError(f'{path}: expected an object of "subject": "category", or of lists that end with it')
    return found
