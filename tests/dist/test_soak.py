"""200 PPO steps in one process, 60 on two ranks: memory, descriptors, shared memory, threads and step time flat."""

import gc
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.dist, pytest.mark.slow]
LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "one_process": (1, {}, 200),
    "tp2": (2, {"tp": 2}, 60),
    "dp2": (2, {}, 60),
}
"""Ranks, layout, steps; a tenth of them have a checkpoint, and what is measured begins after three tenths."""
SHARED_MEMORY = Path("/dev/shm")


def measured_steps(config: dict[str, Any]) -> list[dict[str, float]]:
    """Runs PPO; what this process holds at the end of each step, and the seconds that the step took."""
    from ppomax.engine import train_ppo
    from ppomax.engine.config import RunConfig

    found: list[dict[str, float]] = []
    end_step = train_ppo.end_step
    last = [time.perf_counter(), time.process_time()]

    def measure(*args: Any) -> None:
        now = [time.perf_counter(), time.process_time()]
        seconds, cpu_seconds = (b - a for a, b in zip(last, now, strict=True))
        end_step(*args)
        gc.collect()
        found.append({**held(), "seconds": seconds, "cpu_seconds": cpu_seconds})
        last[:] = time.perf_counter(), time.process_time()

    train_ppo.end_step = measure
    try:
        train_ppo.run(RunConfig.model_validate(config))
    finally:
        train_ppo.end_step = end_step
    return found


def held() -> dict[str, float]:
    lines = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    memory = {line[0].rstrip(":").lower(): float(line[1]) / 1024 for line in lines}
    return {
        "rss": memory["rss"],
        "anonymous": memory["anonymous"],
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "shared_memory": len(os.listdir(SHARED_MEMORY)),
    }


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_steps_leave_nothing_behind(on_ranks: Any, tiny: Any, tmp_path: Path, layout: str) -> None:
    num_ranks, parallel, num_steps = LAYOUTS[layout]
    config = tiny.config(
        "ppo",
        tmp_path / "run",
        parallel=parallel,
        optim={"lr": 1e-6, "critic_lr": 1e-6},  # responses keep their lengths, and steps their work
        train={"steps": num_steps, "log_every": 50},
        checkpoint={"every": num_steps // 10},
    )
    for rank, steps in enumerate(on_ranks(num_ranks, measured_steps, config, timeout=1700)):
        assert len(steps) == num_steps
        kept = steps[num_steps * 3 // 10 :]
        quarter = len(kept) // 4
        first, last = kept[:quarter], kept[-quarter:]
        medians = {
            name: (statistics.median(x[name] for x in first), statistics.median(x[name] for x in last))
            for name in kept[0]
        }
        print(layout, "rank", rank, json.dumps({name: [round(x, 4) for x in pair] for name, pair in medians.items()}))
        # Not PSS: the pool's workers are forked, so that its share of common pages depends on what the others do.
        for name in ("rss", "anonymous"):
            assert medians[name][1] == pytest.approx(medians[name][0], rel=0.02), name
        for name in ("descriptors", "threads", "shared_memory"):
            assert medians[name][1] <= medians[name][0], name
        # Of its own processor time: the machine may have other work.
        assert medians["cpu_seconds"][1] <= 1.1 * medians["cpu_seconds"][0]
