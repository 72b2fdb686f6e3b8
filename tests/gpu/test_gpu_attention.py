"""Each attention kernel on CUDA against attention written out on the CPU, sequence by sequence."""

import importlib.util

import pytest
import torch
from torch import Tensor

from ppomax.engine.models.attention import PackedSequences, choose_backend, packed_attention

pytestmark = pytest.mark.gpu

LENGTHS = (5, 1, 130, 64, 17)
HEADS, GROUPS, HEAD_DIM = 4, 2, 64


def has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def backend_case(name: str, dtype: torch.dtype, module: str) -> object:
    missing = pytest.mark.skipif(not has(module), reason=f"{module} is not installed")
    return pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}", marks=missing)


def written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention inside each sequence, float64."""
    key, value = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (key, value))
    outputs = []
    for q, k, v in zip(query.split(LENGTHS), key.split(LENGTHS), value.split(LENGTHS), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q, k) / HEAD_DIM**0.5
        future = torch.ones(scores.shape[1:]).triu(1).bool()
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        backend_case("sdpa", torch.float32, "torch"),
        backend_case("sdpa", torch.bfloat16, "torch"),
        backend_case("varlen", torch.bfloat16, "torch.nn.attention.varlen"),
        backend_case("flash_attn", torch.bfloat16, "flash_attn"),
    ],
)
def test_output_and_gradients_are_those_of_attention_written_out(
    device: torch.device, backend: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(3)
    num_tokens = sum(LENGTHS)
    # Rounded before either side sees them: only the arithmetic differs.
    inputs = [
        torch.randn(num_tokens, heads, HEAD_DIM, generator=generator).to(dtype) for heads in (HEADS, GROUPS, GROUPS)
    ]
    upstream = torch.randn(num_tokens, HEADS, HEAD_DIM, generator=generator).to(dtype)
    exact = [x.double().requires_grad_() for x in inputs]
    expected = written_out(*exact)
    expected.backward(upstream.double())

    given = [x.to(device).requires_grad_() for x in inputs]
    cu_seqlens = torch.tensor([0, *LENGTHS], device=device).cumsum(0, dtype=torch.int32)
    unused = torch.zeros(num_tokens, HEAD_DIM // 2, device=device)
    output = packed_attention(*given, PackedSequences(cu_seqlens, max(LENGTHS), unused, unused, backend))
    output.backward(upstream.to(device))

    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(output.double().cpu(), expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(given, exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad.double().cpu(), theirs.grad, rtol=tolerance, atol=tolerance)


def test_bf16_takes_the_fastest_kernel_and_fp32_the_exact_one(device: torch.device) -> None:
    assert choose_backend("auto", torch.float32, HEAD_DIM) == "sdpa"
    fast = "flash_attn" if has("flash_attn") else "varlen" if has("torch.nn.attention.varlen") else "sdpa"
    assert choose_backend("auto", torch.bfloat16, HEAD_DIM) == fast
