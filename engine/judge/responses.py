"""Files of responses, as `ppomax generate` and `ppomax evaluate` write them, and the pairs of two such files."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ppomax.engine.data.chat import check_turns
from ppomax.engine.data.readers import Turns, parse, read, read_category
from ppomax.engine.errors import DataError


@dataclass(frozen=True)
class Response:
    """prompt: turns, the last one human. category: "" where the row has none."""

    prompt: Turns
    text: str
    category: str


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt."""

    prompt: Turns
    a: str
    b: str
    category: str


@dataclass(frozen=True)
class Pairs:
    """rows: in the order of the first file. unpaired_a, unpaired_b: responses to prompts of one file alone.
    failed: rows that hold an error instead of a response.
    """

    rows: tuple[Pair, ...]
    unpaired_a: int
    unpaired_b: int
    failed: int

    def summary(self) -> str:
        return (
            f"{len(self.rows)} pairs; responses without a counterpart: {self.unpaired_a} of the first file, "
            f"{self.unpaired_b} of the second; {self.failed} rows without a response"
        )


def read_pairs(path_a: str, path_b: str) -> Pairs:
    """Responses of two files to the same prompts; several to one prompt meet in the order of the files.

    Raises DataError for a file that cannot be read, a bad row, and files without a common prompt.
    """
    (side_a, failed_a), (side_b, failed_b) = read_responses(path_a), read_responses(path_b)
    waiting: dict[Turns, list[Response]] = {}
    for response in reversed(side_b):
        waiting.setdefault(response.prompt, []).append(response)
    rows = []
    for one in side_a:
        if others := waiting.get(one.prompt):
            other = others.pop()
            rows.append(Pair(one.prompt, one.text, other.text, one.category or other.category))
    if not rows:
        raise DataError(f"{path_a} and {path_b} have no prompt in common; give responses to the same prompts")
    return Pairs(tuple(rows), len(side_a) - len(rows), len(side_b) - len(rows), failed_a + failed_b)


def read_responses(path: str) -> tuple[list[Response], int]:
    """Responses of a file, and how many of its rows have an error in their place."""
    responses, failed = [], 0
    for record in read(path):
        try:
            if record.fault is not None:
                raise DataError(record.fault)
            if isinstance(record.value, dict) and "error" in record.value:
                failed += 1
                continue
            responses.append(_response(record.value))
        except DataError as error:
            raise DataError(f"{path} line {record.line}: {error}") from None
    if not responses:
        raise DataError(f"{path} has no responses; expected rows with prompt and response")
    return responses, failed


def _response(value: Any) -> Response:
    if not isinstance(value, dict) or not isinstance(value.get("response"), str):
        raise DataError("the row has no text under 'response'; expected a row of `ppomax generate` or `evaluate`")
    prompt = value.get("prompt")
    if isinstance(prompt, list):  # samples.jsonl calls the text of a turn "text"
        prompt = [
            turn | {"content": turn.get("content", turn.get("text"))} if isinstance(turn, dict) else turn
            for turn in prompt
        ]
    turns, _ = parse({"prompt": prompt}, "prompts", with_rejected=False)
    check_turns(turns, last="human")
    return Response(turns, value["response"], read_category(value))


def count_categories(categories: Sequence[str]) -> dict[str, int]:
    """How often each category occurs, in the order in which they appear; rows without one are left out."""
    return dict(Counter(category for category in categories if category))
