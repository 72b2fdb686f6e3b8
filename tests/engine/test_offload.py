"""What a RoleMemory holds, releases and brings back: contents, storages, host buffers."""

import pytest
import torch
from torch import Tensor

from ppomax.engine.models.offload import RoleMemory


class Tensors(dict[str, list[Tensor]]):
    """By kind. Not shown where a test fails: reading what is released ends the process."""

    def __repr__(self) -> str:
        return "Tensors"


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def tensors(request: pytest.FixtureRequest) -> Tensors:
    """Two weights of one flat storage and one of its own, and so on."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here; run `make test-gpu` on a machine that has one")
    device = torch.device(request.param)
    flat, moments, grads = torch.arange(1000.0), torch.ones(7), torch.ones(9)
    flat, moments, grads = flat.to(device), moments.to(device), grads.to(device)
    odd = torch.arange(5, dtype=torch.bfloat16, device=device)
    return Tensors(weights=[flat[:300], flat[300:], odd], gradients=[grads], optimizer=[moments])


def memory_of(tensors: Tensors, offload: str = "all") -> RoleMemory:
    memory = RoleMemory(tensors, offload, tensors["weights"][0].device)
    memory.release()
    return memory


def sizes(tensors: Tensors) -> dict[str, int]:
    return {kind: sum(x.untyped_storage().nbytes() for x in found) for kind, found in tensors.items()}


def test_everything_leaves_and_comes_back_with_its_content(tensors: Tensors) -> None:
    expected = {kind: [x.clone() for x in found] for kind, found in tensors.items()}
    full = sizes(tensors)
    memory = memory_of(tensors)
    assert sizes(tensors) == {"weights": 0, "gradients": 0, "optimizer": 0}
    for _ in range(2):
        with memory.resident("weights", "gradients", "optimizer"):
            assert sizes(tensors) == full
            for kind in ("weights", "optimizer"):
                assert all(torch.equal(x, y) for x, y in zip(tensors[kind], expected[kind], strict=True))
    assert sizes(tensors) == {"weights": 0, "gradients": 0, "optimizer": 0}


def test_what_is_not_offloaded_stays(tensors: Tensors) -> None:
    full = sizes(tensors)
    memory_of(tensors, "none")
    assert sizes(tensors) == full
    memory_of(tensors, "optimizer")
    assert sizes(tensors) == {**full, "optimizer": 0}


def test_weights_that_change_while_the_optimizer_state_is_held_keep_the_change(tensors: Tensors) -> None:
    memory = memory_of(tensors)
    with memory.resident("weights"):
        with memory.resident("optimizer"):
            tensors["weights"][1].mul_(2)
            tensors["optimizer"][0].fill_(3)
        assert sizes(tensors)["optimizer"] == 0
    with memory.resident("weights", "optimizer"):
        assert tensors["weights"][0].tolist() == [float(i) for i in range(300)]
        assert tensors["weights"][1].tolist() == [2.0 * i for i in range(300, 1000)]
        assert tensors["optimizer"][0].tolist() == [3.0] * 7


def test_what_two_hold_stays_until_both_have_released_it(tensors: Tensors) -> None:
    memory = memory_of(tensors)
    with memory.resident("weights"):
        with memory.resident("weights"):
            pass
        assert sizes(tensors)["weights"] > 0
    assert sizes(tensors)["weights"] == 0


def test_what_is_prefetched_and_not_held_leaves_with_the_next_release(tensors: Tensors) -> None:
    memory = memory_of(tensors)
    memory.prefetch("optimizer")
    assert sizes(tensors)["optimizer"] > 0
    with memory.resident("weights"):
        pass
    assert sizes(tensors) == {"weights": 0, "gradients": 0, "optimizer": 0}


def test_host_memory_is_allocated_once(tensors: Tensors) -> None:
    memory = memory_of(tensors)
    places = []
    for _ in range(3):
        with memory.resident("weights", "optimizer"):
            pass
        places.append([x.data_ptr() for kind in ("weights", "optimizer") for x in memory._kinds[kind].host or ()])
    assert len(places[0]) == 3  # two storages of weights, one of the optimizer
    assert places[0] == places[1] == places[2]
    if tensors["weights"][0].is_cuda:
        assert all(x.is_pinned() for x in memory._kinds["weights"].host or ())
