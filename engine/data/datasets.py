"""Data files to rows of token ids: prompts, preference pairs, dialogues and solutions with labelled steps.

Files and formats are read by `readers.py`; what a template does with turns is in `chat.py`, the order of rows in
`order.py`, packing in `batches.py`.

Truncation, for every kind of row: while it is too long, the oldest turns are dropped, a human turn and its answer at a
time, so that the first turn left is human. Texts and responses are never cut. A pair loses the same turns on both
sides. A row that is too long with one exchange left is a bad row.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ppomax.engine.config import DataConfig, DataSource
from ppomax.engine.data.chat import Template, check_turns
from ppomax.engine.data.order import Order
from ppomax.engine.data.readers import (
    Format,
    Record,
    Turns,
    find_format,
    parse,
    parse_answer,
    parse_steps,
    read,
    read_category,
)
from ppomax.engine.data.response_steps import step_ends
from ppomax.engine.errors import ConfigError, DataError

NUM_FAULTS_SHOWN = 5


@dataclass(frozen=True)
class PromptRow:
    """tokens: prompt ids, up to where a response begins. turns: what they spell. source, line: where it was read.
    answer: the reference answer, for rewards; "" where the row has none. category: of the row, or of its source.
    """

    tokens: tuple[int, ...]
    turns: Turns
    source: int
    line: int
    answer: str = ""
    category: str = ""


@dataclass(frozen=True)
class PairRow:
    """chosen, rejected: ids of prompt, response and EOS. prompt_length: how many are the prompt's, spelled by turns."""

    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    prompt_length: int
    turns: Turns
    source: int
    line: int
    category: str = ""

    @property
    def num_tokens(self) -> int:
        return len(self.chosen) + len(self.rejected)


@dataclass(frozen=True)
class DialogueRow:
    """tokens: ids of a whole dialogue. loss_mask: True where the token is learned."""

    tokens: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    turns: Turns
    source: int
    line: int


@dataclass(frozen=True)
class SolutionRow:
    """tokens: ids of prompt, response and EOS. ends: positions of the last tokens of its labelled steps. targets:
    their labels as probabilities of being right, from 0 to 1.
    """

    tokens: tuple[int, ...]
    ends: tuple[int, ...]
    targets: tuple[float, ...]
    prompt_length: int
    turns: Turns
    source: int
    line: int

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


Row = TypeVar("Row", PromptRow, PairRow, DialogueRow, SolutionRow)


@dataclass(frozen=True)
class BadRow:
    """A row that was left out. line: counted from 1; of a .json list or a `datasets` split, the number of the row."""

    path: str
    line: int
    fault: str

    def __str__(self) -> str:
        return f"{self.path} line {self.line}: {self.fault}"


