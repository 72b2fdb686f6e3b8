"""RMSNorm, rotary embedding and SwiGLU against torch's own modules, complex rotation and the formula in fp64."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.library import opcheck

from ppomax.kernels import rms_norm as rms_norm_module
from ppomax.kernels import rope as rope_module
from ppomax.kernels import swiglu as swiglu_module
from ppomax.kernels.dispatch import implementation
from ppomax.kernels.rms_norm import rms_norm
from ppomax.kernels.rope import rope
from ppomax.kernels.swiglu import swiglu

HAS_C = True
EPS = 1e-5
DTYPES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""Errors that are allowed, relative to the largest entry: for 16-bit types a rounding of what was computed in fp32."""


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def angles(N: int, D: int) -> Tensor:
    """Rotation angles [N, D/2] of positions 0.. with Llama's frequencies."""
    return torch.arange(N)[:, None] * 10000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)


@pytest.mark.parametrize("shape", [(1, 8), (7, 16), (2, 3, 37), (0, 8)])
def test_rms_norm_equals_torch(shape: tuple[int, ...]) -> None:
    x, weight = random_tensor(*shape), random_tensor(shape[-1], seed=1)
    wanted = torch.nn.functional.rms_norm(x, shape[-1:], weight, eps=1e-5)
    torch.testing.assert_close(rms_norm(x, weight, eps=1e-5), wanted)


def test_rms_norm_of_bf16_rounds_once() -> None:
    x, weight = random_tensor(5, 64).bfloat16(), random_tensor(64, seed=1).bfloat16()
    out = rms_norm(x, weight, eps=1e-6)
    assert out.dtype == torch.bfloat16
    wanted = rms_norm(x.double(), weight.double(), eps=1e-6).bfloat16()
    torch.testing.assert_close(out, wanted, rtol=2**-7, atol=0)
    assert (out == wanted).double().mean() > 0.99


def test_rms_norm_gradcheck_passes() -> None:
    inputs = random_tensor(3, 5).requires_grad_(), random_tensor(5, seed=1).requires_grad_()
    assert gradcheck(lambda x, w: rms_norm(x, w, eps=1e-2), inputs)


def test_rms_norm_of_zeros_is_zero_with_finite_gradient() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    out = rms_norm(x, torch.ones(4), eps=1e-6)
    out.sum().backward()
    assert (out == 0).all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("columns", ["half", "repeated"])
@pytest.mark.parametrize(("N", "heads", "D"), [(1, 1, 2), (5, 3, 8), (0, 2, 4)])
def test_rope_is_a_complex_rotation(N: int, heads: int, D: int, columns: str) -> None:
    x, phase = random_tensor(N, heads, D), angles(N, D)
    rotated = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(phase), phase)[:, None]
    wanted = torch.cat((rotated.real, rotated.imag), dim=-1)
    if columns == "repeated":
        phase = phase.repeat(1, 2)
    torch.testing.assert_close(rope(x, phase.cos(), phase.sin()), wanted)


def test_rope_scores_depend_on_relative_positions_only() -> None:
    query, key = random_tensor(1, 1, 8), random_tensor(1, 1, 8, seed=1)
    phase = angles(20, 8)
    at = [(rope(x, phase[p : p + 1].cos(), phase[p : p + 1].sin())) for x, p in ((query, 9), (key, 4))]
    moved = [(rope(x, phase[p : p + 1].cos(), phase[p : p + 1].sin())) for x, p in ((query, 16), (key, 11))]
    torch.testing.assert_close((at[0] * at[1]).sum(), (moved[0] * moved[1]).sum())


def test_rope_gradcheck_passes_and_keeps_the_dtype() -> None:
    phase = angles(3, 4)
    assert gradcheck(lambda x: rope(x, phase.cos(), phase.sin()), (random_tensor(3, 2, 4).requires_grad_(),))
    assert rope(random_tensor(3, 2, 4).bfloat16(), phase.cos(), phase.sin()).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(1, 2), (7, 16), (2, 3, 10), (0, 4)])
def test_swiglu_equals_the_formula(shape: tuple[int, ...]) -> None:
    x = random_tensor(*shape)
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(x), gate / (1 + (-gate).exp()) * up)


