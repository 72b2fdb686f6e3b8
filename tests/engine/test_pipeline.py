"""Process groups and schedules: what they keep, and for how long they wait."""

import datetime
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ppomax.engine.config import RunConfig
from ppomax.engine.config_models import ArchitectureConfig, ModelConfig, ParallelConfig
from ppomax.engine.data.batches import Pack, last_token_rows
from ppomax.engine.models.roles import load_role, role_groups, role_packs
from ppomax.engine.models.shape import shape_from_init
from ppomax.engine.models.transformer import transformer_config
from ppomax.engine.parallel.device import start, stop
from ppomax.engine.parallel.layout import ParallelLayout
from ppomax.engine.parallel.pipeline import run_forward


@pytest.fixture
def world() -> Iterator[None]:
    torch.set_num_threads(1)
    start(60)
    yield
    stop()


def test_every_group_of_a_role_waits_as_long_as_the_configuration_says(world: None) -> None:
    groups = role_groups(RunConfig(parallel=ParallelConfig(timeout_seconds=77)))["policy"]
    made: list[Any] = [group for group in vars(groups.megatron).values() if group is not None]
    timeouts = {group._get_backend(torch.device("cpu")).options._timeout for group in [*made, groups.results]}
    assert timeouts == {datetime.timedelta(seconds=77)}


def test_a_forward_pass_frees_the_hidden_states_of_earlier_microbatches(world: None, tiny: Any) -> None:
    config = RunConfig()
    role = load_role("policy", tiny.model("policy"), config, role_groups(config)["policy"])
    sequences = [torch.arange(20)] * 6
    packs = role_packs(role, sequences, last_token_rows([20] * 6), 20)
    seen: list[weakref.ref[Tensor]] = []
    alive = []

    def compute(hidden: Tensor, pack: Pack) -> Tensor:
        seen.append(weakref.ref(hidden))
        alive.append(sum(ref() is not None for ref in seen))
        return hidden.sum(1)

    run_forward(role.modules, role.groups, packs, compute, 6)
    assert len(seen) == 6
    assert max(alive) <= 2  # this one, and the one that the schedule is about to replace


@pytest.mark.parametrize(("vpp", "is_batched"), [(1, True), (2, False)])
def test_interleaved_stages_never_batch_their_exchanges(
    monkeypatch: pytest.MonkeyPatch, vpp: int, is_batched: bool
) -> None:
    """Where they do, two stages compute wrong losses, and Megatron says nothing; on a CPU nobody batches."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    groups: Any = SimpleNamespace(layout=ParallelLayout(tp=1, pp=2, dp=1, vpp=vpp))
    shape = shape_from_init(ArchitectureConfig(), 300)
    config = transformer_config(ModelConfig(), shape, groups, sequence_parallel=False, on_cpu=True)
    assert (config.batch_p2p_comm, config.overlap_p2p_comm) == (is_batched, not is_batched)
