"""Vocabulary spread over two and four gloo processes against the whole vocabulary in one, by both versions.

Sampling is in test_sampling_tp.py. Run as a script (rank, folder) this file is one of four processes; the fixture
starts them once and the tests compare what they saved. A script, because pytest's importlib mode gives test modules no
name that a spawned process could import.
"""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ppomax.kernels.linear_full_kl import linear_full_kl
from ppomax.kernels.linear_logprobs import linear_logprobs
from ppomax.kernels.linear_policy_loss import linear_policy_loss
from ppomax.kernels.logprobs import token_logprobs

pytestmark = [pytest.mark.dist, pytest.mark.one_version]

NUM_RANKS = 4
GROUP_SIZES = (2, 4)
VERSIONS = ("reference", "triton")
N, H, V = 9, 6, 24
VOCAB_SIZE = 21
CHUNK_ROWS = 4


def inputs() -> dict[str, Tensor]:
    """The whole problem, the same in every process; row 3 is masked and holds NaN."""
    generator = torch.Generator().manual_seed(0)
    names = {"hidden": (N, H), "weight": (V, H), "ref_hidden": (N, H), "ref_weight": (V, H), "logits": (N, V)}
    case = {name: torch.randn(shape, generator=generator) for name, shape in names.items()}
    case["labels"] = torch.tensor([0, 20, 12, -1, 11, 5, 13, 7, 19])
    case["old_logprobs"], case["advantages"] = torch.randn(2, N, generator=generator) - torch.tensor([[3.0], [0.0]])
    case["mask"] = case["labels"] >= 0
    for name in ("hidden", "ref_hidden", "logits"):
        case[name][3] = torch.nan
    return case


def results(case: dict[str, Tensor], tp_group: ProcessGroup | None) -> dict[str, Any]:
    """Every function that takes a group, on this rank's rows of the head and columns of the logits."""
    rank, size = (dist.get_rank(tp_group), dist.get_world_size(tp_group)) if tp_group else (0, 1)
    shard = slice(rank * V // size, (rank + 1) * V // size)
    common: dict[str, Any] = {"tp_group": tp_group, "vocab_size": VOCAB_SIZE}
    labels = case["labels"]
    saved: dict[str, Any] = {}

    logits = case["logits"][:, shard].clone().requires_grad_()
    logprobs, entropy = token_logprobs(logits, labels, temperature=0.7, **common)
    (logprobs * 2 + entropy).sum().backward()
    saved["token_logprobs"] = (logprobs, entropy)
    saved["token_logprobs_grad"] = logits.grad

    hidden, weight = case["hidden"].clone().requires_grad_(), case["weight"][shard].clone().requires_grad_()
    logprobs, entropy = linear_logprobs(hidden, weight, labels, chunk_rows=CHUNK_ROWS, **common)
    (logprobs * 2 + entropy).sum().backward()
    saved["linear_logprobs"] = (logprobs, entropy)
    saved["linear_logprobs_hidden_grad"], saved["linear_logprobs_weight_grad"] = hidden.grad, weight.grad

    hidden, weight = case["hidden"].clone().requires_grad_(), case["weight"][shard].clone().requires_grad_()
    loss = linear_policy_loss(
        hidden,
        weight,
        labels,
        case["old_logprobs"],
        case["advantages"],
        torch.full((N,), 1 / N),
        clip=0.2,
        entropy_coef=0.1,
        **common,
    )
    loss.loss.backward()
    saved["linear_policy_loss"] = tuple(loss)
    main_grad = torch.zeros_like(weight)
    part = linear_policy_loss(
        case["hidden"],
        weight,
        labels,
        case["old_logprobs"],
        case["advantages"],
        torch.full((N,), 1 / N),
        clip=0.2,
        entropy_coef=0.1,
        main_grad=main_grad,
        chunk_rows=CHUNK_ROWS,
        **common,
    )
    saved["linear_policy_loss_in_chunks"] = tuple(part)
    saved["linear_policy_loss_main_grad"] = main_grad
    saved["linear_policy_loss_hidden_grad"], saved["linear_policy_loss_weight_grad"] = hidden.grad, weight.grad

    saved["linear_full_kl"] = linear_full_kl(
        case["hidden"],
        case["weight"][shard],
        case["ref_hidden"],
        case["ref_weight"][shard],
        case["mask"],
        chunk_rows=CHUNK_ROWS,
        **common,
    )
    return saved


def detached(x: Any) -> Any:
    return tuple(detached(y) for y in x) if isinstance(x, tuple) else x.detach()


def run_rank(rank: int, folder: Path) -> None:
    """Saves the results of every version for every size of group that this rank is in."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=NUM_RANKS,
        timeout=timedelta(seconds=60),
    )
    groups = {size: dist.new_group(list(range(size))) for size in GROUP_SIZES}
    saved = {}
    for version in VERSIONS:
        os.environ["PPOMAX_KERNELS"] = version
        for size, group in groups.items():
            if rank < size:
                saved[version, size] = {name: detached(x) for name, x in results(inputs(), group).items()}
    torch.save(saved, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, int], Any]]:
    """What each of the processes computed."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)]) for rank in range(NUM_RANKS)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0] * NUM_RANKS
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(NUM_RANKS)]


@pytest.fixture(params=[(version, size) for version in VERSIONS for size in GROUP_SIZES], ids=str)
def ranks(request: pytest.FixtureRequest, processes: list[dict[tuple[str, int], Any]]) -> list[dict[str, Any]]:
    """What each rank of one group computed."""
    return [process[request.param] for process in processes[: request.param[1]]]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The same by one process that holds the whole vocabulary, by the reference."""
    return results(inputs(), None)


REPLICATED = [
    "token_logprobs",
    "linear_logprobs",
    "linear_logprobs_hidden_grad",
    "linear_policy_loss",
    "linear_policy_loss_hidden_grad",
    "linear_policy_loss_in_chunks",
    "linear_full_kl",
]


@pytest.mark.parametrize("name", REPLICATED)
def test_every_rank_has_the_result_of_one_process(
    name: str, ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    for rank in ranks:
        torch.testing.assert_close(rank[name], detached(alone[name]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", REPLICATED)
def test_ranks_agree_bit_for_bit(name: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks[1:]:
        torch.testing.assert_close(rank[name], ranks[0][name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("token_logprobs_grad", 1),
        ("linear_logprobs_weight_grad", 0),
        ("linear_policy_loss_weight_grad", 0),
        ("linear_policy_loss_main_grad", 0),
    ],
)
def test_shards_of_gradients_make_up_the_whole(
    name: str, dim: int, ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    torch.testing.assert_close(torch.cat([rank[name] for rank in ranks], dim=dim), alone[name], rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]))