def test_swiglu_gradcheck_passes_and_keeps_the_dtype() -> None:
    assert gradcheck(swiglu, (random_tensor(3, 8).requires_grad_(),))
    x = random_tensor(3, 8).bfloat16().requires_grad_()
    out = swiglu(x)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"weight \(3,\) must be \(4,\)"):
        rms_norm(torch.zeros(2, 4), torch.zeros(3), eps=1e-6)
    with pytest.raises(ValueError, match="with D even"):
        rope(torch.zeros(2, 1, 4), torch.zeros(3, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="2F"):
        swiglu(torch.zeros(2, 3))


@dataclass(frozen=True)
class Op:
    """An operation of rows, what it must equal, and inputs for a number of rows; all but cos and sin get gradients."""

    call: Callable[..., Tensor]
    independent: Callable[..., Tensor]
    inputs: Callable[[int], list[Tensor]]
    num_gradients: int
    operator: Callable[..., Any]


def independent_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * gate.sigmoid() * up


def independent_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(cos, sin)[:, None]
    return torch.cat((rotated.real, rotated.imag), dim=-1)


def rope_inputs(N: int) -> list[Tensor]:
    phase = angles(N, 6)
    return [random_tensor(N, 5, 6), phase.cos(), phase.sin()]


OPS = {
    "rms_norm": Op(
        lambda x, weight: rms_norm(x, weight, eps=EPS),
        lambda x, weight: torch.nn.functional.rms_norm(x, weight.shape, weight, eps=EPS),
        lambda N: [random_tensor(N, 37), random_tensor(37, seed=1)],
        2,
        rms_norm_module._forward,
    ),
    "swiglu": Op(swiglu, independent_swiglu, lambda N: [random_tensor(N, 74)], 1, swiglu_module._forward),
    "rope": Op(rope, independent_rope, rope_inputs, 1, rope_module._rotate),
}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())


