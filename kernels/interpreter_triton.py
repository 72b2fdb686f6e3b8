"""Makes Triton's interpreter (TRITON_INTERPRET=1) compute what a GPU computes, and scans fast enough for tests.

What it changes, of triton 3.6 and 3.7:
 1. float32 -> bfloat16 truncates; the hardware rounds to nearest even.
 2. `tl.dot` of bfloat16 multiplies the bit patterns: operands are widened to float32 first, which is exact.
 3. Other bfloat16 arithmetic works on bit patterns too: it raises, so that a missing `.to(tl.float32)` is an error.
 4. `tl.minimum`, `tl.maximum` and `tl.clamp` keep NaN; on a GPU the other number wins unless `propagate_nan` is set.
 5. Loops with run-time bounds fail with triton 3.6 and numpy >= 2.4.
 6. `tl.associative_scan` and `tl.reduce` with a function of one's own take 0.2-0.5 ms an element: log2(n) steps over
    whole blocks instead, which also associate as a GPU does, not from left to right.
 7. Every call of a function inside a kernel prepares triton.language again, which is most of the time of a small
    kernel: once a launch is enough.
Nothing here runs in a process that compiles kernels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter

BFLOAT16_ARITHMETIC = (
    *("create_fadd", "create_fsub", "create_fmul", "create_fdiv", "create_frem", "create_fma"),
    *("create_exp", "create_exp2", "create_log", "create_log2", "create_sqrt", "create_rsqrt"),
    *("create_minimumf", "create_maximumf", "create_minnumf", "create_maxnumf"),
    *("create_fcmpOLT", "create_fcmpOGT", "create_fcmpOLE", "create_fcmpOGE"),
)
FLOATS = (tl.float32, tl.float64)


def is_interpreted() -> bool:
    """Whether `triton.jit` gives interpreted functions in this process."""
    return bool(knobs.runtime.interpret)


def make_interpreter_exact() -> None:
    """Applies the changes, once per process, before any kernel runs."""
    builder = interpreter.InterpreterBuilder
    if builder.cast_impl.__module__ == __name__:
        return
    _patch_once_a_launch()
    _fix_loop_bounds()
    _fix_casts(builder)
    _fix_dot(builder)
    _fix_extrema(builder)
    for name in BFLOAT16_ARITHMETIC:
        setattr(builder, name, _refusing_bfloat16(name, getattr(builder, name)))
    interpreter.ScanOps.generic_scan = _scan
    interpreter.ReduceOps.generic_reduce = _reduce


def _patch_once_a_launch() -> None:
    patch_lang, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    prepared: set[tuple[int, ...]] = set()

    def patch_lang_once(function: Any) -> Any:
        modules = tuple(sorted({id(x) for x in function.__globals__.values() if x is tl or x is tl.core}))
        if modules in prepared:
            return interpreter._LangPatchScope()
        prepared.add(modules)
        return patch_lang(function)

    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepared.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang_once, launch_afresh


def _fix_loop_bounds() -> None:
    patch_tensor = interpreter._patch_lang_tensor

    def with_index(tensor: Any, *rest: Any) -> None:
        patch_tensor(tensor, *rest)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])

    interpreter._patch_lang_tensor = with_index


def _fix_casts(builder: Any) -> None:
    original_cast, original_fp_to_fp = builder.cast_impl, builder.create_fp_to_fp

    def cast_impl(self: Any, source: Any, dst_type: Any) -> Any:
        source_type, result_type = source.dtype.scalar, dst_type.scalar
        if source_type in FLOATS and result_type == tl.bfloat16:
            return interpreter.TensorHandle(_bfloat16_bits(source.data), result_type)
        if source_type == tl.bfloat16 and result_type in FLOATS:
            wide = np.float64 if result_type == tl.float64 else np.float32
            return interpreter.TensorHandle(_widened(source.data).astype(wide), result_type)
        return original_cast(self, source, dst_type)

    def create_fp_to_fp(self: Any, source: Any, dst_type: Any, rounding_mode: Any) -> Any:
        pair = {source.dtype.scalar, dst_type.scalar}
        if tl.bfloat16 in pair and pair & set(FLOATS) and rounding_mode != interpreter._ir.ROUNDING_MODE.RTZ:
            return cast_impl(self, source, dst_type)
        return original_fp_to_fp(self, source, dst_type, rounding_mode)

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp


def _fix_dot(builder: Any) -> None:
    original = builder.create_dot

    def widened(x: Any) -> Any:
        is_bfloat16 = x.dtype.scalar == tl.bfloat16
        return interpreter.TensorHandle(_widened(x.data), tl.float32) if is_bfloat16 else x

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, widened(a), widened(b), *rest)

    builder.create_dot = create_dot


def _fix_extrema(builder: Any) -> None:
    def create_clampf(self: Any, x: Any, low: Any, high: Any, propagate_nans: Any) -> Any:
        if propagate_nans == interpreter._ir.PROPAGATE_NAN.ALL:
            return self.ternary_op(x, low, high, np.clip)
        return self.ternary_op(x, low, high, lambda a, b, c: np.fmin(np.fmax(a, b), c))

    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    builder.create_clampf = create_clampf


def _refusing_bfloat16(name: str, original: Callable) -> Callable:
    def checked(self: Any, *operands: Any) -> Any:
        for x in operands:
            if isinstance(x, interpreter.TensorHandle) and x.dtype.scalar == tl.bfloat16:
                raise TypeError(f"{name} of bfloat16 in the interpreter: convert with .to(tl.float32) first")
        return original(self, *operands)

    return checked


def _bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """Bit patterns (uint16) of x rounded to the nearest bfloat16, ties to even; of float64 by way of float32."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounding = ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    with np.errstate(over="ignore"):
        rounded = ((bits + rounding) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded.reshape(x.shape))


