"""Pages of the key / value cache: which are free, and how many owners each of the others has.

A page has room for the keys and values of `page_size` tokens. Numbers only: the tensors lie elsewhere. Every rank of a
pipeline comes to the same numbers because the order is fixed: the page given back last is taken first, and of
pages that were never taken the lowest.
"""

from collections.abc import Iterable


class OutOfPages(Exception):
    """Fewer pages are free than were asked for; nothing was taken. The scheduler makes room before it asks."""


class PagePool:
    """The pages 0 .. num_pages - 1 of page_size tokens each, all free at first."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(reversed(range(num_pages)))
        self._owners = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def owners(self, page: int) -> int:
        """How many own the page; 0 where it is free. A page with several must not be written."""
        return self._owners[page]

    def take(self, num: int) -> list[int]:
        """`num` free pages, now with one owner each; raises OutOfPages."""
        if num > len(self._free):
            raise OutOfPages(f"{num} pages wanted, {len(self._free)} of {self.num_pages} are free")
        pages = [self._free.pop() for _ in range(num)]
        for page in pages:
            self._owners[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Gives pages that are in use one more owner each."""
        for page in pages:
            assert self._owners[page] > 0, f"page {page} is free and cannot be shared"
            self._owners[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """Takes one owner from each page; without owners it is free."""
        for page in pages:
            assert self._owners[page] > 0, f"page {page} is free and cannot be given back"
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free.append(page)


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that hold num_tokens tokens of one request."""
    return -(-num_tokens // page_size)


def num_pages_for_budget(
    budget_bytes: int, *, page_size: int, num_layers: int, num_groups: int, head_dim: int, itemsize: int
) -> int:
    """Pages that fit into budget_bytes on one rank, possibly 0.

    num_layers of this rank's stage, num_groups (key / value heads) of this rank, itemsize bytes per number.
    """
    page_bytes = 2 * page_size * num_layers * num_groups * head_dim * itemsize  # keys and values
    return budget_bytes // page_bytes
