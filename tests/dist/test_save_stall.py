"""How long an asynchronous save stalls training: as long as the copy of what is saved takes, and little more."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ppomax.engine.checkpoint_writers import SharedMemory

pytestmark = [pytest.mark.dist, pytest.mark.slow]
MODEL = {"hidden_size": 512, "num_layers": 6, "num_heads": 8}


def stalls_and_copies(config: dict[str, Any], folder: str, num_saves: int) -> tuple[list[float], list[float]]:
    """CPU seconds of this rank's thread in each save after the first: until it returns, and those for its copies."""
    from ppomax.engine.checkpoint_folders import Retention
    from ppomax.engine.checkpoint_saver import Saver
    from ppomax.engine.checkpoint_writers import ProcessWriter
    from ppomax.engine.config import RunConfig
    from ppomax.engine.models.roles import load_policy, role_groups
    from ppomax.engine.parallel.device import start

    start(60)
    run_config = RunConfig.model_validate(config)
    policy = load_policy(run_config, role_groups(run_config)["policy"], 32000, trained=True)
    stalls, copies = [], []

    def timed_copy(memory: SharedMemory, tensors: tuple[torch.Tensor, ...]) -> Any:
        begin = time.thread_time()
        places = copy(memory, tensors)
        copies.append(time.thread_time() - begin)
        return places

    copy, SharedMemory.copy = SharedMemory.copy, timed_copy  # type: ignore[method-assign]
    saver = Saver(folder, ProcessWriter(), Retention(1), resumed=None, timeout_seconds=120)
    try:
        for step in range(1, num_saves + 2):
            saver.finish()
            begin = time.thread_time()
            saver.save(step, {"policy": policy}, {"state": {}})
            stalls.append(time.thread_time() - begin)
        saver.finish()
    finally:
        SharedMemory.copy = copy  # type: ignore[method-assign]
        saver.close()
    return stalls[1:], copies[1:]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_save_stalls_training_for_the_copy_and_a_tenth(
    on_ranks: Callable[..., list[Any]], tmp_path: Any, num_ranks: int
) -> None:
    config = {"model": {"init": MODEL}}
    for rank, (stalls, copies) in enumerate(on_ranks(num_ranks, stalls_and_copies, config, str(tmp_path), 7)):
        beyond = statistics.median(stall / copy - 1 for stall, copy in zip(stalls, copies, strict=True))
        print(f"rank {rank}: copy {statistics.median(copies):.3f} CPU s, stall {beyond:.1%} longer")
        assert beyond <= 0.1
