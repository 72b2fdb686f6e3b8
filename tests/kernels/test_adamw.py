"""The AdamW step against torch.optim.AdamW over several updates and a hand-worked first one; the sum of squares."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from ppomax.kernels import adamw as adamw_module
from ppomax.kernels import adamw_reference
from ppomax.kernels.adamw import adamw_step, squared_norm
from ppomax.kernels.dispatch import implementation

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6}
SIZES = [(1,), (7,), (0,), (3, 5), (64,), (2, 67)]
CPU = torch.device("cpu")
HAS_C = True


@pytest.fixture(autouse=True)
def small_blocks(_version: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of which the larger tensors of these tests span several."""
    module = implementation("adamw")
    is_triton = module.__name__.endswith("_triton")
    for name in ("BLOCK", "SUM_BLOCK") if is_triton else ("PIECE", "SUMMED"):
        monkeypatch.setattr(module if is_triton else adamw_reference, name, 32)


def random_tensors(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in SIZES]


def fresh_state(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(params, exp_avg, exp_avg_sq) as after some steps."""
    return random_tensors(seed, dtype), random_tensors(8, dtype), [x.square() for x in random_tensors(9, dtype)]


def bits(tensors: list[Tensor]) -> list[Tensor]:
    """Copies whose equality is that of bit patterns: NaN equals NaN, and -0 is not 0."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [x.detach().clone().view(integers[x.element_size()]) for x in tensors]


def same(tensors: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors, others, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_five_steps_equal_torch(weight_decay: float, dtype: torch.dtype, tolerance: float) -> None:
    params = random_tensors(0, dtype)
    twins = [torch.nn.Parameter(x.clone()) for x in params]
    optimizer = torch.optim.AdamW(twins, weight_decay=weight_decay, **SETTINGS)
    averages, squares = ([torch.zeros_like(x) for x in params] for _ in range(2))
    for step in range(1, 6):
        grads = random_tensors(step, dtype)
        adamw_step(params, grads, averages, squares, weight_decay=weight_decay, step=step, **SETTINGS)
        for twin, grad in zip(twins, grads, strict=True):
            twin.grad = grad.clone()
        optimizer.step()
        torch.testing.assert_close(params, [twin.data for twin in twins], rtol=tolerance, atol=tolerance / 10)
    state = [optimizer.state[twin] for twin in twins]
    torch.testing.assert_close(averages, [x["exp_avg"] for x in state], rtol=tolerance, atol=tolerance / 10)
    torch.testing.assert_close(squares, [x["exp_avg_sq"] for x in state], rtol=tolerance, atol=tolerance / 10)


def test_first_step_moves_by_the_learning_rate() -> None:
    params, grads = [torch.tensor([1.0, 1.0])], [torch.tensor([1e-3, -50.0])]
    adamw_step(
        params, grads, [torch.zeros(2)], [torch.zeros(2)], weight_decay=0.5, step=1, **{**SETTINGS, "eps": 1e-12}
    )
    # Bias correction makes the first update sign(g) * lr; the decay takes lr * 0.5 of the parameter.
    torch.testing.assert_close(params[0], torch.tensor([1 - 0.005 - 0.01, 1 - 0.005 + 0.01]))


@pytest.mark.parametrize("magnitude", [1e-15, 1e15])
def test_the_size_of_the_gradients_does_not_matter(magnitude: float) -> None:
    params, twins = random_tensors(0), random_tensors(0)
    for tensors, factor in ((params, 1.0), (twins, magnitude)):
        state = [[torch.zeros_like(x) for x in tensors] for _ in range(2)]
        grads = [x * factor for x in random_tensors(1)]
        adamw_step(tensors, grads, *state, weight_decay=0.1, step=1, **{**SETTINGS, "eps": 1e-25})
    torch.testing.assert_close(params, twins, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_gradients_update_fp32_state(dtype: torch.dtype) -> None:
    params, twins = random_tensors(0), random_tensors(0)
    grads = random_tensors(1, dtype)
    for tensors, gradients in ((params, grads), (twins, [x.float() for x in grads])):
        state = [[torch.zeros_like(x) for x in tensors] for _ in range(2)]
        adamw_step(tensors, gradients, *state, weight_decay=0.0, step=1, **SETTINGS)
        assert {x.dtype for x in tensors} == {torch.float32}
    assert same(bits(params), bits(twins))


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.3])
def test_a_scale_on_the_device_is_a_scale_of_the_gradients(scale: float) -> None:
    on_device = torch.tensor(scale)
    states = [fresh_state(), fresh_state()]
    grads = random_tensors(1)
    scaled = [x * on_device for x in grads]
    for (params, *moments), gradients, factor in ((states[0], grads, on_device), (states[1], scaled, None)):
        adamw_step(params, gradients, *moments, weight_decay=0.1, step=3, grad_scale=factor, **SETTINGS)
    for ours, theirs in zip(*states, strict=True):
        assert same(bits(ours), bits(theirs))
    assert same(grads, random_tensors(1))


@pytest.mark.parametrize("bad", [1.0, math.nan, math.inf])
@pytest.mark.parametrize("zero_grads", [False, True])
def test_where_the_flag_is_false_not_a_bit_changes(bad: float, zero_grads: bool) -> None:
    params, averages, squares = fresh_state()
    averages[4][:3] = torch.tensor([-0.0, math.nan, math.inf])
    grads, copies = random_tensors(1), random_tensors(2, torch.bfloat16)
    grads[4][5] = bad
    everything = [params, grads, averages, squares, copies]
    before = [bits(tensors) for tensors in everything]
    options: dict[str, Any] = {"grad_scale": torch.tensor(bad), "copies": copies, "zero_grads": zero_grads}
    adamw_step(
        *everything[:4], weight_decay=0.1, step=3, is_finite=torch.tensor(False), **options, **SETTINGS
    )  # fmt: skip
    assert all(same(bits(tensors), old) for tensors, old in zip(everything, before, strict=True))


def test_where_the_flag_is_true_it_makes_no_difference() -> None:
    plain, flagged = fresh_state(), fresh_state()
    for (params, *moments), flag in ((plain, None), (flagged, torch.tensor(True))):
        adamw_step(params, random_tensors(1), *moments, weight_decay=0.1, step=3, is_finite=flag, **SETTINGS)
    for ours, theirs in zip(plain, flagged, strict=True):
        assert same(bits(ours), bits(theirs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_copies_are_the_rounded_parameters(dtype: torch.dtype) -> None:
    params, *moments = fresh_state()
    copies = [torch.full(size, math.nan, dtype=dtype) for size in SIZES]
    adamw_step(params, random_tensors(1), *moments, weight_decay=0.1, step=3, copies=copies, **SETTINGS)
    assert same(bits(copies), bits([x.to(dtype) for x in params]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_zeroed_after_their_use(dtype: torch.dtype) -> None:
    plain, zeroed = fresh_state(), fresh_state()
    grads = random_tensors(1, dtype)
    adamw_step(plain[0], grads, *plain[1:], weight_decay=0.1, step=3, **SETTINGS)
    assert same(grads, random_tensors(1, dtype))
    adamw_step(zeroed[0], grads, *zeroed[1:], weight_decay=0.1, step=3, zero_grads=True, **SETTINGS)
    assert all((x == 0).all() for x in grads)
    assert all(same(x, y) for x, y in zip(plain, zeroed, strict=True))


def test_a_part_of_a_buffer_is_updated_in_place_and_the_rest_is_left() -> None:
    buffers = [torch.randn(100, generator=torch.Generator().manual_seed(seed)).abs() for seed in range(4)]
    before = [x.clone() for x in buffers]
    part = slice(13, 71)
    adamw_step(*([x[part]] for x in buffers), weight_decay=0.1, step=3, **SETTINGS)
    alone = [[x[part].clone()] for x in before]
    adamw_step(*alone, weight_decay=0.1, step=3, **SETTINGS)
    for buffer, old, (new,) in zip(buffers, before, alone, strict=True):
        torch.testing.assert_close(buffer[part], new, rtol=1e-6, atol=0)
        assert torch.equal(buffer[:13], old[:13])
        assert torch.equal(buffer[71:], old[71:])


def test_two_runs_agree_bit_for_bit() -> None:
    runs = [fresh_state(), fresh_state()]
    for params, *moments in runs:
        for step in range(1, 4):
            adamw_step(params, random_tensors(step), *moments, weight_decay=0.1, step=step, **SETTINGS)
    assert all(same(bits(x), bits(y)) for x, y in zip(*runs, strict=True))


@settings(max_examples=10, deadline=None)
@given(cut=st.integers(0, 90), step=st.integers(1, 1000), lr=st.floats(0, 1e-2), weight_decay=st.floats(0, 1))
def test_a_split_into_two_tensors_changes_nothing(cut: int, step: int, lr: float, weight_decay: float) -> None:
    whole = [torch.randn(90, generator=torch.Generator().manual_seed(seed)).abs() for seed in range(4)]
    parts = [[x[:cut].clone(), x[cut:].clone()] for x in whole]
    options = {**SETTINGS, "lr": lr, "weight_decay": weight_decay, "step": step}
    adamw_step(*([x] for x in whole), **options)
    adamw_step(*parts, **options)
    # The vector and the scalar code of a processor may differ by a rounding.
    for x, pieces in zip(whole, parts, strict=True):
        torch.testing.assert_close(x, torch.cat(pieces), rtol=1e-6, atol=1e-9)


def test_gradients_and_autograd_are_left_alone() -> None:
    params = [torch.ones(3, requires_grad=True)]
    grads = [torch.full((3,), 2.0)]
    adamw_step(params, grads, [torch.zeros(3)], [torch.zeros(3)], weight_decay=0.0, step=1, **SETTINGS)
    assert (grads[0] == 2).all()
    assert params[0].is_leaf
    assert params[0].requires_grad


def test_nothing_to_update_is_fine() -> None:
    adamw_step([], [], [], [], weight_decay=0.0, step=1, is_finite=torch.tensor(True), **SETTINGS)


def test_compiled_code_updates_the_same() -> None:
    plain, compiled = fresh_state(), fresh_state()
    scale, copies = torch.tensor(0.5), [random_tensors(2, torch.bfloat16) for _ in range(2)]

    def update(params: list[Tensor], grads: list[Tensor], m: list[Tensor], v: list[Tensor], copy: list[Tensor]) -> None:
        adamw_step(params, grads, m, v, weight_decay=0.1, step=3, grad_scale=scale, copies=copy, **SETTINGS)

    torch._dynamo.reset()
    update(plain[0], random_tensors(1), *plain[1:], copies[0])
    torch.compile(update, fullgraph=True, backend="aot_eager")(compiled[0], random_tensors(1), *compiled[1:], copies[1])
    for ours, theirs in zip((*plain, copies[0]), (*compiled, copies[1]), strict=True):
        assert same(bits(ours), bits(theirs))


def test_the_operators_are_registered_as_pytorch_wants_it() -> None:
    (param, m, v), grad = ([x[4]] for x in fresh_state()), [random_tensors(1)[4]]
    numbers = (1e-2, 0.9, 0.95, 1e-6, 0.1, 3, False)
    opcheck(adamw_module._step, (param, grad, m, v, [], torch.tensor(0.5), torch.tensor(True), *numbers))
    opcheck(adamw_module._squared_norm, ([x.view(-1) for x in random_tensors(1)[4:]],))


def test_wrong_arguments_are_named() -> None:
    x = [torch.zeros(2)]
    with pytest.raises(ValueError, match="1 params but 0 grads"):
        adamw_step(x, [], x, x, weight_decay=0.0, step=1, **SETTINGS)
    with pytest.raises(ValueError, match="1 params but 2 copies"):
        adamw_step(x, x, x, x, weight_decay=0.0, step=1, copies=[*x, *x], **SETTINGS)
    with pytest.raises(ValueError, match=r"exp_avg \(3,\)"):
        adamw_step(x, x, [torch.zeros(3)], x, weight_decay=0.0, step=1, **SETTINGS)
    with pytest.raises(ValueError, match=r"grads \(2,\) with strides \(2,\) must be contiguous"):
        adamw_step(x, [torch.zeros(4)[::2]], x, x, weight_decay=0.0, step=1, **SETTINGS)
    with pytest.raises(ValueError, match="must count from 1"):
        adamw_step(x, x, x, x, weight_decay=0.0, step=0, **SETTINGS)
    with pytest.raises(ValueError, match="not contiguous"):
        squared_norm([torch.zeros(4)[::2]], device=CPU)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)],
    ids=str,
)
def test_the_sum_of_squares_equals_that_in_fp64(dtype: torch.dtype, tolerance: float) -> None:
    tensors = random_tensors(1, dtype)
    wanted = sum(float(x.double().square().sum()) for x in tensors)
    found = squared_norm(tensors, device=CPU)
    assert found.dtype == torch.float64
    assert found.shape == ()
    assert float(found) == pytest.approx(wanted, rel=tolerance)
    assert torch.equal(found, squared_norm(tensors, device=CPU))


def test_the_sum_of_many_squares_keeps_its_precision() -> None:
    x = 1 + torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    assert float(squared_norm([x], device=CPU)) == pytest.approx(float(x.double().square().sum()), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 40, 66])
def test_the_sum_of_squares_shows_what_is_not_finite(bad: float, place: int) -> None:
    tensors = random_tensors(1)
    tensors[5][1, place] = bad
    assert not math.isfinite(float(squared_norm(tensors, device=CPU)))


@pytest.mark.parametrize("tensors", [[], [torch.zeros(0)]], ids=["no tensor", "no entry"])
def test_the_sum_of_no_squares_is_zero(tensors: list[Tensor]) -> None:
    found = squared_norm(tensors, device=CPU)
    assert (found.dtype, float(found)) == (torch.float64, 0.0)


def test_every_sum_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: original(*args, **kwargs).fill_(math.nan)

    wanted = squared_norm(random_tensors(1), device=CPU)
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    assert torch.equal(squared_norm(random_tensors(1), device=CPU), wanted)
