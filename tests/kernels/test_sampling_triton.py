"""The parts of the Triton sampler on their own: the same bits as torch, and noise within its promised error.

They run in Triton's interpreter, and on the GPU where there is one.
"""

import pytest
import torch
from torch import Tensor

from ppomax.kernels.philox import WORD, philox_4x32_10, token_words, unit_interval
from ppomax.kernels.sampling_reference import FARTHEST, fixed_point, mass, share, share_word

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from ppomax.kernels import philox_triton, sampling_triton  # noqa: E402 - after the check that triton is here

pytestmark = pytest.mark.one_version
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _philox_kernel(COUNTERS, KEYS, WORDS, N: tl.constexpr):
    i = tl.arange(0, N)
    c0, c1 = tl.load(COUNTERS + i).to(tl.uint32), tl.load(COUNTERS + N + i).to(tl.uint32)
    c2, c3 = tl.load(COUNTERS + 2 * N + i).to(tl.uint32), tl.load(COUNTERS + 3 * N + i).to(tl.uint32)
    k0, k1 = tl.load(KEYS + i).to(tl.uint32), tl.load(KEYS + N + i).to(tl.uint32)
    w0, w1, w2, w3 = philox_triton.philox_4x32_10(c0, c1, c2, c3, k0, k1)
    tl.store(WORDS + i, w0.to(tl.int64))
    tl.store(WORDS + N + i, w1.to(tl.int64))
    tl.store(WORDS + 2 * N + i, w2.to(tl.int64))
    tl.store(WORDS + 3 * N + i, w3.to(tl.int64))


@triton.jit
def _words_kernel(SEEDS, POSITIONS, WORDS, first_block, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    words = philox_triton.token_words(tl.load(SEEDS + row), tl.load(POSITIONS + row), first_block, BLOCK)
    tl.store(WORDS + row * BLOCK + tl.arange(0, BLOCK), words.to(tl.int64))


@triton.jit
def _numbers_kernel(WORDS, GUMBEL, DISTANCES, MASSES, PART, SHARES, SCORES, FIXED, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(GUMBEL + i, sampling_triton._gumbel(tl.load(WORDS + i).to(tl.uint32)))
    masses = sampling_triton._mass(tl.load(DISTANCES + i))
    tl.store(MASSES + i, masses)
    tl.store(SHARES + i, sampling_triton._share(masses, tl.load(PART)))
    tl.store(FIXED + i, sampling_triton._fixed_point(tl.load(SCORES + i)))


def random_words(*size: int) -> Tensor:
    return torch.randint(0, WORD + 1, size, generator=torch.Generator().manual_seed(0))


def test_philox_in_triton_gives_the_published_words_and_those_of_torch() -> None:
    N = 64
    counters, keys = random_words(4, N), random_words(2, N)
    counters[:, 0], keys[:, 0] = 0, 0
    counters[:, 1], keys[:, 1] = WORD, WORD
    words = torch.empty(4, N, dtype=torch.int64, device=DEVICE)
    _philox_kernel[(1,)](counters.to(DEVICE), keys.to(DEVICE), words, N=N)
    assert words[:, 0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words[:, 1].tolist() == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    c0, c1, c2, c3 = counters
    assert torch.equal(words.cpu(), torch.stack(philox_4x32_10((c0, c1, c2, c3), (keys[0], keys[1]))))


@pytest.mark.parametrize("first_id", [0, 128, 151936])
def test_words_of_tokens_are_those_of_torch(first_id: int) -> None:
    seeds, positions = torch.tensor([7, -1, 2**40 + 3]), torch.tensor([0, -5, 2**33 + 1])
    words = torch.empty(3, 32, dtype=torch.int64, device=DEVICE)
    _words_kernel[(3,)](seeds.to(DEVICE), positions.to(DEVICE), words, first_id // 4, BLOCK=32)
    assert torch.equal(words.cpu(), token_words(seeds, positions, 32, first_id=first_id))


def test_words_of_a_block_that_starts_anywhere_are_part_of_the_whole() -> None:
    seeds, positions = torch.tensor([7, -1]), torch.tensor([3, 5])
    whole = token_words(seeds, positions, 40)
    for first_id in (1, 6, 11):
        assert torch.equal(token_words(seeds, positions, 9, first_id=first_id), whole[:, first_id : first_id + 9])


def test_masses_and_shares_have_the_bits_of_torch_and_noise_is_within_its_error() -> None:
    N, top_p = 4096, 0.9
    words = random_words(N)
    edges = [0, 1, 2, 2**24, 2**31 - 2, 2**31 - 1, 2**31, 2**31 + 1, WORD - 2**24, WORD - 2, WORD - 1, WORD]
    words[: len(edges)] = torch.tensor(edges)
    distances = random_words(N) >> torch.arange(N) % 20
    distances[:3] = torch.tensor([0, FARTHEST, 1])
    scores = torch.randn(N, generator=torch.Generator().manual_seed(1)) * 10.0 ** (torch.arange(N) % 14 - 3)
    scores[:4] = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0])
    gumbel = torch.empty(N, device=DEVICE)
    masses, shares, fixed = torch.empty(3, N, dtype=torch.int64, device=DEVICE)
    part = torch.tensor([share_word(top_p)])
    inputs = [x.to(DEVICE) for x in (words, distances, part, scores)]
    _numbers_kernel[(1,)](inputs[0], gumbel, inputs[1], masses, inputs[2], shares, inputs[3], fixed, N=N)
    exact = -(-unit_interval(words).log()).log()
    error = (gumbel.cpu() - exact).abs()
    assert error.max() < 2e-6
    assert error[exact < 8].max() < 6e-7
    assert torch.equal(masses.cpu(), mass(distances))
    assert torch.equal(shares.cpu(), share(mass(distances), top_p))
    assert torch.equal(fixed.cpu(), fixed_point(scores))


def test_masses_are_those_of_the_exponential() -> None:
    distances = torch.arange(0, 2**32, 12_345_677)
    exact = torch.exp(-distances.double() / 2**26) * 2**42
    assert mass(torch.tensor([0])).item() == 2**42
    assert ((mass(distances) - exact).abs() <= 1e-8 * exact + 1).all()


@pytest.mark.parametrize("top_p", [1e-12, 0.1, 0.5, 0.9, 1 - 1e-13])
def test_shares_are_exact_products(top_p: float) -> None:
    totals = [0, 1, 7, 2**31 - 1, 2**42, 2**62 - 1]
    part = share_word(top_p)
    exact = [max(1, -(-total * part // 2**31)) for total in totals]
    assert share(torch.tensor(totals), top_p).tolist() == exact