@pytest.fixture(autouse=True)
def small_blocks(_version: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks smaller than the rows of these tests, where rows may span several."""
    for name, constant, size in (("swiglu", "BLOCK", 16), ("rope", "PAIRS", 8)):
        module = implementation(name)
        if module.__name__.endswith("_triton"):
            monkeypatch.setattr(module, constant, size)


def run(op: Op, inputs: list[Tensor], *, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
    """The output and the gradients of a weighted sum of it, weights of size 1."""
    given = [x.detach().requires_grad_(i < op.num_gradients) for i, x in enumerate(inputs)]
    output = op.call(*given)
    if upstream is None:
        upstream = random_tensor(*output.shape, seed=2).to(output.dtype)
    return output.detach(), *torch.autograd.grad(output, given[: op.num_gradients], upstream)


def expected(op: Op, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """The same in fp64, of the same rounded inputs and weights."""
    wide = [x.double() for x in inputs]
    upstream = random_tensor(*op.independent(*wide).shape, seed=2).to(inputs[0].dtype)
    return run(replace(op, call=op.independent), wide, upstream=upstream.double())


def assert_near(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float) -> None:
    for mine, other in zip(found, wanted, strict=True):
        assert mine.shape == other.shape
        if mine.numel():
            assert float((mine.double() - other).abs().max()) <= tolerance * max(1.0, float(other.abs().max()))


def strided(x: Tensor) -> Tensor:
    """The same entries, of rows that are further apart than they are long."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype)
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


def transposed(x: Tensor) -> Tensor:
    """The same entries, of which no two of a row are neighbours in memory."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


@every_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [1, 7])
def test_value_and_gradient_equal_an_independent_computation(op: Op, N: int, dtype: torch.dtype) -> None:
    first, *rest = op.inputs(N)
    # A model's angles are fp32 whatever its weights are.
    rest = [x.to(torch.float32 if x.dim() == 2 and dtype != torch.float64 else dtype) for x in rest]
    inputs = [first.to(dtype), *rest]
    found = run(op, inputs)
    assert [x.dtype for x in found] == [dtype] * (1 + op.num_gradients)
    assert_near(found, expected(op, inputs), DTYPES[dtype])


@every_op
@pytest.mark.parametrize("layout", [strided, transposed])
def test_views_give_what_copies_give(op: Op, layout: Callable[[Tensor], Tensor]) -> None:
    inputs = [x.float() for x in op.inputs(5)]
    plain = run(op, inputs)
    upstream = random_tensor(*plain[0].shape, seed=2).float()
    viewed = run(op, [layout(x) if x.dim() > 1 else x for x in inputs], upstream=layout(upstream))
    for mine, other in zip(viewed, plain, strict=True):
        assert torch.equal(mine, other)


def test_rope_reads_slices_of_a_joint_projection_without_a_copy() -> None:
    N, groups, D = 3, 2, 6
    mixed = random_tensor(N, groups, 4 * D).float().requires_grad_()
    query, key, _ = mixed.split([2 * D, D, D], dim=2)
    phase = angles(N, D)
    out = rope(query.reshape(N, -1, D), phase.cos().float(), phase.sin().float()), rope(key, phase.cos(), phase.sin())
    assert_near((out[1].detach(),), (independent_rope(key.detach().double(), phase.cos(), phase.sin()),), 1e-6)
    (grad,) = torch.autograd.grad(out[0].sum() + out[1].sum(), mixed)
    assert (grad[..., 3 * D :] == 0).all()
    assert (grad[..., : 3 * D].norm(dim=-1) > 0).all()


@every_op
def test_no_rows_give_no_rows_and_empty_gradients(op: Op) -> None:
    inputs = op.inputs(3)
    empty = [x[:0] if x.dim() > 1 else x for x in inputs]
    output, *grads = run(op, empty)
    assert output.shape[0] == 0
    assert [grad.shape for grad in grads] == [x.shape for x in empty[: op.num_gradients]]
    assert all((grad == 0).all() for grad in grads)


@every_op
def test_every_entry_is_written(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = op.inputs(7)
    wanted = expected(op, inputs)

    def poisoned(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            x = original(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return allocate

    for holder, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(holder, name, poisoned(getattr(holder, name)))
    assert_near(run(op, inputs), wanted, 1e-13)


@every_op
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_stays_alone(op: Op, bad: float) -> None:
    first, *rest = (x.float() for x in op.inputs(5))
    output, grad, *_ = run(op, [first, *rest])
    broken = first.clone()
    broken[2] = bad
    found, found_grad, *_ = run(op, [broken, *rest])
    others = torch.tensor([0, 1, 3, 4])
    assert torch.equal(found[others], output[others])
    assert torch.equal(found_grad[others], grad[others])
    assert not found[2].isfinite().any()


@every_op
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_large_and_small_inputs_keep_their_precision(op: Op, scale: float) -> None:
    inputs = op.inputs(4)
    inputs[0] = inputs[0] * scale
    inputs = [x.float() for x in inputs]
    found, wanted = run(op, inputs), expected(op, inputs)
    for mine, other in zip(found, wanted, strict=True):
        assert mine.isfinite().all()
        assert (mine.double() - other).norm() <= 2e-6 * other.norm()


@every_op
def test_gradients_pass_gradcheck(op: Op) -> None:
    inputs = [x.requires_grad_(i < op.num_gradients) for i, x in enumerate(op.inputs(2))]
    assert gradcheck(op.call, inputs, fast_mode=True)


@every_op
def test_two_runs_agree_bit_for_bit(op: Op) -> None:
    inputs = [x.float() for x in op.inputs(7)]
    for mine, other in zip(run(op, inputs), run(op, inputs), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("name", OPS)
@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(5)), cut=st.integers(0, 5))
def test_rows_do_not_know_of_each_other(name: str, order: list[int], cut: int) -> None:
    op = OPS[name]
    inputs = [x.float() for x in op.inputs(5)]
    output, grad, *_ = run(op, inputs)
    upstream = random_tensor(*output.shape, seed=2).float()
    for rows in (torch.tensor(order), torch.arange(5)[:cut]):
        chosen = [x[rows] if x.dim() > 1 else x for x in inputs]
        found, found_grad, *_ = run(op, chosen, upstream=upstream[rows])
        assert torch.equal(found, output[rows])
        assert torch.equal(found_grad, grad[rows])


@every_op
def test_compiled_code_gives_the_same_value_and_gradient(op: Op) -> None:
    inputs = [x.float() for x in op.inputs(3)]
    torch._dynamo.reset()
    compiled = torch.compile(op.call, fullgraph=True, backend="aot_eager")
    for mine, other in zip(run(replace(op, call=compiled), inputs), run(op, inputs), strict=True):
        assert torch.equal(mine, other)


@every_op
def test_the_operator_is_registered_as_pytorch_wants_it(op: Op) -> None:
    inputs: list[Any] = [x.requires_grad_(i < op.num_gradients) for i, x in enumerate(op.inputs(2))]
    extra = {"rms_norm": [EPS], "rope": [False], "swiglu": []}
    name = next(key for key, other in OPS.items() if other is op)
    opcheck(op.operator, (*inputs, *extra[name]))
