"""Philox4x32-10, a counter-based random generator (Salmon et al. 2011), in torch: the same bits on every device.

A draw is a function of (seed, position, token id) alone, so it does not depend on how requests are batched or the
vocabulary is spread. Words of 32 bits live in int64; torch's >> copies the sign bit, so every shift is followed by a
mask. philox_triton.py gives the same words.
"""

import torch
from torch import Tensor

Words = tuple[Tensor, Tensor, Tensor, Tensor]

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORDS_PER_BLOCK = 4


def philox_4x32_10(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Four random words of 32 bits from a counter of four words and a key of two.

    counter, key: int64 tensors of values in [0, 2^32), of shapes that broadcast. Returns four such tensors.
    Source: Salmon et al. 2011, section 4; the product of two words wraps around in int64, which keeps its 64 bits.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & WORD) ^ c1 ^ k0, p1 & WORD, ((p0 >> 32) & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def token_words(seeds: Tensor, positions: Tensor, num_tokens: int, *, first_id: int = 0) -> Tensor:
    """A random word of 32 bits for every request and each of the token ids from first_id on.

    seeds, positions [R] int64: any values; a pair must not be used twice for draws that should be independent.
    Returns [R, num_tokens] int64. The counter is (id // 4, position, 0), the key the seed, and id % 4 picks the word:
    one block serves four neighbouring ids.
    """
    skipped = first_id % WORDS_PER_BLOCK
    num_blocks = -(-(skipped + num_tokens) // WORDS_PER_BLOCK)
    block = torch.arange(num_blocks, device=seeds.device)[None] + first_id // WORDS_PER_BLOCK
    seeds, positions = seeds[:, None], positions[:, None]
    counter = (block, positions & WORD, (positions >> 32) & WORD, torch.zeros_like(positions))
    words = torch.stack(philox_4x32_10(counter, (seeds & WORD, (seeds >> 32) & WORD)), dim=-1)
    return words.flatten(1)[:, skipped : skipped + num_tokens]


def token_uniforms(seeds: Tensor, positions: Tensor, num_tokens: int, *, first_id: int = 0) -> Tensor:
    """`token_words` as uniform numbers [R, num_tokens] float64, never 0 or 1."""
    return unit_interval(token_words(seeds, positions, num_tokens, first_id=first_id))


def unit_interval(words: Tensor) -> Tensor:
    """Words of 32 bits as uniform numbers (word + 1/2) / 2^32 in fp64, which are exact and never 0 or 1."""
    return (words.double() + 0.5) * 2.0**-32
