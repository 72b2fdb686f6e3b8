"""Parts of an iteration: taken from its spans, and set against work that is counted by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ppomax.engine.trace import Trace
from ppomax.tools.bench_parts import Event, by_iteration, least, part_rows, part_table, read_trace, seconds_of_parts
from ppomax.tools.bench_ppo import CASES
from ppomax.tools.bench_timing import Ceilings
from ppomax.tools.bench_workload import bench_config

EVENTS = [
    *(Event("rollout", 0, 10), Event("prefill", 1, 3), Event("decoding", 3, 9), Event("critic values", 10, 12)),
    *(Event("policy gradients", 13, 14), Event("policy gradients", 15, 17)),
    *(Event("rollout", 20, 30), Event("prefill", 20, 21)),
]
TIMING = {"rollout_seconds": 10.0, "scoring_seconds": 3.0, "update_seconds": 5.0}


def test_a_trace_is_read_back(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "rank_0.json", 0)
    trace.add("rollout", 2_000_000_000, 5_500_000_000)
    assert read_trace(tmp_path / "rank_0.json") == [Event("rollout", 2.0, 5.5)]


def test_an_iteration_begins_with_its_rollout() -> None:
    first, second = by_iteration(EVENTS[::-1])
    assert first == EVENTS[:6]
    assert second == EVENTS[6:]


def test_parts_add_up_to_their_phases() -> None:
    found = seconds_of_parts(EVENTS[:6], TIMING)
    assert found == {
        **{"prefill": 2, "decoding": 6, "rest of the rollout": 2, "critic values": 2, "experience": 1},
        **{"policy gradients": 3, "optimizer": 2, "checkpoint": 0},
    }
    assert sum(found.values()) == sum(TIMING.values())


def test_what_happens_at_the_same_time_is_shared() -> None:
    events = [Event("policy gradients", 0, 6), Event("critic gradients", 2, 5), Event("critic gradients", 7, 8)]
    found = seconds_of_parts(events, {"update_seconds": 9.0})
    assert found["policy gradients"] == 2 + 3 / 2 + 1
    assert found["critic gradients"] == 3 / 2 + 1
    assert found["optimizer"] == 2


def test_work_is_counted_as_by_hand(tmp_path: Path) -> None:
    work = replace(CASES["exact"], prompts=8)
    config = bench_config(work, tmp_path, ["train.steps=1"])
    found = least(work, config, 48.0, 48.0)
    matrices = 4 * (256 * 128 + 128 * 128 + 768 * 128 + 128 * 384)  # of the layers
    heads, tokens, sampled = 1024 * 128, 8 * 80, 8 * 48
    attention = 4 * 2 * 128 * 80  # of a token: layers, two products of half the sequence, heads x head size, length
    body = tokens * (2 * matrices + attention)
    assert found["reward scores"].flops == body
    assert found["reference log-probs"].flops == body + sampled * 2 * heads
    assert found["policy gradients"].flops == 3 * (body + sampled * 2 * heads)
    assert found["critic gradients"].flops == 3 * body
    rollout = found["prefill"].flops + found["decoding"].flops
    assert rollout == body + sampled * 2 * heads
    weights = 4 * (matrices + heads + 9 * 128)
    keys_and_values = 2 * 4 * 4 * 2 * 32 * sampled * (32 + 24)
    assert found["decoding"].num_bytes == 47 * weights + keys_and_values
    numbers = matrices + 2 * heads + 9 * 128
    assert found["optimizer"].num_bytes == 2 * 2 * 28 * numbers
    assert "policy log-probs" not in found  # the sampler's are taken
    assert "policy log-probs" in least(work, bench_config(work, tmp_path, RECOMPUTES), 48.0, 48.0)


RECOMPUTES = ["train.steps=1", "ppo.old_logprobs=recompute"]


def test_the_roofline_is_the_longer_of_operations_and_bytes(tmp_path: Path) -> None:
    work = CASES["exact"]
    needed = least(work, bench_config(replace(work, prompts=8), tmp_path, ["train.steps=1"]), 48.0, 48.0)
    limits = Ceilings(bytes_per_second=1e9, flops_per_second=1e12, what="by hand")
    rows = part_rows({"optimizer": 2.0, "reward scores": 1.0, "other": 1.0}, needed, limits, 2, 4.0)
    assert rows["optimizer"]["least_seconds"] == needed["optimizer"].num_bytes / 1e9 / 2
    assert rows["reward scores"]["least_seconds"] == needed["reward scores"].flops / 1e12 / 2
    assert rows["reward scores"]["tflops"] == pytest.approx(needed["reward scores"].flops / 2e12)
    assert rows["other"] == {"seconds": 1.0, "share": 0.25}
    assert rows["iteration"]["of_roofline"] == rows["iteration"]["least_seconds"] / 4
    assert json.loads(json.dumps(rows)) == rows
    assert len(part_table(rows)) == 2 + len(rows)
