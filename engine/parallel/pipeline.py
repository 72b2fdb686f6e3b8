"""The only callers of Megatron's schedules: a forward pass, or forward and backward, over the packs of one replica.

Both give their results to every rank of the role, so that nothing above this file knows about stages. A rank with
several chunks of the model runs the interleaved schedule: as many packs as a multiple of pp, all of one length.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from ppomax.engine.data.batches import Pack
from ppomax.engine.parallel.groups import RoleGroups
from ppomax.engine.parallel.side_by_side import can_share_threads, side_by_side


class LossFunction(Protocol):
    """Of one pack after the last chunk: hidden [M, H] of its rows -> (loss to add up, metrics [K] to add up)."""

    def __call__(self, hidden: Tensor, pack: Pack) -> tuple[Tensor, Tensor]: ...


@torch.no_grad()
def run_forward(
    chunks: Sequence[torch.nn.Module],
    groups: RoleGroups,
    packs: Sequence[Pack],
    compute: Callable[[Tensor, Pack], Tensor],
    num_outputs: int,
    *,
    width: int = 1,
) -> Tensor:
    """Runs `compute` on the rows of every pack of every replica; returns [num_outputs, width] float32 on every rank.

    chunks: this rank's, in order. packs: those of this replica; replicas have equally many.
    compute: hidden [M, H] -> [M] or [M, width] on the last stage; on a CPU two packs may be computed at the same time.
    Places that no row's index names are 0. Collective over all ranks of the role.
    """
    device = next(chunks[0].parameters()).device
    for chunk in chunks:
        chunk.eval()
    outputs = torch.zeros(num_outputs, width, device=device)

    def forward_step(iterator: Any, chunk: torch.nn.Module) -> tuple[Tensor, Callable[..., None]]:
        pack = next(iterator).to(device)

        def store(hidden: Tensor, non_loss_data: bool = True) -> None:
            # The schedule keeps what this returns until its end: not the hidden states of every micro-batch.
            outputs[pack.index] = compute(hidden, pack).reshape(-1, width).float()

        return chunk(pack), store

    @torch.no_grad()
    def run(some: Sequence[Pack]) -> None:
        _run_schedule(chunks, groups, some, forward_step, forward_only=True)

    if can_share_threads() and len(packs) > 1:
        side_by_side(lambda: run(packs[::2]), lambda: run(packs[1::2]))
    else:
        run(packs)
    dist.all_reduce(outputs, group=groups.results)
    return outputs


def run_forward_backward(
    chunks: Sequence[torch.nn.Module],
    groups: RoleGroups,
    packs: Sequence[Pack],
    loss: LossFunction,
    num_metrics: int,
) -> Tensor:
    """Adds the gradients of the summed loss into the model's buffers, reduced over replicas; returns the summed
    metrics.

    chunks: this rank's, in order, each a DistributedDataParallel. packs: those of this replica; replicas have equally
    many.
    Returns [1 + num_metrics] float64 on every rank: the loss, then the metrics. Collective over all ranks of the
    role.
    """
    device = next(chunks[0].parameters()).device
    for chunk in chunks:
        chunk.train()
    sums = torch.zeros(1 + num_metrics, dtype=torch.float64, device=device)

    def forward_step(iterator: Any, chunk: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        pack = next(iterator).to(device)

        def scaled(hidden: Tensor) -> tuple[Tensor, Tensor, dict]:
            value, metrics = loss(hidden, pack)
            sums[0] += value.detach()
            sums[1:] += metrics.detach()
            # Rows may be empty (an empty pack): the graph must still reach every parameter. One "token": never
            # divided by.
            return value + hidden.sum() * 0.0, torch.ones((), dtype=torch.int, device=device), {}

        return chunk(pack), scaled

    get_model_config(chunks[0]).finalize_model_grads_func = _finalize_grads  # chunks share their configuration
    _run_schedule(chunks, groups, packs, forward_step, forward_only=False)
    dist.all_reduce(sums, group=groups.results)
    return sums


def share_results(x: Tensor, groups: RoleGroups) -> None:
    """Adds up what the replicas' last stages have of x, 0 where they have nothing; whole on every rank of the role
    then. Collective over all ranks of the role.
    """
    dist.all_reduce(x, group=groups.results)


def _finalize_grads(chunks: list[torch.nn.Module], num_tokens: Tensor | None, **kwargs: Any) -> None:
    """Megatron's, without its division by the number of tokens: the losses already carry global weights."""
    finalize_model_grads(chunks, None, **kwargs)


def _run_schedule(
    chunks: Sequence[torch.nn.Module],
    groups: RoleGroups,
    packs: Sequence[Pack],
    forward_step: Callable,
    *,
    forward_only: bool,
) -> None:
    layout, config = groups.layout, get_model_config(chunks[0])
    pipelined = (
        {} if layout.pp == 1 else {"p2p_communicator": P2PCommunicator(pp_group=groups.megatron.pp, config=config)}
    )
    schedule = get_forward_backward_func(pp_size=layout.pp, vp_size=layout.vpp if layout.vpp > 1 else None)
    schedule(
        forward_step_func=forward_step,
        data_iterator=[iter(packs) for _ in chunks],  # each chunk takes every pack
        model=list(chunks),
        num_microbatches=len(packs),
        seq_length=packs[0].tokens.numel(),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
        pg_collection=groups.megatron,
        **pipelined,
    )
