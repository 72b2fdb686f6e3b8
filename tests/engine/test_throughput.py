"""Seconds, tokens and operations of the phases of an iteration."""

import time

import pytest
import torch

from ppomax.engine import throughput
from ppomax.engine.config_models import ArchitectureConfig
from ppomax.engine.config_ppo import PpoConfig
from ppomax.engine.models.shape import shape_from_init
from ppomax.engine.plan.gpus import gpu_of_device
from ppomax.engine.throughput import PhaseClock, Shapes, Work, iteration_work

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("device_name", "gpu"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A100 80GB PCIe", "a100-80g"),
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_drivers_names_of_gpus(device_name: str, gpu: str | None) -> None:
    found = gpu_of_device(device_name)
    assert (found.name if found else None) == gpu


def test_the_phases_add_up_and_start_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 4.0, 9.0, 11.0, 20.0])
    monkeypatch.setattr(throughput, "time", type("Clock", (), {"perf_counter": lambda: next(now)}))
    clock = PhaseClock(1000.0, CPU)  # 0
    with clock.phase("rollout"):  # 1 to 3
        pass
    with clock.phase("update"):  # 4 to 9
        pass
    found = clock.record({"rollout": Work(100, 400), "update": Work(50, 4000)})  # 11
    assert found.pop("host_rss_gib") > 0
    assert found == {
        **{"seconds": 11, "rollout_seconds": 2, "update_seconds": 5, "other_seconds": 4},
        **{"rollout_tokens_per_second": 50, "rollout_mfu": 0.2, "update_tokens_per_second": 10, "update_mfu": 0.8},
    }
    assert {name: x for name, x in clock.record({}).items() if name.endswith("seconds")} == {
        "seconds": 9,
        "other_seconds": 9,
    }


def test_without_a_rate_there_is_no_utilisation() -> None:
    clock = PhaseClock(None, CPU)
    with clock.phase("rollout"):
        time.sleep(0.001)
    assert not [name for name in clock.record({"rollout": Work(1, 1)}) if name.endswith("_mfu")]


def test_operations_are_two_for_each_weight_and_token_and_three_times_that_with_gradients() -> None:
    init = ArchitectureConfig(hidden_size=64, num_layers=2, ffn_hidden_size=128, vocab_size=1000)
    policy, scalar = shape_from_init(init, 1000), shape_from_init(init, 1000, scalar=True)
    lengths, sampled = [1.0, 1.0], [1.0, 1.0]  # almost nothing to attend to
    shapes = Shapes(policy, scalar, policy, (scalar,))
    work = iteration_work(shapes, lengths, sampled, PpoConfig(preset="none", epochs=2), trains=True)
    # Norms have no products, and the embedding is read, not multiplied.
    weights = policy.num_parameters() - 1000 * 64 - 5 * 64
    attention = 2 * 2 * policy.num_heads * policy.head_dim
    body = 2 * (2 * (weights - 1000 * 64) + attention)
    assert work["rollout"] == Work(2, body + 2 * 2 * 1000 * 64)
    assert work["scoring"].flops == 2 * (body + 2 * 2 * 1000 * 64) + 2 * (body + 2 * 2 * 64)
    assert work["update"] == Work(4, 2 * 3 * (body + 2 * 2 * 1000 * 64 + body + 2 * 2 * 64))
    frozen = iteration_work(shapes, lengths, sampled, PpoConfig(preset="none"), trains=False)
    assert frozen["update"].flops == 3 * (body + 2 * 2 * 64)
