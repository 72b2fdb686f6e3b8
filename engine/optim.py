"""The optimizer: our AdamW on the flat tensors of Megatron's distributed optimizer, the paper's schedules, and one clip
over several models.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import megatron.core.optimizer as megatron_optimizer
import megatron.core.optimizer.distrib_optimizer as megatron_distributed
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from ppomax.engine.config_models import OptimConfig
from ppomax.engine.models.offload import RoleMemory
from ppomax.engine.parallel.device import this_device
from ppomax.engine.parallel.groups import RoleGroups
from ppomax.engine.shard_pieces import pieces_of
from ppomax.kernels.adamw import adamw_step, squared_norm


class AdamWGroups(torch.optim.Optimizer):
    """Parameter groups and moments in the form that Megatron expects of apex's FusedAdam; FlatAdamW makes the steps.

    One step count per group, none in the state. Megatron's fallback, torch's AdamW, keeps a step tensor per parameter,
    which its checkpoint loading ties together: a resumed run then counts too many steps (docs/design.md, "Optimizer").
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
    ) -> None:
        if not (bias_correction and adam_w_mode):
            raise ValueError("only AdamW with bias correction is implemented")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})


class Settings(NamedTuple):
    """What one launch of adamw_step has in common."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    step: int


class Place(NamedTuple):
    """Where a parameter's entries lie in a shard's tensors, its main weights, and the number of its group."""

    begin: int
    end: int
    main: Tensor
    group: int


@dataclass(frozen=True)
class Shard:
    """This replica's part of one gradient bucket: [n] tensors that hold a parameter's entries at the same places.

    params: main weights, float32: the model's own where it is float32. copies: the model's own weights where it has 16
    bits, else None. grads, exp_avg, exp_avg_sq: float32.
    places: of the parameters, in order. Between two lies Megatron's padding, 0 in every tensor, which a step leaves 0.
    """

    params: Tensor
    copies: Tensor | None
    grads: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    places: list[Place]

    def runs(self, key: Callable[[Place], Hashable]) -> Iterator[tuple[Any, slice]]:
        """Neighbouring parameters with the same key, as one range with the padding between them: (key, range)."""
        for value, places in groupby(self.places, key):
            run = list(places)
            yield value, slice(run[0].begin, run[-1].end)


class FlatAdamW(DistributedOptimizer):
    """Megatron's distributed optimizer (state split over replicas, fp32 main weights) with AdamW over flat tensors.

    Main weights, moments and gradients lie as Megatron's buffers do, one flat tensor each per bucket, and the tensors
    that Megatron knows are views of them; so a launch of `adamw_step` covers as many neighbouring parameters as share
    their settings, scales the gradients by a number on the device and writes the bf16 weights where the all-gather
    takes them. Gradients stay in Megatron's buffer: there is no copy of them, and `prepare_grads` is not used. The step
    does not zero them: only this replica's part passes through it, and the model zeroes its whole buffer anyway.
    Checkpoints are Megatron's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shards = [
            self._flatten(bucket, parameters["param_map"], buffer.data_parallel_group)
            for buffer, ranges in zip(self.buffers, self.gbuf_ranges, strict=True)
            for bucket, parameters in zip(buffer.buckets, *ranges.values(), strict=True)
        ]

    def _flatten(self, bucket: Any, param_map: dict[Any, Any], group: dist.ProcessGroup) -> Shard:
        own, grads = (x.view(group.size(), -1)[group.rank()] for x in (bucket.param_data, bucket.grad_data))
        has_copies = own.dtype != torch.float32
        params = own.float() if has_copies else own
        exp_avg, exp_avg_sq = torch.zeros_like(params), torch.zeros_like(params)
        places = []
        for parameter, ranges in param_map.items():
            number, order = self.model_param_group_index_map[parameter]
            main = self.optimizer.param_groups[number]["params"][order]
            begin, end = ranges["gbuf_local"].start, ranges["gbuf_local"].end
            if has_copies:
                main.data = params[begin:end]
            self.optimizer.state[main] = {"exp_avg": exp_avg[begin:end], "exp_avg_sq": exp_avg_sq[begin:end]}
            places.append(Place(begin, end, main, number))
        return Shard(params, own if has_copies else None, grads, exp_avg, exp_avg_sq, places)

    def state_tensors(self) -> list[Tensor]:
        """What only a step reads or writes: moments, and main weights that are not the model's own."""
        tensors = [x for shard in self.shards for x in (shard.exp_avg, shard.exp_avg_sq)]
        return tensors + [shard.params for shard in self.shards if shard.copies is not None]

    @torch.no_grad()
    def squared_grad_norm(self) -> Tensor:
        """Sum of the squares of all gradients, [] float64 on the device. Collective over the role's ranks.

        As Megatron counts: a parameter that two stages share, or every rank of tp repeats, once.
        """
        runs = [(shard, run) for shard in self.shards for run in shard.runs(self._counts)]
        counted = [shard.grads[where] for shard, (counts, where) in runs if counts]
        total = squared_norm(counted, device=self.shards[0].grads.device)
        dist.all_reduce(total, group=self.get_grad_stats_parallel_group())
        return total

    @torch.no_grad()
    def squared_parameter_norm(self) -> Tensor:
        """Sum of the squares of all weights, each counted once: [] float64 on the device. Collective over the role's
        ranks, whose weights must be held.
        """
        counted = [
            (shard.params if shard.copies is None else shard.copies)[where]
            for shard in self.shards
            for counts, where in shard.runs(self._counts)
            if counts
        ]
        total = squared_norm(counted, device=self.shards[0].grads.device)
        dist.all_reduce(total, group=self.get_grad_stats_parallel_group())
        return total

    def _counts(self, place: Place) -> bool:
        return param_is_not_shared(place.main) and param_is_not_tensor_parallel_duplicate(place.main, self.tp_group)

    @torch.no_grad()
    def launch_step(self, grad_scale: Tensor | None, is_finite: Tensor) -> None:
        """The next step of every weight, without waiting for the device; where is_finite is False nothing changes.

        grad_scale [] float32, is_finite [] bool, on the device and the same on all ranks. Collective over the role's
        ranks: gathers the weights that the other replicas updated. `count_step` must follow where is_finite was True.
        """
        for shard in self.shards:
            runs: dict[Settings, list[slice]] = {}
            for settings, where in shard.runs(self._settings):
                runs.setdefault(settings, []).append(where)
            for settings, ranges in runs.items():
                adamw_step(
                    *([x[where] for where in ranges] for x in (shard.params, shard.grads)),
                    *([x[where] for where in ranges] for x in (shard.exp_avg, shard.exp_avg_sq)),
                    copies=[] if shard.copies is None else [shard.copies[where] for where in ranges],
                    grad_scale=grad_scale,
                    is_finite=is_finite,
                    **settings._asdict(),
                )
        for chunk in self.model_chunks:
            chunk.start_param_sync()

    def _settings(self, place: Place) -> Settings:
        group = self.param_groups[place.group]
        # wd_mult is Megatron's mark of norms and biases, which its own scheduler, not used here, would multiply in.
        weight_decay = group["weight_decay"] * group["wd_mult"]
        return Settings(group["lr"], tuple(group["betas"]), group["eps"], weight_decay, group["step"] + 1)

    def count_step(self) -> None:
        """Makes the launched step count in the bias correction of those that follow."""
        for group in self.param_groups:
            group["step"] += 1

    def state_to_save(self, model: Mapping[str, Any]) -> dict[int, ShardedTensor]:
        """Main weights and moments that this rank saves: those of the checkpoint that Megatron calls
        "fully_reshardable", as views of what lies here; its own way gathers all state on all replicas. model: the
        sharded state of the chunks' weights.
        """
        wholes, _ = extract_sharded_tensors_and_factories(model)
        of_parameter = {id(whole.data): whole for whole in nested_values(wholes)}
        maps = [bucket["param_map"] for ranges in self.gbuf_ranges for bucket in next(iter(ranges.values()))]
        pieces = (
            piece
            for shard, param_map in zip(self.shards, maps, strict=True)
            for parameter, ranges in param_map.items()
            for piece in pieces_of(
                of_parameter[id(parameter)],
                parameter,
                ranges["param"].start,
                {
                    name: values[ranges["gbuf_local"].start : ranges["gbuf_local"].end]
                    for name, values in (
                        ("param", shard.params),
                        ("exp_avg", shard.exp_avg),
                        ("exp_avg_sq", shard.exp_avg_sq),
                    )
                },
            )
        )
        return dict(enumerate(pieces))

    def get_parameter_state_dp_zero(self, *args: Any, **kwargs: Any) -> dict[Any, Any] | None:
        """Megatron's, with the padding between buckets that its caller counts.

        megatron-core 0.16.1 leaves it out. Tied embeddings have a bucket of their own under pp > 1: where its size is
        no multiple of 128 and dp, a checkpoint would give every later parameter the state of its neighbours.
        """
        state = super().get_parameter_state_dp_zero(*args, **kwargs)
        for number, buffer in enumerate(self.buffers if state is not None else ()):
            for tensors in state[number].values():
                for name in ("param", "exp_avg", "exp_avg_sq"):
                    compact, tensors[name] = tensors[name], torch.zeros(buffer.numel)
                    parts = compact.split([bucket.numel_unpadded for bucket in buffer.buckets])
                    for bucket, part in zip(buffer.buckets, parts, strict=True):
                        tensors[name][bucket.offset : bucket.offset + part.numel()] = part
        return state


