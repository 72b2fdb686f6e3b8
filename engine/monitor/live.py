"""The live view of a run in a terminal: progress, the newest numbers with their course, and what the monitor saw."""

import atexit
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

BARS = "▁▂▃▄▅▆▇█"
NUM_POINTS = 40
"""Width of a course: the values of so many steps."""


class LiveView:
    """Shows itself until `close`. Texts are never read as markup."""

    def __init__(self, command: str, names: Sequence[str], console: Console | None = None) -> None:
        self._command, self._names = command, names
        self._courses: dict[str, deque[float]] = {name: deque(maxlen=NUM_POINTS) for name in names}
        self._events: deque[str] = deque(maxlen=4)
        self._live = Live(Text("waiting for the first step"), console=console, refresh_per_second=4)
        self._live.start()
        atexit.register(self._live.stop)  # an error must not leave the terminal without its cursor

    def step(self, step: int, num_steps: int, values: Mapping[str, Any], seconds: float) -> None:
        """The numbers of one more step."""
        table = Table.grid(padding=(0, 2))
        for name in self._names:
            if isinstance(values.get(name), int | float):
                self._courses[name].append(float(values[name]))
                table.add_row(name, f"{values[name]:.4g}", course(self._courses[name]))
        bar = ProgressBar(total=max(1, num_steps), completed=step, width=NUM_POINTS)
        title = Text(f"{self._command} {step}/{num_steps}, {seconds:.2f} s a step")
        events = [Text(text, style="yellow") for text in self._events]
        self._live.update(Group(title, bar, table, *events))

    def event(self, text: str) -> None:
        self._events.append(text)

    def say(self, text: str) -> None:
        """A line above the view."""
        self._live.console.print(Text(text))

    def close(self) -> None:
        self._live.stop()
        atexit.unregister(self._live.stop)


def course(values: Sequence[float]) -> str:
    """One bar per value, from the least to the largest; a dot for what is not finite."""
    finite = [x for x in values if x == x and abs(x) != float("inf")]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((x - low) * scale)] if x in finite else "·" for x in values)
