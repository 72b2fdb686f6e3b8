"""The order of training rows: one global sequence, a pure function of (seed, position).

A run is resumed by one integer, the position. Every rank computes the same sequence and takes its share of it, so no
replica count drops or repeats a row.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np

from ppomax.engine.errors import ConfigError


class Order:
    """Endless sequence of (source, row) over weighted sources, each shuffled anew for every pass over it.

    Sources take turns by stride scheduling: the k-th row of a source of weight w is due at (k + 1/2) / w, and rows come
    in the order in which they are due. So after n rows a source of share s has given n * s rows, give or take
    (1 + num_sources * s) / 2.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        """sizes: rows of each source; weights: relative shares, > 0. Raises ConfigError where a source has no rows."""
        if not sizes or len(sizes) != len(weights) or min(sizes) <= 0 or min(weights) <= 0:
            raise ConfigError(
                f"sizes {list(sizes)} and weights {list(weights)}: expected one size and weight > 0 per source"
            )
        exact = [Fraction(weight) for weight in weights]
        scale = lcm(*(weight.denominator for weight in exact))
        self.sizes = tuple(sizes)
        self.seed = seed
        self._weights = [int(weight * scale) for weight in exact]
        self._shuffled: list[tuple[int, np.ndarray] | None] = [None] * len(sizes)

    def rows(self, start: int, count: int) -> list[tuple[int, int]]:
        """(source, row) at positions start .. start + count - 1."""
        taken, position = self._taken_before(start)
        rows = []
        while position < start + count:
            # Exact integers: floats would let the order depend on where a call starts.
            source = min(range(len(taken)), key=lambda i: (Fraction(2 * taken[i] + 1, self._weights[i]), i))
            if position >= start:
                epoch, place = divmod(taken[source], self.sizes[source])
                rows.append((source, int(self._permutation(source, epoch)[place])))
            taken[source] += 1
            position += 1
        return rows

    def _taken_before(self, start: int) -> tuple[list[int], int]:
        """Rows that each source has given at a position up to 1.5 * num_sources before `start`, and that position."""
        total = sum(self._weights)
        rounds = max(0, start - len(self._weights))
        # Due by time t = rounds / total are the k with (k + 1/2) / weight <= t.
        taken = (
            [(2 * weight * rounds + total) // (2 * total) for weight in self._weights]
            if rounds
            else [0] * len(self.sizes)
        )
        return taken, sum(taken)

    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        """Shuffle of one pass over one source; the latest of each source is kept."""
        kept = self._shuffled[source]
        if kept is None or kept[0] != epoch:
            kept = (epoch, shuffle(self.sizes[source], self.seed, source, epoch))
            self._shuffled[source] = kept
        return kept[1]


def shuffle(size: int, *key: int) -> np.ndarray:
    """Permutation of range(size) that depends on the key alone: rows sorted by a hash (splitmix64) of key and row.

    A library's shuffle may change with its version, and with it every resumed run.
    """
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _splitmix64(state ^ np.uint64(part & (2**64 - 1)))
    return np.argsort(_splitmix64(state + np.arange(size, dtype=np.uint64) * GOLDEN), kind="stable")


GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """Steele, Lea, Flood 2014: a bijection of 64-bit numbers that mixes every bit. Arithmetic is modulo 2^64."""
    x = x + GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
