"""Kernels that the gate must refuse, and one that it must pass; prints the faults of each as JSON.

Started by test_aot_kernels.py as a process of its own: in the tests' process Triton interprets.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from ppomax.tools.aot_kernels import judge
from ppomax.tools.compile_triton import Launch, compile_for, facts_of, recorded


@triton.jit
def _good_kernel(X, Y, N, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + index, tl.load(X + index, mask=index < N, other=0.0) * 2.0, mask=index < N)


@triton.jit
def _spilling_kernel(X, Y, N, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    x = tl.load(X + index)
    y = tl.load(X + index + BLOCK)
    total = tl.sum(x * y, axis=0)
    tl.store(Y + index, x * total + y)


@triton.jit
def _float64_kernel(X, Y, N, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + index, mask=index < N, other=0.0).to(tl.float64)
    tl.store(Y + index, (x * x + 0.1).to(tl.float32), mask=index < N)


@triton.jit
def _atomic_kernel(X, Y, N, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(Y, tl.sum(tl.load(X + index, mask=index < N, other=0.0), axis=0))


@triton.jit
def _narrow_kernel(X, Y, N, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + index, tl.load(X + index * 2, mask=index < N, other=0.0), mask=index < N)


@triton.jit
def _scalar_dot_kernel(X, Y, N, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    square = index[:, None] * BLOCK + index[None]
    x = tl.load(X + square)
    tl.store(Y + square, tl.dot(x, x, input_precision="ieee"))


@triton.jit
def _shared_kernel(X, Y, N, BLOCK: tl.constexpr):
    row, inner, column = tl.arange(0, 256), tl.arange(0, BLOCK), tl.arange(0, 256)
    total = tl.zeros((256, 256), dtype=tl.float32)
    for start in range(0, N, BLOCK):
        a = tl.load(X + row[:, None] * N + start + inner[None])
        b = tl.load(X + (start + inner[:, None]) * 256 + column[None])
        total += tl.dot(a, b)
    tl.store(Y + row[:, None] * 256 + column[None], total)


def faults_of(kernel: Any, launch: Callable[[], Any]) -> list[str]:
    launches: list[Launch] = []
    with recorded(launches, "mutant"):
        launch()
    (noted,) = launches
    assert noted.kernel is kernel
    return judge(noted, facts_of(compile_for(noted, "sm_90"), "sm_90"), "sm_90")


def main() -> None:
    x, y = torch.empty(2**20, device="meta"), torch.empty(2**20, device="meta")
    narrow, wide = x.to(torch.bfloat16), 1024
    launches: dict[Any, Callable[[], Any]] = {
        _good_kernel: lambda: _good_kernel[(1024,)](x, y, x.numel(), BLOCK=wide),
        _spilling_kernel: lambda: _spilling_kernel[(1,)](x, y, x.numel(), BLOCK=65536, num_warps=8),
        _float64_kernel: lambda: _float64_kernel[(1024,)](x, y, x.numel(), BLOCK=wide),
        _atomic_kernel: lambda: _atomic_kernel[(1024,)](x, y, x.numel(), BLOCK=wide),
        _narrow_kernel: lambda: _narrow_kernel[(1, 70000)](x, y, x.numel(), BLOCK=wide),
        _scalar_dot_kernel: lambda: _scalar_dot_kernel[(1,)](x, y, x.numel(), BLOCK=32),
        _shared_kernel: lambda: _shared_kernel[(1,)](narrow, y, 8192, BLOCK=128, num_warps=8, num_stages=3),
    }
    faults = {kernel.__name__: faults_of(kernel, launch) for kernel, launch in launches.items()}
    faults["unaligned"] = faults_of(
        _good_kernel, lambda: _good_kernel[(1024,)](x[1:], y[1:], x.numel() - 1, BLOCK=wide)
    )
    print(json.dumps(faults))


if __name__ == "__main__":
    main()
