"""What kernels/ rely on of Triton itself, on CUDA: reverse scans of pairs, and integer arithmetic of 32 bits."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from ppomax.kernels import philox
from ppomax.kernels.philox_triton import token_words

pytestmark = pytest.mark.gpu


@triton.jit
def _after(a_right, b_right, a_left, b_left):
    """The affine map x -> a x + b of the right part, then that of the left one."""
    return a_right * a_left, a_left * b_right + b_left


@triton.jit
def _scan_kernel(A, B, OUT, T, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    a = tl.load(A + row * T + column, mask=column < T, other=1.0)
    b = tl.load(B + row * T + column, mask=column < T, other=0.0)
    _, result = tl.associative_scan((a, b), axis=0, combine_fn=_after, reverse=True)
    tl.store(OUT + row * T + column, result, mask=column < T)


@triton.jit
def _words_kernel(SEEDS, POSITIONS, OUT, first_block, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    words = token_words(tl.load(SEEDS + row), tl.load(POSITIONS + row), first_block, BLOCK)
    tl.store(OUT + row * BLOCK + tl.arange(0, BLOCK), words.to(tl.int64))


def check_reverse_scan(device: torch.device, T: int, num_warps: int) -> None:
    """y_t = a_t y_(t+1) + b_t, as advantages are summed up."""
    num_rows = 3
    generator = torch.Generator().manual_seed(T)
    a = torch.where(torch.rand(num_rows, T, generator=generator) < 0.8, 0.95, 1.0)
    b = torch.randn(num_rows, T, generator=generator)
    out = torch.full((num_rows, T), float("nan"), device=device)
    block = triton.next_power_of_2(T)
    _scan_kernel[(num_rows,)](a.to(device), b.to(device), out, T, BLOCK=block, num_warps=num_warps)
    expected, state = torch.empty(num_rows, T, dtype=torch.float64), torch.zeros(num_rows, dtype=torch.float64)
    for t in reversed(range(T)):
        state = a[:, t].double() * state + b[:, t].double()
        expected[:, t] = state
    torch.testing.assert_close(out.cpu().double(), expected, rtol=2e-5, atol=2e-5)


def words_on(device: torch.device, seeds: Tensor, positions: Tensor, first_block: int, num: int) -> Tensor:
    out = torch.zeros(len(seeds), num, dtype=torch.int64, device=device)
    _words_kernel[(len(seeds),)](seeds.to(device), positions.to(device), out, first_block, BLOCK=num, num_warps=4)
    return out.cpu()


def check_words(device: torch.device, first_block: int) -> None:
    """The integers of the generator are the same bits everywhere; seeds and positions of more than 32 bits count."""
    seeds = torch.tensor([0, 1, -1, 2**31, 2**32, 2**62 + 12345, -(2**40)])
    positions = torch.tensor([0, 7, 2**31, 2**33 + 1, 1, 2**32 - 1, 2**40])
    num = 1024
    ids = first_block * philox.WORDS_PER_BLOCK
    expected = philox.token_words(seeds, positions, num, first_id=ids)
    assert torch.equal(words_on(device, seeds, positions, first_block, num), expected)
    assert expected.min() >= 0
    assert expected.max() < 2**32


@pytest.mark.parametrize("num_warps", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("T", [16, 33, 64, 100, 128, 512, 1000, 1024, 2048, 4096, 8192])
def test_a_reverse_scan_of_affine_maps_is_exact(device: torch.device, T: int, num_warps: int) -> None:
    check_reverse_scan(device, T, num_warps)


@pytest.mark.parametrize("first_block", [0, 1, 37984, 2**20])
def test_the_noise_of_tokens_has_the_bits_of_the_cpu(device: torch.device, first_block: int) -> None:
    check_words(device, first_block)
