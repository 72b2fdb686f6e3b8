"""Draws with the vocabulary spread over two and four gloo processes: the tokens of one process, in both versions."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ppomax.kernels.sampling import Draw, sample_with_margins

pytestmark = [pytest.mark.dist, pytest.mark.one_version]

R, V = 1, 24
"""Six columns a rank of four: blocks of four ids span ranks."""

KEYS = {"seeds": torch.tensor([2**40 + 1]), "positions": torch.tensor([77])}
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "seen": None, **KEYS}


def cases() -> dict[str, tuple[Tensor, dict[str, Any]]]:
    """Logits of the whole vocabulary and settings, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(R, V, generator=generator) * 2
    seen = torch.rand(R, 21, generator=generator) < 0.3
    banned = logits.clone()
    banned[:, 6:12] = -torch.inf  # all that rank 1 of 4 has
    broken = logits.clone()
    broken[:, 13] = torch.nan
    paper = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1, "seen": seen, "vocab_size": 21}
    return {
        "plain": (logits, {}),
        "paper": (logits, paper),
        "top-k and top-p": (logits, {"top_k": 15, "top_p": 0.7}),
        "equals": (torch.zeros(R, V), {"top_k": 17}),
        "equal masses": (torch.zeros(R, V), {"top_p": 0.5}),
        "a rank of padding": (logits, {"vocab_size": 17, "top_p": 0.95}),
        "greedy": (torch.zeros(R, V).index_fill_(1, torch.tensor([7, 13, 20]), 1.0), {"temperature": 0.0}),
        "a banned rank": (banned, {}),
        "not a number": (broken, {"top_k": 20}),
    }


def draws(version: str, tp_group: ProcessGroup | None) -> dict[str, tuple[Tensor, ...]]:
    """Every case, on this rank's columns."""
    rank, size = (dist.get_rank(tp_group), dist.get_world_size(tp_group)) if tp_group else (0, 1)
    shard = slice(rank * V // size, (rank + 1) * V // size)
    environment = {"PPOMAX_KERNELS": version, "TRITON_INTERPRET": "1"}
    with patch.dict(os.environ, environment):
        return {
            name: tuple(sample_with_margins(logits[:, shard], **{**NEUTRAL, **settings}, tp_group=tp_group))
            for name, (logits, settings) in cases().items()
        }


def draws_of_rank(version: str) -> dict[str, tuple[Tensor, ...]]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    return draws(version, dist.group.WORLD)


@pytest.fixture(scope="module")
def run_on_ranks() -> Iterator[Callable[..., list[Any]]]:
    path = Path(__file__).parents[1] / "dist" / "pool.py"
    spec = importlib.util.spec_from_file_location("_by_path_pool", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pool = module.Pool()
    yield pool.run
    pool.close()


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("version", ["reference", "triton"])
def test_ranks_draw_what_one_process_draws(
    version: str, num_ranks: int, run_on_ranks: Callable[..., list[Any]]
) -> None:
    alone = draws(version, None)
    ranks = run_on_ranks(num_ranks, draws_of_rank, version)
    for name, wanted in alone.items():
        for rank in ranks:
            torch.testing.assert_close(rank[name], ranks[0][name], rtol=0, atol=0, equal_nan=True)
        draw, expected = Draw(*ranks[0][name]), Draw(*wanted)
        exact = (draw.tokens, draw.margins), (expected.tokens, expected.margins)
        torch.testing.assert_close(*exact, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(draw[1:], expected[1:], rtol=1e-6, atol=1e-6, equal_nan=True)


def test_cases_draw_what_they_are_meant_to() -> None:
    alone = {name: Draw(*x) for name, x in draws("reference", None).items()}
    assert alone["greedy"].tokens.tolist() == [7]
    assert (alone["equals"].tokens < 17).all()
    assert (alone["equal masses"].tokens < 12).all()
    assert alone["not a number"].logprobs.isnan().all()
    torch.testing.assert_close(alone["equals"].sampling_logprobs, torch.full((R,), -torch.tensor(17.0).log().item()))