def _widened(bits: np.ndarray) -> np.ndarray:
    """The float32 of each bfloat16 bit pattern."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(bits.shape)


def _combine(function: Callable, left: Sequence[np.ndarray], right: Sequence[np.ndarray], types: Sequence[Any]) -> list:
    """function(*left, *right) of whole arrays, whose sizes are powers of two."""
    shape = left[0].shape

    def blocks(arrays: Sequence[np.ndarray]) -> list[Any]:
        return [
            tl.core.tensor(interpreter.TensorHandle(np.ascontiguousarray(x), t), tl.block_type(t, list(shape)))
            for x, t in zip(arrays, types, strict=True)
        ]

    result = function(*blocks(left), *blocks(right))
    result = result if isinstance(result, tuple) else (result,)
    return [np.broadcast_to(x.handle.data, shape) for x in result]


def _scan(self: Any, given: Sequence[Any]) -> list[Any]:
    """Inclusive scan by doubling: after the step of width w, entry i holds the last 2w entries up to i."""
    types = [x.dtype for x in given]
    state = [np.moveaxis(x.handle.data, self.axis, -1).copy() for x in given]
    width = 1
    while width < state[0].shape[-1]:
        # Whole rows are combined, so that sizes stay powers of two; the first `width` entries are put back.
        left = [np.concatenate([x[..., :width], x[..., :-width]], axis=-1) for x in state]
        combined = _combine(self.combine_fn.fn, left, state, types)
        pairs = zip(state, combined, strict=True)
        state = [np.concatenate([x[..., :width], y[..., width:]], axis=-1) for x, y in pairs]
        width *= 2
    return [self.to_tensor(np.moveaxis(x, -1, self.axis), t) for x, t in zip(state, types, strict=True)]


def _reduce(self: Any, given: Sequence[Any]) -> list[Any]:
    """Reduction by halving."""
    whole = self.axis is None
    num_axes = len(given[0].handle.data.shape)
    given, axis = self.unravel(given, self.axis)
    types = [x.dtype for x in given]
    state = [np.moveaxis(x.handle.data, axis, -1) for x in given]
    while state[0].shape[-1] > 1:
        half = state[0].shape[-1] // 2
        left, right = [x[..., :half] for x in state], [x[..., half:] for x in state]
        state = _combine(self.combine_fn.fn, left, right, types)
    results = []
    for x, t in zip(state, types, strict=True):
        data = x[..., 0]
        if self.keep_dims:
            data = data.reshape((1,) * num_axes) if whole else np.expand_dims(data, axis)
        elif whole:
            data = data.item()
        results.append(self.to_tensor(data, t))
    return results
