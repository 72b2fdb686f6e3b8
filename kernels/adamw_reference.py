"""AdamW in torch, a few launches for all tensors together.

m = mean of g, v = mean of g^2, both bias-corrected; p <- p - lr (m / (sqrt(v) + eps) + weight_decay p).
"""

import math

import torch
from torch import Tensor


@torch.no_grad()
def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """See ppomax.kernels.adamw."""
    if not params:
        return
    beta1, beta2 = betas
    grads = [grad.to(average.dtype) for grad, average in zip(grads, exp_avg, strict=True)]
    torch._foreach_lerp_(exp_avg, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sq, beta2)
    torch._foreach_addcmul_(exp_avg_sq, grads, grads, 1 - beta2)
    denominators = torch._foreach_sqrt(exp_avg_sq)
    torch._foreach_div_(denominators, math.sqrt(1 - beta2**step))
    torch._foreach_add_(denominators, eps)
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_addcdiv_(params, exp_avg, denominators, -lr / (1 - beta1**step))
