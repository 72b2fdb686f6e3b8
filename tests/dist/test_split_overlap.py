"""Roles on ranks of their own work at the same time: what the trace of a run shows, and what it saves."""

import contextlib
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

pytestmark = pytest.mark.dist
Span = tuple[float, float]

ON_FIRST, ON_SECOND = {"num_ranks": 1}, {"first_rank": 1}
SPLIT = {"policy": ON_FIRST, "reference": ON_FIRST, "critic": ON_SECOND, "reward": ON_SECOND}
COLOCATED: dict[str, Any] = {}
UPDATES = ("policy gradients", "critic gradients")
SCORING = {"reward scores", "critic values"}, {"reference log-probs", "policy log-probs"}


def run_ppo(config: dict[str, Any], one_after_another: bool) -> None:
    """On a worker. one_after_another: the ranks wait for each other after each pass of each role."""
    from ppomax.engine.config import RunConfig

    places = {
        "ppo.scoring": ("sequence_scores", "token_logprobs", "token_values"),
        "ppo.experience": ("token_logprobs",),
        "ppo.update": ("_policy_gradients", "_critic_gradients"),
    }
    with contextlib.ExitStack() as patches:
        for name, functions in places.items() if one_after_another else ():
            module = import_module(f"ppomax.engine.{name}")
            for function in functions:
                patches.enter_context(patch.object(module, function, then_wait(getattr(module, function))))
        import_module("ppomax.engine.train_ppo").run(RunConfig.model_validate(config))


def then_wait(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        dist.barrier()
        return result

    return call


def spans(output: Path, names: set[str]) -> list[Span]:
    """(start, end) of the named events of all ranks, seconds."""
    found = []
    for file in sorted((output / "traces").glob("rank_*.json")):
        for event in json.loads(file.read_text().rstrip(",\n") + "]"):
            if event["name"] in names:
                found.append((event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6))
    return found


def total(some: list[Span]) -> float:
    return sum(end - start for start, end in some)


def shared(some: list[Span], others: list[Span]) -> float:
    """Seconds that lie in both."""
    pairs = ((max(a[0], b[0]), min(a[1], b[1])) for a in some for b in others)
    return sum(max(0.0, end - start) for start, end in pairs)


def overlap(output: Path, some: set[str], others: set[str]) -> float:
    """Of the shorter of two kinds of work, the share of time in which the other one goes on too."""
    ours, theirs = spans(output, some), spans(output, others)
    return shared(ours, theirs) / min(total(ours), total(theirs))


def test_the_measure_of_overlap() -> None:
    assert shared([(0.0, 2.0), (4.0, 6.0)], [(1.0, 5.0)]) == 2.0
    assert total([(0.0, 2.0), (4.0, 6.0)]) == 4.0


def test_a_trace_has_the_work_of_each_rank_alone(on_ranks: Callable[..., list[Any]], tiny: Any, tmp_path: Path) -> None:
    config = tiny.config("ppo", tmp_path / "run", parallel=SPLIT, monitor={"trace": True}, train={"steps": 1})
    on_ranks(2, run_ppo, config, False)
    names = [
        {event["name"] for event in json.loads(path.read_text().rstrip(",\n") + "]")}
        for path in (tmp_path / "run/traces/rank_0.json", tmp_path / "run/traces/rank_1.json")
    ]
    both = {"checkpoint"}
    assert names[0] - both == {"rollout", "reference log-probs", "policy log-probs", "policy gradients"}
    assert names[1] - both == {"reward scores", "critic values", "critic gradients"}


@pytest.mark.slow
def test_split_roles_overlap_and_save_time(on_ranks: Callable[..., list[Any]], tiny: Any, tmp_path: Path) -> None:
    """Two processes with one thread each; it needs two cores to itself. Best of three runs each: noise only adds."""

    def run(name: str, parallel: dict[str, Any], one_after_another: bool = False) -> tuple[float, Path]:
        """Seconds of the second iteration, and the folder."""
        seconds = []
        for number in range(3):
            output = tmp_path / f"{name}_{number}"
            config = tiny.config(
                "ppo",
                output,
                num_layers=16,
                parallel=parallel,
                monitor={"trace": True},
                ppo={"rollout_size": 32, "minibatch_size": 8, "epochs": 2},
                train={"steps": 2, "tokens_per_microbatch": 800},
            )
            on_ranks(2, run_ppo, config, one_after_another, timeout=300)
            lines = (output / "metrics.jsonl").read_text().splitlines()
            seconds.append((json.loads(lines[-1])["seconds"], output))
        return min(seconds)

    split, output = run("split", SPLIT)
    apart, apart_output = run("one_after_another", SPLIT, one_after_another=True)
    colocated, _ = run("colocated", COLOCATED)
    updates = overlap(output, {UPDATES[0]}, {UPDATES[1]})
    scoring = overlap(output, *SCORING)
    print(f"at the same time: {updates:.2f} of the shorter update, {scoring:.2f} of the shorter scoring")
    print(f"seconds of an iteration: split {split:.2f}, one after another {apart:.2f}, colocated dp2 {colocated:.2f}")
    print(f"split / one after another {split / apart:.2f}, split / colocated {split / colocated:.2f}")
    assert overlap(apart_output, {UPDATES[0]}, {UPDATES[1]}) < 0.1
    assert updates >= 0.6
    assert split < apart
