"""RMSNorm, rotary embedding and SwiGLU against torch's own modules, complex rotation and the formula in fp64."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from ppomax.kernels.rms_norm import rms_norm
from ppomax.kernels.rope import rope
from ppomax.kernels.swiglu import swiglu


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
    with pytest.raises(ValueError, match="is odd"):
        swiglu(torch.zeros(2, 3))
