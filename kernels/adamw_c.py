"""AdamW by the C kernel on a CPU: one pass over memory. See ppomax.kernels.adamw."""

import math

from torch import Tensor

from ppomax.kernels.adamw_reference import squared_norm as squared_norm
from ppomax.kernels.native import call


def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    copies: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: Tensor | None,
    is_finite: Tensor | None,
    zero_grads: bool,
) -> None:
    """See ppomax.kernels.adamw; flat tensors, all float32 but copies."""
    if is_finite is not None and not is_finite:
        return
    beta1, beta2 = betas
    scale = 1.0 if grad_scale is None else float(grad_scale)
    # The kernel takes float32; what is subtracted from 1 is subtracted before.
    factors = (scale, 1 - beta1, beta2, 1 - beta2, math.sqrt(1 - beta2**step), eps)
    rates = (1 - lr * weight_decay, -lr / (1 - beta1**step))
    for i, (param, grad, m, v) in enumerate(zip(params, grads, exp_avg, exp_avg_sq, strict=True)):
        call("adamw", param, grad, m, v, param.numel(), *factors, *rates)
        if copies:
            copies[i].copy_(param)
        if zero_grads:
            grad.zero_()
