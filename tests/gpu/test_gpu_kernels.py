"""Every operation of kernels/ on CUDA: against the fp64 reference, twice, in a CUDA graph, compiled, at 2^31 entries.

The helpers take any device, so that they run in Triton's interpreter too.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from ppomax.kernels.sampling import sample_with_margins
from ppomax.tools import kernel_cases as cases
from ppomax.tools.kernel_inputs import BF16, FP32, Case, Maker, run, tensors_in

pytestmark = pytest.mark.gpu

# Relative errors |x - y| / |y|. Results in bf16 are rounded once, 2^-9 at most; gradients of the linear operations are
# products of gradients of logits in bf16.
TOLERANCE = {FP32: 2e-5, torch.float64: 1e-5, BF16: 4e-3}
LINEAR_TOLERANCE = 1e-2

CASES = (
    *(cases.rms_norm_case(N, H, dtype) for N, H, dtype in ((515, 4096, BF16), (33, 5120, FP32), (7, 1000, BF16))),
    *(cases.swiglu_case(N, F, dtype) for N, F, dtype in ((300, 11008, BF16), (77, 1111, FP32))),
    *(cases.rope_case(N, heads, D, dtype) for N, heads, D, dtype in ((300, 32, 128, BF16), (77, 3, 64, FP32))),
    cases.logprobs_case(65, 128256),
    cases.logprobs_case(33, 151936, FP32),
    cases.logprobs_case(17, 4097, temperature=0.7),
    cases.linear_logprobs_case(257, 1024, 32000),
    cases.linear_logprobs_case(100, 256, 5003, FP32),
    cases.linear_policy_loss_case(257, 1024, 32000),
    cases.linear_policy_loss_case(100, 256, 5003, FP32),
    cases.linear_policy_loss_case(257, 1024, 5003, with_all=True),
    cases.linear_cross_entropy_case(257, 1024, 32000),
    cases.linear_full_kl_case(257, 1024, 32000),
    *(cases.token_rewards_case(37, 1000, estimator) for estimator in ("k1", "k2", "k3")),
    cases.token_rewards_case(37, 1000, "full", kl=True, step_rewards=True),
    cases.gae_case(37, 1000),
    cases.gae_case(8, 8192, with_gaps=True),
    cases.gae_case(300, 2047, bootstrap=True),
    cases.experience_case(64, 1024),
    cases.experience_case(8, 8192, "k3", with_gaps=True),
    cases.experience_case(256, 3001, "full", kl=True, step_rewards=True, bootstrap=True),
    *(case(37, 1100) for case in (cases.packed_experience_case, cases.packed_gae_case, cases.packed_rewards_case)),
    *(case(257, 1111, dtype) for case in (cases.whiten_case, cases.moments_case) for dtype in (FP32, BF16)),
    cases.policy_loss_case(20011),
    cases.policy_loss_case(9999, "whitened, weighted", whitened=True, weighted=True, advantage_clip=0.5),
    cases.policy_loss_case(9999, "penalty", objective="penalty", clip=None, penalty_beta=0.1),
    cases.value_loss_case(20011),
    cases.value_loss_case(9999, None, BF16),
    cases.value_head_loss_case(515, 4096),
    cases.value_head_loss_case(33, 5120, FP32),
    cases.paged_attention_case(33, 1000, page_size=16),
    cases.paged_attention_case(5, 9000, page_size=128),
    cases.paged_attention_case(9, 700, (1, 0, 300, 2), heads=28, groups=4),
    cases.paged_attention_case(7, 300, (64, 1), D=80, dtype=FP32),
    *(cases.paged_attention_case(7, 300, (64, 1), D=D, heads=8, groups=1) for D in (64, 256)),
    *(cases.store_pages_case(515, dtype=dtype) for dtype in (BF16, FP32)),
    *(cases.rope_store_case(515, dtype=dtype) for dtype in (BF16, FP32)),
    cases.rope_store_case(37, 28, 4, 80, page_size=16),
    cases.adamw_case(10**6 + 3),
    cases.adamw_case(99999, BF16, with_all=True),
    cases.squared_norm_case(3 * 10**6 + 1),
)
EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.name}".replace(" ", "_"))
FIRST_OF_EACH = [next(case for case in CASES if case.op == op) for op in dict.fromkeys(case.op for case in CASES)]
EACH_OPERATION = pytest.mark.parametrize("case", FIRST_OF_EACH, ids=lambda case: case.op)


def moved(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Copies of the tensors of a value on a device; those of floating point in `dtype`, if it is given."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if dtype is not None and value.is_floating_point() else value.dtype, copy=True)
    return [moved(x, device, dtype) for x in value] if isinstance(value, list | tuple) else value


def results_of(case: Case, inputs: Sequence[Any]) -> list[Tensor]:
    """Outputs, gradients, and inputs that were updated in place."""
    outputs, gradients = run(case, inputs)
    updated = [] if outputs else tensors_in(list(inputs))
    return [*outputs, *gradients, *updated]


def in_fp64(case: Case, inputs: Sequence[Any]) -> list[Tensor]:
    """What the torch reference makes of the same numbers in fp64, on the CPU."""
    with patch.dict(os.environ, {"PPOMAX_KERNELS": "reference"}):
        return results_of(case, moved(inputs, torch.device("cpu"), torch.float64))


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch gives without filling it holds NaN (integers: ones), so whatever is not written shows."""

    def filled(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            x = original(*args, **kwargs)
            return x.fill_(float("nan") if x.is_floating_point() else 1)

        return call

    targets = [(torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty"), (torch, "empty_strided")]
    patches = [patch.object(owner, name, filled(getattr(owner, name))) for owner, name in targets]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in reversed(patches):
            each.stop()


def relative_error(x: Tensor, y: Tensor) -> float:
    """|x - y| / |y|; scalars are sums of terms of both signs near 1, so an error counts against 0.1 at least."""
    x, y = x.detach().double().cpu(), y.detach().double().cpu()
    size = max(y.norm().item(), 0.1 if y.dim() == 0 else 0.0)
    return (x - y).norm().item() / (size if size > 0 else 1.0)


def assert_close_to_fp64(case: Case, ours: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(ours) == len(expected)
    for i, (x, y) in enumerate(zip(ours, expected, strict=True)):
        assert x.shape == y.shape
        tolerance = LINEAR_TOLERANCE if case.op.startswith("linear") and x.dtype == BF16 else TOLERANCE.get(x.dtype, 0)
        error = relative_error(x, y)
        assert error <= tolerance, f"result {i} {tuple(x.shape)} {x.dtype}: relative error {error:.2e} > {tolerance}"


def check_against_fp64(case: Case, device: torch.device) -> None:
    inputs = case.inputs(Maker("cpu"))
    with poisoned():
        ours = results_of(case, moved(inputs, device))
    assert_close_to_fp64(case, ours, in_fp64(case, inputs))


def check_two_runs(case: Case, device: torch.device) -> None:
    inputs = case.inputs(Maker(device))
    first, second = (results_of(case, moved(inputs, device)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def check_compiled(case: Case, device: torch.device, **options: Any) -> None:
    """torch.compile may put roundings of the few operations around a kernel elsewhere, so results agree to rounding."""
    inputs = case.inputs(Maker(device))
    compiled = torch.compile(case.function, fullgraph=True, **options)
    compiled_case = Case(case.op, case.name, compiled, case.inputs, case.settings, case.num_gradients)
    ours, expected = (results_of(each, moved(inputs, device)) for each in (compiled_case, case))
    for x, y in zip(ours, expected, strict=True):
        assert relative_error(x, y) <= TOLERANCE.get(x.dtype, 0)


def check_graph(case: Case) -> None:
    """A graph captured with some numbers gives with others what a plain call gives with those, bit for bit."""
    device = torch.device("cuda")
    static, others = (case.inputs(Maker(device, seed)) for seed in (1, 2))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            results_of(case, moved(static, device))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results_of(case, static)
    for x, y in zip(tensors_in(list(static)), tensors_in(list(others)), strict=True):
        x.copy_(y)
    graph.replay()
    replayed = [x.clone() for x in captured]
    expected = results_of(case, moved(others, device))
    assert all(torch.equal(x, y) for x, y in zip(replayed, expected, strict=True))


@EACH_CASE
def test_cuda_gives_what_the_fp64_reference_gives(device: torch.device, case: Case) -> None:
    check_against_fp64(case, device)


@EACH_CASE
def test_two_runs_on_cuda_agree_bit_for_bit(device: torch.device, case: Case) -> None:
    check_two_runs(case, device)


@EACH_CASE
def test_a_cuda_graph_of_an_operation_replays_it(device: torch.device, case: Case) -> None:
    check_graph(case)


@EACH_OPERATION
def test_a_compiled_operation_gives_what_it_gave(device: torch.device, case: Case) -> None:
    check_compiled(case, device)


@pytest.mark.parametrize(
    ("case", "few"),
    [
        (cases.logprobs_case(17000, 128256), cases.logprobs_case(8, 128256)),
        (cases.rms_norm_case(530000, 4096), cases.rms_norm_case(8, 4096)),
        (cases.swiglu_case(100000, 11008), cases.swiglu_case(8, 11008)),
    ],
    ids=["logprobs", "rms_norm", "swiglu"],
)
def test_rows_behind_2_31_entries_are_like_any_others(device: torch.device, case: Case, few: Case) -> None:
    needed = 6 * 2 * tensors_in(list(case.inputs(Maker("meta"))))[0].numel()
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of GPU memory")
    whole = list(case.inputs(Maker(device)))
    num_rows = whole[0].shape[0]
    tail = [x[-8:].clone() if x.shape[0] == num_rows else x for x in whole]

    def rows_of(inputs: Sequence[Tensor]) -> list[Tensor]:
        x = inputs[0].detach().requires_grad_()
        outputs = tensors_in(case.function(x, *inputs[1:], **case.settings))
        (gradient,) = torch.autograd.grad(outputs, x, [torch.ones_like(output) for output in outputs])
        return [result[-8:].detach().clone() for result in (*outputs, gradient)]

    assert all(torch.equal(x, y) for x, y in zip(rows_of(whole), rows_of(tail), strict=True))


SAMPLING = {
    "greedy": {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0},
    "plain": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0},
    "paper": {"temperature": 0.8, "top_p": 0.9, "top_k": 0, "repetition_penalty": 1.1},
    "top_k": {"temperature": 1.5, "top_p": 1.0, "top_k": 20, "repetition_penalty": 1.0},
    "all": {"temperature": 0.7, "top_p": 0.8, "top_k": 50, "repetition_penalty": 1.3},
}


def draws(device: torch.device, R: int, V: int, dtype: torch.dtype, settings: dict[str, Any]) -> list[Tensor]:
    make = Maker("cpu")
    logits, seen = make.normal(R, V, dtype=dtype, std=3.0), make.uniform(R, V) < 0.1
    seeds, positions = torch.arange(R) * 7919 + 2**40, torch.arange(R) % 13
    inputs = {"seen": seen, "seeds": seeds, "positions": positions}
    given = {name: x.to(device) for name, x in inputs.items()}
    return tensors_in(sample_with_margins(logits.to(device), **settings, **given, vocab_size=V - 5))


def check_sampling(device: torch.device, R: int, V: int, dtype: torch.dtype, settings: dict[str, Any]) -> None:
    """Draws agree with those of the reference wherever the margin is clear, and everywhere between two runs."""
    first, second = (draws(device, R, V, dtype, settings) for _ in range(2))
    # NaN may stand where a row has nothing to say, so bits are compared.
    assert all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(first, second, strict=True))
    with patch.dict(os.environ, {"PPOMAX_KERNELS": "reference"}):
        expected = draws(torch.device("cpu"), R, V, dtype, settings)
    clear = expected[2] > 1e-4
    assert clear.float().mean() > 0.95
    assert torch.equal(first[0].cpu()[clear], expected[0][clear])
    torch.testing.assert_close(first[1].cpu()[clear], expected[1][clear], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", SAMPLING.values(), ids=SAMPLING)
@pytest.mark.parametrize(("R", "V", "dtype"), [(231, 517, FP32), (16, 32000, BF16), (8, 151936, FP32)])
def test_sampling_on_cuda_draws_the_tokens_of_the_cpu(
    device: torch.device, R: int, V: int, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    check_sampling(device, R, V, dtype, settings)
