"""The optimizer: our AdamW inside Megatron's distributed optimizer, the paper's schedules, and one clip over several
models.
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import megatron.core.optimizer.distrib_optimizer as megatron_distributed
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from ppomax.engine.config import OptimConfig
from ppomax.engine.parallel.groups import RoleGroups
from ppomax.kernels.adamw import adamw_step


class AdamW(torch.optim.Optimizer):
    """AdamW in the form that Megatron expects of apex's FusedAdam: one step count per group, no step in the state.

    Megatron's fallback, torch's AdamW, keeps a step tensor per parameter, which its checkpoint loading ties together:
    a resumed run then counts too many steps (docs/design.md, "Optimizer").
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
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            group["step"] = group.get("step", 0) + 1
            if not params:
                continue
            for p in params:
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            adamw_step(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                # Megatron's mark of norms and biases, which its own scheduler, not used here, would multiply in.
                weight_decay=group["weight_decay"] * group.get("wd_mult", 1.0),
                step=group["step"],
            )


def make_optimizer(
    model: DistributedDataParallel, groups: RoleGroups, config: OptimConfig, *, eps: float, bf16: bool
) -> DistributedOptimizer:
    """Megatron's distributed optimizer (state split over replicas, fp32 main weights) around our AdamW."""
    # These are the names that Megatron looks up when it builds its optimizer; there is no argument for the class.
    megatron_optimizer.Adam = megatron_distributed.Adam = AdamW
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
    optimizer = get_megatron_optimizer(settings, [model], use_gloo_process_groups=False, pg_collection=groups.megatron)
    # A ChainedOptimizer of one: the dense parameters' distributed optimizer.
    optimizer = optimizer.chained_optimizers[0] if hasattr(optimizer, "chained_optimizers") else optimizer
    optimizer.get_parameter_state_dp_zero = partial(_whole_buffer_states, optimizer)
    return optimizer


def _whole_buffer_states(optimizer: DistributedOptimizer, **options: Any) -> dict[Any, Any] | None:
    """Megatron's `get_parameter_state_dp_zero`, with the padding between buckets that its caller counts.

    megatron-core 0.16.1 leaves it out. Tied embeddings have a bucket of their own under pp > 1: where its size is no
    multiple of 128 and dp, a checkpoint would give every later parameter the state of its neighbours.
    """
    state = DistributedOptimizer.get_parameter_state_dp_zero(optimizer, **options)
    for number, buffer in enumerate(optimizer.buffers if state is not None else ()):
        for tensors in state[number].values():
            for name in ("param", "exp_avg", "exp_avg_sq"):
                compact, tensors[name] = tensors[name], torch.zeros(buffer.numel)
                parts = compact.split([bucket.numel_unpadded for bucket in buffer.buckets])
                for bucket, part in zip(buffer.buckets, parts, strict=True):
                    tensors[name][bucket.offset : bucket.offset + part.numel()] = part
    return state


@torch.no_grad()
def clip_and_step(optimizers: Sequence[DistributedOptimizer], *, max_norm: float, joint: bool) -> list[float] | None:
    """One step of every optimizer after clipping by the joint norm of all gradients, or each by its own.

    max_norm: largest L2 norm; 0 does not clip. Returns the norms before clipping (one, or one per optimizer), or None
    where one is not finite: then no weight has changed. One host sync per optimizer. Collective over all ranks of the
    roles.
    """
    for optimizer in optimizers:
        optimizer.prepare_grads()
    norms = [float(optimizer.get_grad_norm()) for optimizer in optimizers]
    if not all(math.isfinite(norm) for norm in norms):
        return None
    if joint:
        norms = [math.sqrt(sum(norm * norm for norm in norms))]
    for i, optimizer in enumerate(optimizers):
        if max_norm > 0:
            clip_grad_by_total_norm_fp32(optimizer.get_parameters(), max_norm, norms[0 if joint else i])
        optimizer.step_with_ready_grads()
    return norms


def set_learning_rate(optimizer: DistributedOptimizer, lr: float) -> None:
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
