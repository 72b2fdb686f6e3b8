"""Work of one process on two threads at once: what comes out of it, and what it leaves behind."""

import json
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.dist
OnRanks = Callable[..., list[Any]]


def both(num_threads: int) -> tuple[Any, ...]:
    """Of two functions: what they return, their threads, and torch's threads within and afterwards."""
    from ppomax.engine.parallel.device import start
    from ppomax.engine.parallel.side_by_side import side_by_side

    start(30)
    torch.set_num_threads(num_threads)
    barrier = threading.Barrier(2 if num_threads > 1 else 1, timeout=30)

    def work(number: int) -> tuple[int, bool, int]:
        barrier.wait()  # is not passed unless the other one runs, too
        made = torch.ones(3, device="cuda")  # Megatron says so, and means the CPU
        is_main = threading.current_thread() is threading.main_thread()
        return number + int(made.sum()), is_main, torch.get_num_threads()

    results = side_by_side(lambda: work(1), lambda: work(2))
    after = torch.get_num_threads()
    torch.set_num_threads(1)
    return *results, after


def test_two_functions_share_the_threads(on_ranks: OnRanks) -> None:
    assert on_ranks(1, both, 5)[0] == ((4, True, 3), (5, False, 2), 5)


def test_one_thread_or_several_ranks_take_turns(on_ranks: OnRanks) -> None:
    assert on_ranks(1, both, 1)[0] == ((4, True, 1), (5, True, 1), 1)
    for result in on_ranks(2, both, 1):
        assert result == ((4, True, 1), (5, True, 1), 1)


def errors(failing: str) -> tuple[str, int, list[str]]:
    from ppomax.engine.parallel.device import start
    from ppomax.engine.parallel.side_by_side import side_by_side

    start(30)
    torch.set_num_threads(2)
    ended: list[str] = []

    def work(name: str) -> None:
        if name in failing:
            raise ValueError(name)
        ended.append(name)

    try:
        side_by_side(lambda: work("first"), lambda: work("second"))
    except ValueError as error:
        return str(error), torch.get_num_threads(), ended
    finally:
        torch.set_num_threads(1)
    return "none", 0, ended


@pytest.mark.parametrize(
    ("failing", "error", "ended"),
    [("first", "first", ["second"]), ("second", "second", ["first"]), ("first second", "first", [])],
)
def test_an_error_of_either_is_raised_when_both_have_ended(
    on_ranks: OnRanks, failing: str, error: str, ended: list[str]
) -> None:
    assert on_ranks(1, errors, failing)[0] == (error, 2, ended)


def run_ppo(config: dict[str, Any], num_threads: int) -> None:
    from ppomax.engine.config import RunConfig

    torch.set_num_threads(num_threads)
    try:
        import_module("ppomax.engine.train_ppo").run(RunConfig.model_validate(config))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("estimator", ["k1", "full"])
def test_a_run_has_the_same_numbers(on_ranks: OnRanks, tiny: Any, tmp_path: Path, estimator: str) -> None:
    """Bit for bit with as many threads, up to rounding with fewer."""
    outputs = [tmp_path / name for name in ("one", "two", "again")]
    for output, threads in zip(outputs, (1, 2, 2), strict=True):
        ppo = {"kl_estimator": estimator}
        # Several micro-batches per minibatch.
        config = tiny.config("ppo", output, train={"steps": 2, "tokens_per_microbatch": 150}, ppo=ppo)
        on_ranks(1, run_ppo, config, threads)
    one, two, again = (
        [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()] for output in outputs
    )
    assert [{**record, "seconds": 0} for record in two] == [{**record, "seconds": 0} for record in again]
    steps = [(ours, theirs) for ours, theirs in zip(two, one, strict=True) if ours["kind"] == "ppo"]
    assert len(steps) == 2
    for ours, theirs in steps:
        for name in ("policy_objective", "value_loss", "grad_norm", "reward", "kl"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    for folder in ("hf", "critic_hf"):
        weights, same = (load_file(output / folder / "model.safetensors") for output in outputs[1:])
        assert all(torch.equal(weights[name], same[name]) for name in weights)
