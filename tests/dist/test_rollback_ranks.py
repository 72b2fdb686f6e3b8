"""A rollback of the monitor under two ranks, with checkpoints that are still being written beside the training: what
follows is a run that was resumed by hand from the same checkpoint, with the same tightening, bit for bit.

tests/monitor/test_rollback.py has the same for one process.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.dist, pytest.mark.slow]
LAYOUTS: dict[str, dict[str, Any]] = {"dp2": {}, "tp2": {"tp": 2}}
LR, KL_COEF = 1e-3, 0.1
KL_FACTOR, LR_FACTOR = 2.0, 0.25


@dataclass(frozen=True)
class Case:
    """every: steps between checkpoints. warmup: steps of the optimizer. limit: of the KL. healthy, alarm: steps. aside:
    the folder of a later checkpoint.
    """

    every: int
    warmup: int
    limit: float
    healthy: int
    alarm: int
    aside: str


LATER_UNDER_WAY = Case(1, 0, 0.3, healthy=1, alarm=3, aside="step_00000002.superseded-1")
"""The healthy checkpoint is published, a later one is being written. The KL at steps 1 to 3 is 0, 0.17, 0.36."""
ITSELF_UNDER_WAY = Case(2, 16, 0.17, healthy=2, alarm=4, aside="")
"""The healthy checkpoint itself is being written. The KL at steps 1 to 4 is 0, 0.01, 0.10, 0.19."""


def run_with_slow_writers(config: dict[str, Any]) -> int:
    """On a worker: the stage, whose checkpoints are never found finished between steps, only where they are waited for.
    How often something went on while a checkpoint was being written.
    """
    from ppomax.engine.config import RunConfig

    writer = import_module("ppomax.engine.checkpoint_writers").ProcessWriter
    original, num_waits = writer.answer, 0

    def answer(self: Any, timeout: float) -> Any:
        nonlocal num_waits
        num_waits += timeout == 0
        return None if timeout == 0 else original(self, timeout)

    with patch.object(writer, "answer", answer):
        import_module("ppomax.engine.train_ppo").run(RunConfig.model_validate(config))
    return num_waits


def monitor_of(case: Case) -> dict[str, Any]:
    return {
        "action": "off",
        "actions": {"kl_runaway": "rollback"},
        "limits": {"kl": case.limit},
        **{"baseline": 1, "window": 1, "confirm": 1, "kl_factor": KL_FACTOR, "lr_factor": LR_FACTOR},
    }


def records(output: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: x for key, x in row.items() if key != "seconds"} for row in rows if row["kind"] == kind]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "case",
    [pytest.param(LATER_UNDER_WAY, id="later_one_under_way"), pytest.param(ITSELF_UNDER_WAY, id="itself_under_way")],
)
def test_what_follows_a_rollback_is_a_run_resumed_by_hand(
    on_ranks: Callable[..., list[Any]], tiny: Any, tmp_path: Path, case: Case, layout: str
) -> None:
    ours, by_hand = tmp_path / "rolled_back", tmp_path / "by_hand"
    shared = {"parallel": LAYOUTS[layout]}
    config = tiny.config(
        "ppo",
        ours,
        train={"steps": case.alarm},
        monitor=monitor_of(case),
        checkpoint={"every": case.every, "keep": 9},
        optim={"warmup_steps": case.warmup},
        **shared,
    )
    assert min(on_ranks(2, run_with_slow_writers, config, timeout=500)) > 0
    healthy = ours / "checkpoints" / f"step_{case.healthy:08d}"
    assert (ours / "checkpoints" / case.aside).is_dir()

    config = tiny.config(
        "ppo",
        by_hand,
        train={"steps": case.alarm, "resume": str(healthy)},
        monitor={"action": "off"},
        ppo={"kl_coef": KL_COEF * KL_FACTOR},
        optim={"lr": LR * LR_FACTOR, "critic_lr": LR * LR_FACTOR, "warmup_steps": case.warmup},
        **shared,
    )
    on_ranks(2, run_with_slow_writers, config, timeout=500)

    expected = records(by_hand, "ppo")
    assert [row["step"] for row in expected] == list(range(case.healthy + 1, case.alarm + 1))
    found = records(ours, "ppo")
    assert [row["step"] for row in found[: case.alarm]] == list(range(1, case.alarm + 1))
    assert found[case.alarm :] == expected
    (event,) = records(ours, "event")
    (back,) = records(ours, "rollback")
    assert (event["step"], event["action"], back["step"]) == (case.alarm, "rollback", case.healthy)
    files = sorted(by_hand.glob("*hf/*.safetensors"))
    assert len(files) == 2
    for path in files:
        theirs = load_file(path)
        for name, weight in load_file(ours / path.relative_to(by_hand)).items():
            assert torch.equal(weight, theirs[name]), name


def test_ranks_that_are_killed_after_a_rollback_go_on_tightened(
    on_ranks: Callable[..., list[Any]], tiny: Any, tmp_path: Path
) -> None:
    """Of what follows the rollback no checkpoint is left: first rank and others learn of it from its record."""
    output, case = tmp_path / "run", LATER_UNDER_WAY
    config = tiny.config(
        "ppo",
        output,
        train={"steps": case.alarm, "resume": "auto"},
        monitor=monitor_of(case),
        checkpoint={"every": 1, "keep": 9},
    )
    on_ranks(2, run_with_slow_writers, config, timeout=500)
    before = [records(output, kind) for kind in ("ppo", "event", "rollback")]
    for path in [*(output / "checkpoints").glob("step_*"), *output.glob("*hf")]:
        if path.name != f"step_{case.healthy:08d}":
            shutil.rmtree(path)
    on_ranks(2, run_with_slow_writers, config, timeout=500)
    assert [records(output, kind) for kind in ("ppo", "event", "rollback")] == before
    gone = [json.loads(line)["step"] for line in (output / "metrics.superseded.jsonl").read_text().splitlines()]
    assert gone == list(range(case.healthy + 1, case.alarm + 1))