@dataclass(frozen=True)
class Dataset(Generic[Row]):
    """Rows of each source in file order, the sources' weights, and what was left out."""

    sources: tuple[tuple[Row, ...], ...]
    weights: tuple[float, ...]
    skipped: tuple[BadRow, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(len(rows) for rows in self.sources)

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows, source after source."""
        return tuple(row for rows in self.sources for row in rows)

    def order(self, seed: int) -> Order:
        """The order in which training takes the rows."""
        return Order(self.sizes, self.weights, seed)

    def take(self, order: Order, start: int, count: int) -> list[Row]:
        """The rows at positions start .. start + count - 1 of an order."""
        return [self.sources[source][row] for source, row in order.rows(start, count)]

    def summary(self) -> str:
        """`12 rows, 3 rows skipped`, and the first faults."""
        lines = [
            f"{sum(self.sizes)} rows, {len(self.skipped)} rows skipped",
            *map(str, self.skipped[:NUM_FAULTS_SHOWN]),
        ]
        if len(self.skipped) > NUM_FAULTS_SHOWN:
            lines.append(f"... and {len(self.skipped) - NUM_FAULTS_SHOWN} more")
        return "\n  ".join(lines)


def load_prompts(
    data: DataConfig, sources: Sequence[DataSource], template: Template, *, max_prompt_tokens: int
) -> Dataset[PromptRow]:
    """Prompts of at most max_prompt_tokens, from any format; an answer at the end is left off (of pairs, the chosen).

    Raises DataError for a file that cannot be read or has no usable row, and for a bad row unless data.on_bad_row is
    skip; ConfigError for a source that is not of these formats.
    """
    if max_prompt_tokens <= 0:
        raise ConfigError(
            f"{max_prompt_tokens} tokens are left for a prompt; raise data.max_length or shorten the response"
        )

    def build(turns: Turns, rejected: Turns | None, source: int, record: Record) -> PromptRow:
        tokens, kept = fit_prompt(turns, template, max_prompt_tokens=max_prompt_tokens)
        category = read_category(record.value) or sources[source].category
        return PromptRow(tokens, kept, source, record.line, parse_answer(record.value), category)

    return _load(data, sources, ("hh", "pairs", "prompts", "dialogues", "sft", "steps"), build)


def fit_prompt(turns: Turns, template: Template, *, max_prompt_tokens: int) -> tuple[tuple[int, ...], Turns]:
    """Prompt ids of at most max_prompt_tokens, and the turns that they spell; an answer at the end is left off.

    Raises DataError where the turns are no prompt, or too long with one turn left.
    """
    prompt = turns[:-1] if len(turns) > 1 and turns[-1].role == "assistant" else turns
    check_turns(prompt, last="human")
    kept = _fit(prompt, lambda turns: len(template.encode_prompt(turns)), max_prompt_tokens)
    return tuple(template.encode_prompt(kept)), kept


def load_pairs(data: DataConfig, sources: Sequence[DataSource], template: Template) -> Dataset[PairRow]:
    """Preference pairs of at most data.max_length tokens, from hh and pairs files. Raises as `load_prompts`."""

    def build(turns: Turns, rejected: Turns | None, source: int, record: Record) -> PairRow:
        assert rejected is not None
        for name, side in (("chosen", turns), ("rejected", rejected)):
            try:
                check_turns(side, last="assistant")
            except DataError as error:
                raise DataError(f"{name}: {error}") from None
        _check_same_context(turns, rejected)
        one, other = (template.encode_response(side[-1].text) for side in (turns, rejected))
        prompt, kept = fit_pair(turns[:-1], one, other, template, max_tokens=data.max_length)
        category = read_category(record.value) or sources[source].category
        return PairRow((*prompt, *one), (*prompt, *other), len(prompt), kept, source, record.line, category)

    return _load(data, sources, ("hh", "pairs"), build, with_rejected=True)


def fit_pair(
    prompt: Turns, one: Sequence[int], other: Sequence[int], template: Template, *, max_tokens: int
) -> tuple[tuple[int, ...], Turns]:
    """Prompt ids with which either response has at most max_tokens, and the turns that they spell.

    Raises DataError where the longer one does not fit with one turn left.
    """
    longest = max(len(one), len(other))
    kept = _fit(prompt, lambda turns: len(template.encode_prompt(turns)) + longest, max_tokens)
    return tuple(template.encode_prompt(kept)), kept


def load_dialogues(data: DataConfig, sources: Sequence[DataSource], template: Template) -> Dataset[DialogueRow]:
    """Dialogues of at most data.max_length tokens that end with an assistant turn; of pairs the chosen one.

    Raises as `load_prompts`.
    """

    def build(turns: Turns, rejected: Turns | None, source: int, record: Record) -> DialogueRow:
        check_turns(turns, last="assistant")
        kept = _fit(turns, lambda turns: len(template.encode_dialogue(turns)[0]), data.max_length)
        tokens, loss_mask = template.encode_dialogue(kept)
        return DialogueRow(tuple(tokens), tuple(loss_mask), kept, source, record.line)

    return _load(data, sources, ("hh", "pairs", "dialogues", "sft"), build)


def load_solutions(data: DataConfig, sources: Sequence[DataSource], template: Template) -> Dataset[SolutionRow]:
    """Solutions with a label per step, from steps files, of at most data.max_length tokens. Raises as `load_prompts`.

    The response is the steps with data.step_delimiter between them. A label is 1 for right; 0 (neutral) and less count
    as not right; what lies between 0 and 1 is the probability of being right.
    """
    delimiter = data.step_delimiter

    def build(turns: Turns, rejected: Turns | None, source: int, record: Record) -> SolutionRow:
        check_turns(turns, last="human")
        steps, labels = parse_steps(record.value)
        response = template.encode_response(delimiter.join(steps))
        ends = step_ends(response, template, delimiter)
        if len(ends) != len(steps):
            raise DataError(
                f"{len(steps)} steps, but joined by data.step_delimiter {delimiter!r} they read as {len(ends)}; "
                "a step must not hold the delimiter"
            )
        kept = _fit(turns, lambda turns: len(template.encode_prompt(turns)) + len(response), data.max_length)
        prompt = template.encode_prompt(kept)
        labelled = [
            (len(prompt) + end, max(0.0, label)) for end, label in zip(ends, labels, strict=True) if label is not None
        ]
        places, targets = zip(*labelled, strict=True)
        return SolutionRow(tuple(prompt + response), places, targets, len(prompt), kept, source, record.line)

    return _load(data, sources, ("steps",), build)


def _fit(turns: Turns, num_tokens: Callable[[Turns], int], limit: int) -> Turns:
    """The longest end of the dialogue that keeps the truncation rule (top of this file) within limit tokens."""
    if num_tokens(turns) <= limit:
        return turns
    cuts = range(2, len(turns), 2)
    cut = bisect_left(cuts, True, key=lambda cut: num_tokens(turns[cut:]) <= limit)
    if cut == len(cuts):
        shortest = num_tokens(turns[-1 if len(turns) % 2 else -2 :])
        raise DataError(
            f"{shortest} tokens long without any earlier turn, longer than the {limit} that fit; "
            "shorten the text, or raise data.max_length"
        )
    return turns[cuts[cut] :]


def _check_same_context(chosen: Turns, rejected: Turns) -> None:
    if len(chosen) != len(rejected):
        raise DataError(
            f"chosen has {len(chosen)} turns and rejected {len(rejected)}; they must differ in the last one only"
        )
    for number, (one, other) in enumerate(zip(chosen[:-1], rejected[:-1], strict=True), 1):
        if one != other:
            raise DataError(f"turn {number} of chosen and rejected differs; they must differ in the last one only")
    if chosen == rejected:
        raise DataError("chosen and rejected are the same")


def _load(
    data: DataConfig,
    sources: Sequence[DataSource],
    formats: Sequence[Format],
    build: Callable[[Turns, Turns | None, int, Record], Row],
    *,
    with_rejected: bool = False,
) -> Dataset[Row]:
    """Reads every source and builds its rows; `build` gets (turns, rejected turns, source, record)."""
    skipped: list[BadRow] = []
    loaded = []
    for number, source in enumerate(sources):
        rows = []
        format = None if source.format == "auto" else source.format
        for record in read(source.path):
            try:
                if record.fault is not None:
                    raise DataError(record.fault)
                format = format or find_format(source.path, record)
                if format not in formats:
                    raise ConfigError(
                        f"{source.path} has the format {format!r}, but this stage reads {', '.join(formats)}"
                    )
                turns, rejected = parse(record.value, format, with_rejected=with_rejected)
                rows.append(build(turns, rejected, number, record))
            except DataError as error:
                bad = BadRow(source.path, record.line, str(error))
                if data.on_bad_row == "error":
                    raise DataError(
                        f"{bad}; mend the row, or set data.on_bad_row=skip to leave such rows out"
                    ) from None
                skipped.append(bad)
        if not rows:
            first = next((f"; first fault: {bad}" for bad in skipped if bad.path == source.path), "")
            raise DataError(f"{source.path} has no usable row{first}")
        loaded.append(tuple(rows))
    return Dataset(tuple(loaded), tuple(source.weight for source in sources), tuple(skipped))
