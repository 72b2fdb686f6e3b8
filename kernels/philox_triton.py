"""Philox4x32-10 in Triton: the words of philox.py, four per call, from integer arithmetic alone."""

import triton
import triton.language as tl

from ppomax.kernels import philox
from ppomax.kernels.interpreter_triton import is_interpreted, make_interpreter_exact

if is_interpreted():
    make_interpreter_exact()

MULTIPLIER_0, MULTIPLIER_1 = (tl.constexpr(x) for x in philox.MULTIPLIERS)
KEY_STEP_0, KEY_STEP_1 = (tl.constexpr(x) for x in philox.KEY_STEPS)
ROUNDS = tl.constexpr(philox.ROUNDS)
WORDS_PER_BLOCK = tl.constexpr(philox.WORDS_PER_BLOCK)


@triton.jit
def philox_4x32_10(c0, c1, c2, c3, k0, k1):
    """Four random words from a counter of four words and a key of two, uint32 blocks of one shape."""
    for _ in tl.static_range(ROUNDS):
        high0, low0 = tl.umulhi(c0, MULTIPLIER_0), c0 * MULTIPLIER_0
        high1, low1 = tl.umulhi(c2, MULTIPLIER_1), c2 * MULTIPLIER_1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + KEY_STEP_0, k1 + KEY_STEP_1
    return c0, c1, c2, c3


@triton.jit
def token_words(seed, position, first_block, BLOCK: tl.constexpr):
    """The words [BLOCK] uint32 of the ids from WORDS_PER_BLOCK * first_block on; seed, position: int64."""
    c0 = (first_block + tl.arange(0, BLOCK // WORDS_PER_BLOCK)).to(tl.uint32)
    zero = tl.zeros_like(c0)
    c1, c2 = zero + position.to(tl.uint32), zero + (position >> 32).to(tl.uint32)
    k0, k1 = zero + seed.to(tl.uint32), zero + (seed >> 32).to(tl.uint32)
    w0, w1, w2, w3 = philox_4x32_10(c0, c1, c2, zero, k0, k1)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
