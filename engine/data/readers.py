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

Format = Literal["hh", "dialogues", "pairs", "prompts", "sft"]
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
    if "prompt" in keys:
        return "prompts"
    raise ConfigError(
        f"the format of {path} cannot be told from line {record.line} ({_describe(value)}); "
        "set format of this source to hh, dialogues, pairs, prompts or sft"
    )


def parse(value: Any, format: Format, *, with_rejected: bool) -> tuple[Turns, Turns | None]:
    """(turns, rejected turns) of a row. Only pairs need the rejected side; without it, it may be anything."""
    if format == "dialogues":
        return _turns(value, "the row"), None
    if not isinstance(value, dict):
        raise DataError(f"the row is {_describe(value)}, expected an object")
    name = {"sft": "messages", "prompts": "prompt"}.get(format, "chosen")
    return _side(value, name, format), _side(value, "rejected", format) if with_rejected else None


def read_category(value: Any) -> str:
    """The text under "category" of a row (helpful, harmless, ...), by which evaluations are split; "" without one."""
    category = value.get("category") if isinstance(value, dict) else None
    return category if isinstance(category, str) else ""


def _side(row: dict[str, Any], name: str, format: Format) -> Turns:
    """Turns of a field that holds text (hh), turns (pairs, sft) or either (prompts)."""
    value = row.get(name)
    if value is None:
        raise DataError(f"the row has no {name!r}; it is {_describe(row)}")
    if format in ("pairs", "sft") or (format == "prompts" and isinstance(value, list)):
        return _turns(value, name)
    if not isinstance(value, str):
        raise DataError(f"{name} is {_describe(value)}, expected a string")
    if format == "prompts" and not value.startswith("\n\nHuman:"):
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