def make_optimizer(
    modules: Sequence[DistributedDataParallel], groups: RoleGroups, config: OptimConfig, *, eps: float, bf16: bool
) -> FlatAdamW:
    """The optimizer of all chunks of a model, whose gradients Megatron collects in contiguous buffers.

    Collective over all ranks of the run: those that are not the role's call `watch_optimizer_made`.
    """
    # These are the names that Megatron looks up when it builds its optimizer; there is no argument for the classes.
    megatron_optimizer.Adam = megatron_distributed.Adam = AdamWGroups
    megatron_optimizer.DistributedOptimizer = FlatAdamW
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    megatron_distributed.HAVE_APEX_OR_TE = megatron_distributed.USING_APEX_OPTIMIZER = True
    settings = OptimizerConfig(
        optimizer="adam",
        lr=0.0,
        min_lr=0.0,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=eps,
        clip_grad=0.0,  # clip_and_step does it
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(
        settings, list(modules), use_gloo_process_groups=False, pg_collection=groups.megatron
    )
    # A ChainedOptimizer of one: the dense parameters' distributed optimizer.
    return optimizer.chained_optimizers[0] if hasattr(optimizer, "chained_optimizers") else optimizer


def watch_optimizer_made() -> None:
    """The part of a rank without the role in `make_optimizer`: Megatron makes the same parameter groups on all ranks of
    the run, whatever its process groups, and asks each for its own: once for dense parameters, once for experts'.
    """
    for _ in range(2):
        dist.all_gather_object([None] * dist.get_world_size(), [])


@torch.no_grad()
def clip_and_step(
    optimizers: Sequence[FlatAdamW | None],
    groups: Sequence[RoleGroups],
    memories: Sequence[RoleMemory],
    *,
    max_norm: float,
    joint: bool,
) -> list[float] | None:
    """One step of every optimizer after clipping by the joint norm of all gradients, or each by its own.

    optimizers: of each trained role; None where it is not on this rank. groups: those of the roles. memories: of the
    roles, of which weights and gradients must be held; the state of one optimizer comes while another makes its step.
    max_norm: largest L2 norm; 0 does not clip. Returns the norms before clipping, one per optimizer, and behind them
    that of all together; or None where one is not finite: then no weight has changed. Every rank of the run must call
    it.
    Norms, clip coefficients and whether all is finite stay on the device, where the steps read them. One host sync for
    all optimizers together: for the norms, when everything is launched.
    """
    squares = torch.zeros(len(optimizers), dtype=torch.float64, device=this_device())
    for i, optimizer in enumerate(optimizers):
        if optimizer is not None:
            squares[i] = optimizer.squared_grad_norm()
    for square, role_groups in zip(squares.split(1), groups, strict=True):
        role_groups.give_to_all(square)
    norms = torch.cat([squares, squares.sum(dim=0, keepdim=True)]).sqrt()
    is_finite = norms.isfinite().all()
    clipped = norms[-1:] if joint else norms[:-1]
    scales = (max_norm / (clipped + 1e-6)).clamp(max=1.0).float().expand(len(optimizers)) if max_norm > 0 else None
    read_norms = _start_reading(norms)
    for i, (optimizer, memory) in enumerate(zip(optimizers, memories, strict=True)):
        if optimizer is None:
            continue
        with memory.resident("optimizer"):
            for following in memories[i + 1 : i + 2]:
                following.prefetch("optimizer")
            optimizer.launch_step(None if scales is None else scales[i], is_finite)
    found = read_norms()
    if not all(math.isfinite(norm) for norm in found):
        return None
    for optimizer in optimizers:
        if optimizer is not None:
            optimizer.count_step()
    return found


def _start_reading(x: Tensor) -> Callable[[], list[float]]:
    """Starts the copy of x to the host; the result waits for that copy alone, not for what is launched after it."""
    if not x.is_cuda:
        return x.tolist
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return host.tolist()

    return read


def set_learning_rate(optimizer: FlatAdamW, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def warmup_steps(config: OptimConfig, num_steps: int) -> int:
    """Optimizer steps of warm-up in a run of num_steps."""
    return config.warmup_steps if config.warmup_steps is not None else round(config.warmup_fraction * num_steps)


def learning_rate_factor(config: OptimConfig, step: int, num_steps: int) -> float:
    """Fraction of the peak learning rate at optimizer step `step` (0 is the first) of num_steps.

    inverse_sqrt as in the released code: max(step / warmup, 0.1), then sqrt(warmup / step). cosine (P p.11): linear
    warm-up, then down to min_lr_ratio at the end. constant: linear warm-up, then 1.
    """
    warmup = warmup_steps(config, num_steps)
    if config.schedule == "inverse_sqrt":
        if warmup == 0:
            return 1.0
        return max(step / warmup, 0.1) if step < warmup else math.sqrt(warmup / step)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, num_steps - 1 - warmup))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
