"""Results of comparisons in the layout of the paper's Fig. 10 and 11: a row for two models and a kind of prompts
(helpful, harmless), columns for the shares of win, tie and lose by each judge.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ppomax.engine.errors import DataError
from ppomax.engine.judge.pairwise import OUTCOMES

ALL = "all"
"""Name of the row over all prompts."""


@dataclass(frozen=True)
class Table:
    """head and rows of cells; the first num_texts columns are text, the others numbers."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_texts: int

    def text(self) -> str:
        lines = [self.head, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.head))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i < self.num_texts else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def markdown(self) -> str:
        """A table of GitHub's markdown; what a name could do to it is escaped."""
        rule = ["---"] * self.num_texts + ["---:"] * (len(self.head) - self.num_texts)
        lines = [[_escaped(cell) for cell in line] for line in (self.head, *self.rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))


def comparison_table(results: Sequence[dict[str, Any]]) -> Table:
    """The table of several results.json of `ppomax compare`: a row per pair of models and category, in the order in
    which they come, three columns per judge: per cent of the valid pairs, with the interval of the wins.

    Raises DataError where one judge has two results for the same models, or a result is none.
    """
    judges: list[str] = []
    cells: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for result in results:
        try:
            models, judge = f"{result['a']} vs. {result['b']}", str(result["judge"])
            tallies = {**result["categories"], ALL: result["overall"]}
            for category, counts in tallies.items():
                row = cells.setdefault((models, category), {})
                if judge in row:
                    raise DataError(f"two results of {judge} for {models}, {category}; give each once")
                row[judge] = {name: counts[f"{name}_rate"] for name in OUTCOMES} | {
                    "num": counts["num_valid"],
                    "interval": counts["win_interval"],
                }
        except (KeyError, TypeError, AttributeError):
            raise DataError("not a results.json of `ppomax compare`; give the folders that it wrote") from None
        judges += [judge] if judge not in judges else []
    head = ["models", "prompts", *(f"{judge}: {name} %" for judge in judges for name in ("n", *OUTCOMES))]
    rows = []
    for (models, category), row in cells.items():
        line = [models, category]
        for judge in judges:
            line += _shares(row.get(judge))
        rows.append(tuple(line))
    return Table(tuple(name.replace(": n %", ": n") for name in head), tuple(rows), num_texts=2)


def _shares(row: dict[str, Any] | None) -> list[str]:
    if row is None or row["num"] == 0:
        return ["-"] * (1 + len(OUTCOMES))
    low, high = row["interval"]
    win = f"{100 * row['win']:.0f} [{100 * low:.0f}, {100 * high:.0f}]"
    return [str(row["num"]), win, f"{100 * row['tie']:.0f}", f"{100 * row['lose']:.0f}"]


def _escaped(cell: str) -> str:
    return "".join(f"\\{c}" if c in "\\|`*_[]<>" else c for c in cell if c.isprintable())
