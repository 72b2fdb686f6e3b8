"""What Triton kernels share: the accumulation type, and KL terms as numerics.py defines them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppomax.kernels import numerics
from ppomax.kernels.interpreter_triton import is_interpreted, make_interpreter_exact
from ppomax.kernels.numerics import wide_dtype

if is_interpreted():
    make_interpreter_exact()

LOG_RATIO_LIMIT = tl.constexpr(numerics.LOG_RATIO_LIMIT)
SERIES_LIMIT = tl.constexpr(numerics.SERIES_LIMIT)
H100_PROCESSORS = 132


def accumulation_type(*tensors: Tensor | None) -> tl.dtype:
    """The type that kernels compute in: fp64 where one of the tensors has it (gradient checks), else fp32."""
    return tl.float64 if wide_dtype(*tensors) == torch.float64 else tl.float32


def num_programs(device: torch.device, per_processor: int = 2) -> int:
    """Programs that fill the GPU `per_processor` times: of kernels in which a program takes many rows.

    Where there is no GPU, 4 of them in the interpreter, and those of an H100 for the compiler's checks.
    """
    if device.type == "cuda":
        return per_processor * torch.cuda.get_device_properties(device).multi_processor_count
    return 4 if device.type == "cpu" else per_processor * H100_PROCESSORS


def warps_for(block: int) -> int:
    """Warps of a program that holds `block` entries of one row: 16 entries a thread, at least 1 warp, at most 16."""
    return min(16, max(1, block // 512))


@triton.jit
def clamped(d):
    """d clamped to +- LOG_RATIO_LIMIT; NaN stays NaN, which a GPU's minimum and maximum would turn into a bound."""
    return tl.where(d < -LOG_RATIO_LIMIT, -LOG_RATIO_LIMIT, tl.where(d > LOG_RATIO_LIMIT, LOG_RATIO_LIMIT, d))


@triton.jit
def exp_remainder(d):
    """exp(d) - 1 - d without cancellation: a series to d^8 where |d| < SERIES_LIMIT (as numerics.exp_remainder)."""
    tail = 1.0 / 120 + d * (1.0 / 720 + d * (1.0 / 5040 + d * (1.0 / 40320)))
    series = d * d * (0.5 + d * (1.0 / 6 + d * (1.0 / 24 + d * tail)))
    return tl.where(tl.abs(d) < SERIES_LIMIT, series, tl.exp(d) - 1.0 - d)
