"""The engine's own cost of a PPO step: no micro-batch makes the host wait, and times are taken apart as they should."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ppomax.engine.ppo import losses
from ppomax.tools.bench_overhead import MODEL_CALLS, Measured, measure, nearly_empty
from ppomax.tools.bench_ppo import CASES

WORK = nearly_empty(replace(CASES["eos"], prompts=8, max_new_tokens=8, mean_new_tokens=6.0))
"""Two minibatches of 4 sequences of up to 40 tokens."""
WHOLE, SMALL = 160, 40


def run(folder: Path, limit: int) -> Measured:
    return measure(WORK, folder / str(limit), 1, [f"train.tokens_per_microbatch={limit}", "monitor.action=off"])


def test_no_micro_batch_makes_the_host_wait(tmp_path: Path) -> None:
    whole, small = run(tmp_path, WHOLE), run(tmp_path, SMALL)
    assert whole.steps[0].num_passes["update"] == 4  # two minibatches for each of two roles
    assert small.steps[0].num_passes["update"] >= 12
    assert whole.syncs == small.syncs
    assert sum(whole.syncs.values()) > 10  # it does see those that there are
    step = small.steps[0]
    kinds = {kind for _, kind in step.calls}
    assert kinds == {kind for kind, _, _ in MODEL_CALLS}
    parts = step.all_own.wall + sum(span.wall for span in step.calls.values())
    assert parts == pytest.approx(step.whole.wall)
    assert all(span.wall > 0 for span in (*map(step.own, step.phases), *step.calls.values()))


@pytest.mark.slow
def test_a_wait_in_a_loss_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., Any] = losses.head_policy_loss

    def waits(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        float(result.loss)
        return result

    monkeypatch.setattr(losses, "head_policy_loss", waits)
    whole, small = run(tmp_path, WHOLE), run(tmp_path, SMALL)
    assert sum(small.syncs.values()) > sum(whole.syncs.values())
