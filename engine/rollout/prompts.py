"""Pages of prompts that several requests share.

The requests of one prompt are a family. While one of them runs that has the prompt in its pages, the others take these
pages; once it is gone the family owns them itself as long as requests wait for them and there is memory.
"""

from dataclasses import dataclass, field

from ppomax.engine.rollout.pages import PagePool, pages_for


@dataclass(eq=False)
class Family:
    """The requests with one prompt.

    num_waiting: how many of them have no pages yet, or have lost them.
    source: index of the running request that computes the prompt or has done so. source_pages: the prompt in its
    pages, from the step after source_step on; empty before that step is planned.
    held: pages of the prompt that the family owns; empty while there is a source, but for the step in which it starts.
    """

    prompt: tuple[int, ...]
    num_waiting: int = 0
    source: int | None = None
    source_pages: list[int] = field(default_factory=list)
    source_step: int = 0
    held: list[int] = field(default_factory=list)

    def pages_before(self, step: int) -> list[int]:
        """Pages in which the steps before this one leave the prompt; empty where there are none."""
        if self.held:
            return self.held
        return self.source_pages if self.source_step < step else []

    def is_coming(self, step: int) -> bool:
        """The prompt is not there yet, but a running request is computing it."""
        return self.source is not None and not self.pages_before(step)


class Prompts:
    """What families hold in a pool of pages."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        # In the order in which they lose their pages. Dicts, not sets: every rank must have the same order.
        self._holding: dict[Family, None] = {}
        self._read: dict[Family, None] = {}

    def complete(self, family: Family, index: int, pages: list[int], step: int) -> None:
        """A request has the prompt in its pages after this step."""
        if family.source == index and not family.source_pages:
            family.source_pages, family.source_step = self._of_prompt(family, pages), step

    def leave(self, family: Family, index: int, pages: list[int], *, has_prompt: bool) -> None:
        """A request loses its pages; the family keeps those of the prompt if it has none elsewhere and someone waits.

        has_prompt: the prompt is in the pages.
        """
        if family.source == index:
            family.source, family.source_pages = None, []
        if has_prompt and family.num_waiting and family.source is None and not family.held:
            family.held = self._of_prompt(family, pages)
            self._pool.share(family.held)
            self._holding[family] = None

    def mark_read(self, family: Family) -> None:
        """The step being planned takes or copies held pages: they stay until the next one is planned."""
        if family.held:
            self._read[family] = None

    def finish_step(self) -> None:
        """Lets go what the step planned last was the last to need."""
        for family in self._read:
            self.let_go_unless_needed(family)
        self._read.clear()

    def let_go_unless_needed(self, family: Family) -> None:
        """Lets go held pages that nobody waits for, or that the source has, too."""
        if family.num_waiting == 0 or family.source is not None:
            self.let_go(family)

    def let_go(self, family: Family) -> None:
        self._pool.give_back(family.held)
        family.held = []
        self._holding.pop(family, None)

    def make_room(self, num_pages: int, *, keep: Family | None = None) -> bool:
        """Lets go prompts until num_pages are free; False where that does not suffice."""
        while self._pool.num_free < num_pages:
            family = next((f for f in self._holding if f is not keep and f not in self._read), None)
            if family is None:
                return False
            self.let_go(family)
        return True

    def _of_prompt(self, family: Family, pages: list[int]) -> list[int]:
        return pages[: pages_for(len(family.prompt), self._pool.page_size)]
