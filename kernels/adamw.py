"""One AdamW update (Loshchilov and Hutter 2019) of flat buffers; the optimizer is engine/optim.py."""

from torch import Tensor

from ppomax.kernels.dispatch import implementation


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
    """Updates params, exp_avg and exp_avg_sq in place, with bias correction and decoupled weight decay.

    params, exp_avg, exp_avg_sq: lists of float32 tensors of equal shapes: main weights, first and second moment.
    grads: the same shapes, any float dtype. lr: learning rate. weight_decay: per unit of lr. step: number of this
    update, from 1.
    Raises ValueError when the lists differ in length or step is below 1.
    """
    sizes = [len(params), len(grads), len(exp_avg), len(exp_avg_sq)]
    if len(set(sizes)) != 1:
        raise ValueError(f"adamw_step: params, grads, exp_avg, exp_avg_sq have {sizes} tensors; expected equally many")
    if step < 1:
        raise ValueError(f"adamw_step: step {step} must count from 1")
    implementation("adamw", *params, *grads).adamw_step(
        params, grads, exp_avg, exp_avg_sq, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=step
    )
