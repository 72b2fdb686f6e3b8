"""Data files to dialogues: rows of .jsonl, .json (both also gzipped) and `datasets`, in the formats of `DataSource`.

A fault of one row is a DataError without file and line, which the caller knows and adds; a fault of a whole file names
it. Messages never hold the text of a row.
"""

import gzip
import importlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ppomax.engine.data.chat import Role, Turn, parse_hh
from ppomax.engine.errors import ConfigError, DataError

Format = Literal["hh", "dialogues", "pairs", "prompts", "sft", "steps"]
Turns = tuple[Turn, ...]

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


@dataclass(frozen=True)
class Record:
    """One row as read: its value, or the fault that kept it from being read. line: from 1; in a list, the row."""

    line: int
    value: Any = None
    fault: str | None = None


def read(path: str) -> Iterator[Record]:
    """Rows of a file or of a `datasets` split. Raises DataError where the whole of it cannot be read."""
    if path.startswith("datasets:"):
        yield from _read_datasets(path)
        return
    if not path.endswith(SUFFIXES):
        raise ConfigError(f"{path!r} is not a data file; expected {', '.join(SUFFIXES)} or datasets:NAME[:SPLIT]")
    read = _read_lines if path.removesuffix(".gz").endswith(".jsonl") else _read_list
    line = 0
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else Path(path).open("rb") as file:
            for record in read(path, file):
                line = record.line
                yield record
    except FileNotFoundError:
        raise DataError(f"no such file: {path}; check the path in [data]") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is a damaged gzip file, {line} rows could be read: {error}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _read_lines(path: str, file: Any) -> Iterator[Record]:
    for line, raw in enumerate(file, 1):
        if not raw.strip():
            continue
        try:
            yield Record(line, json.loads(raw.decode("utf-8-sig")))
        except UnicodeDecodeError as error:
            yield Record(line, fault=f"byte {error.start} of the line is not UTF-8")
        except (ValueError, RecursionError) as error:
            yield Record(line, fault=f"malformed JSON: {_json_fault(error)}")


def _read_list(path: str, file: Any) -> Iterator[Record]:
    try:
        rows = json.loads(file.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start} of {path} is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is malformed JSON: {_json_fault(error)}; name it .jsonl if it has a row per line"
        ) from None
    if not isinstance(rows, list):
        raise DataError(f"{path} holds {_describe(rows)}, expected a list of rows")
    yield from (Record(number, row) for number, row in enumerate(rows, 1))


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return str(error)
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)[:100]


def _read_datasets(path: str) -> Iterator[Record]:
    _, name, *split = path.split(":", 2)
    try:
        library = importlib.import_module("datasets")
    except ImportError:
        raise ConfigError(
            f"{path!r} needs the datasets library; install it with pip install ppomax[datasets]"
        ) from None
    try:
        rows = library.load_dataset(name, split=split[0] if split else "train")
    except Exception as error:  # the library raises errors of a dozen modules
        raise DataError(f"{path!r} cannot be loaded: {type(error).__name__}: {str(error)[:300]}") from None
    yield from (Record(number, row) for number, row in enumerate(rows, 1))


def find_format(path: str, record: Record) -> Format:
    value = record.value
    if isinstance(value, list):
        return "dialogues"
    keys = {key for key, item in value.items() if item is not None} if isinstance(value, dict) else set()
    if "chosen" in keys:
        return "pairs" if isinstance(value["chosen"], list) else "hh"
    if "messages" in keys:
        return "sft"
    if "steps" in keys or {"question", "label"} <= keys:
        return "steps"
    if "prompt" in keys:
        return "prompts"
    raise ConfigError(
        f"the format of {path} cannot be told from line {record.line} ({_describe(value)}); "
        "set format of this source to hh, dialogues, pairs, prompts, sft or steps"
    )


def parse(value: Any, format: Format, *, with_rejected: bool) -> tuple[Turns, Turns | None]:
    """(turns, rejected turns) of a row. Only pairs need the rejected side; without it, it may be anything."""
    if format == "dialogues":
        return _turns(value, "the row"), None
    if not isinstance(value, dict):
        raise DataError(f"the row is {_describe(value)}, expected an object")
    if format == "steps":
        value = {"prompt": _problem(value)}
    name = {"sft": "messages", "prompts": "prompt", "steps": "prompt"}.get(format, "chosen")
    return _side(value, name, format), _side(value, "rejected", format) if with_rejected else None


def read_category(value: Any) -> str:
    """The text under "category" of a row (helpful, harmless, ...), by which evaluations are split; "" without one."""
    category = value.get("category") if isinstance(value, dict) else None
    return category if isinstance(category, str) else ""


def parse_answer(value: Any) -> str:
    """The reference answer of a row, "" where it has none: text or a number, under "answer", in rows of PRM800K under
    "question" as "ground_truth_answer".
    """
    if not isinstance(value, dict):
        return ""
    question = value.get("question")
    answer = value.get("answer", question.get("ground_truth_answer") if isinstance(question, dict) else None)
    if answer is None:
        return ""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise DataError(f"answer is {_describe(answer)}, expected text or a number")
    return str(answer).strip()


def parse_steps(value: Any) -> tuple[tuple[str, ...], tuple[float | None, ...]]:
    """(steps, labels) of a row with the format steps; a label is in [-1, 1], None where the step has none.

    Three spellings: "steps" of texts beside "labels"; "steps" of {"text", "rating"}; "label" of PRM800K.
    """
    if not isinstance(value, dict):
        raise DataError(f"the row is {_describe(value)}, expected an object")
    if "steps" not in value and isinstance(value.get("label"), dict):
        pairs = _chosen_completions(value["label"].get("steps"))
    else:
        pairs = _labelled(value.get("steps"), value.get("labels"))
    for number, (text, label) in enumerate(pairs, 1):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"step {number} is {_describe(text) if text != '' else 'empty'}, expected text")
        if label is not None and not (isinstance(label, bool | int | float) and -1 <= label <= 1):
            raise DataError(
                f"the label of step {number} is {str(label)[:20]!r}, expected a number from -1 to 1, or null"
            )
    if all(label is None for _, label in pairs):
        raise DataError("no step has a label")
    return tuple(text for text, _ in pairs), tuple(None if label is None else float(label) for _, label in pairs)


def _labelled(steps: Any, labels: Any) -> list[tuple[Any, Any]]:
    if not isinstance(steps, list) or not steps:
        raise DataError(f"steps is {_describe(steps)}, expected a list of steps")
    if labels is None:
        if not all(isinstance(step, dict) and "rating" in step for step in steps):
            raise DataError('the row has no "labels", and not every step is {"text", "rating"}')
        return [(step.get("text"), step["rating"]) for step in steps]
    if not isinstance(labels, list) or len(labels) != len(steps):
        raise DataError(f"labels is {_describe(labels)}, expected a list of {len(steps)}, one per step")
    return list(zip(steps, labels, strict=True))


def _chosen_completions(steps: Any) -> list[tuple[Any, Any]]:
    """PRM800K: of each step the completion that the solution went on with. Where none was chosen, a human's, which
    counts as right; else the first one, with which the solution ends.
    """
    if not isinstance(steps, list) or not steps or not all(isinstance(step, dict) for step in steps):
        raise DataError(f"label.steps is {_describe(steps)}, expected a list of steps")
    pairs: list[tuple[Any, Any]] = []
    for number, step in enumerate(steps, 1):
        completions, chosen, human = (step.get(key) for key in ("completions", "chosen_completion", "human_completion"))
        if chosen is None and human is not None:
            pairs.append((human.get("text") if isinstance(human, dict) else human, 1))
            continue
        where = 0 if chosen is None else chosen
        if not isinstance(completions, list) or isinstance(where, bool) or not isinstance(where, int):
            raise DataError(f"step {number} of label.steps has no completions, or no number as chosen_completion")
        if not 0 <= where < len(completions) or not isinstance(completions[where], dict):
            raise DataError(f"step {number} of label.steps has no completion {where}")
        pairs.append((completions[where].get("text"), completions[where].get("rating")))
        if chosen is None:
            break
    return pairs


def _problem(row: dict[str, Any]) -> Any:
    """The prompt of a row with steps: "prompt", or PRM800K's question.problem."""
    question = row.get("question")
    return row.get("prompt", question.get("problem") if isinstance(question, dict) else None)


def _side(row: dict[str, Any], name: str, format: Format) -> Turns:
    """Turns of a field that holds text (hh), turns (pairs, sft) or either (prompts, steps)."""
    value = row.get(name)
    if value is None:
        raise DataError(f"the row has no {name!r}; it is {_describe(row)}")
    if format in ("pairs", "sft") or (format in ("prompts", "steps") and isinstance(value, list)):
        return _turns(value, name)
    if not isinstance(value, str):
        raise DataError(f"{name} is {_describe(value)}, expected a string")
    if format in ("prompts", "steps") and not value.startswith("\n\nHuman:"):
        return (Turn("human", value),)
    try:
        return tuple(parse_hh(value))
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def _turns(value: Any, name: str) -> Turns:
    """Turns of a list of texts (human first) or of {"role", "content"} objects."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{name} is {_describe(value)}, expected a list of turns")
    turns = []
    roles: dict[Any, Role] = {"user": "human", "human": "human", "assistant": "assistant"}
    for number, item in enumerate(value, 1):
        role: Role = "human" if number % 2 else "assistant"
        text = item
        if isinstance(item, dict):
            if item.get("role") == "system":
                raise DataError(f"turn {number} of {name} is a system turn; leave it out and set data.system_prompt")
            if not isinstance(item.get("role"), str) or item["role"] not in roles:
                raise DataError(f"turn {number} of {name} has no role user or assistant; it is {_describe(item)}")
            role, text = roles[item["role"]], item.get("content")
        if not isinstance(text, str):
            raise DataError(f"turn {number} of {name} is {_describe(text)}, expected a string")
        turns.append(Turn(role, text))
    return tuple(turns)


def _describe(value: Any) -> str:
    """What a JSON value is, without its text."""
    if isinstance(value, dict):
        keys = [key if len(key) <= 20 else key[:17] + "..." for key in list(value)[:5]]
        return f"an object with the keys {keys}{' ...' if len(value) > 5 else ''}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if value is None:
        return "null"
    return {str: "a string", bool: "true or false"}.get(type(value), "a number")
