"""One AdamW update (Loshchilov and Hutter 2019) of flat buffers, and the sum of squares that gradient clipping needs.

The optimizer is engine/optim.py. Nothing here waits for the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from ppomax.kernels.dispatch import implementation


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: Tensor | None = None,
    is_finite: Tensor | None = None,
    copies: Sequence[Tensor] = (),
    zero_grads: bool = False,
) -> None:
    """Updates params, exp_avg and exp_avg_sq in place, with bias correction and decoupled weight decay.

    params, exp_avg, exp_avg_sq: float32 (or float64) tensors of equal shapes: main weights, first and second moment.
    grads: the same shapes, any float dtype. All of them contiguous: few large ones are best, each costs a launch.
    lr: learning rate. weight_decay: per unit of lr. step: number of this update, from 1.
    grad_scale [] float32: multiplied to the gradients on the device: a clip coefficient, or 1 / loss scale.
    is_finite [] bool: where it is False nothing changes, whatever the gradients hold.
    copies: low-precision twins of params that the new params are written to, rounded; none, or one for each.
    zero_grads: sets the gradients to 0 once they are used.
    One pass over memory: 28 bytes a parameter with fp32 gradients, 2 more for a bf16 copy and 4 for zeroing.
    Raises ValueError when the lists do not fit each other, a tensor is not contiguous or step is below 1.
    """
    lists = {"params": params, "grads": grads, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "copies": copies}
    _check_lists(lists)
    if step < 1:
        raise ValueError(f"adamw_step: step {step} must count from 1")
    beta1, beta2 = betas
    flat = [[x.detach().view(-1) for x in tensors] for tensors in lists.values()]
    scalars = [None if x is None else x.detach().reshape(()) for x in (grad_scale, is_finite)]
    _step(*flat, *scalars, lr, beta1, beta2, eps, weight_decay, step, zero_grads)


def squared_norm(tensors: Sequence[Tensor], *, device: torch.device) -> Tensor:
    """Sum of the squares of all entries: [] float64 on `device`; 0 of no tensors, NaN or inf where an entry is.

    tensors: contiguous, any float dtype. Sums of at most some thousand squares are fp32 (fp64 of fp64 tensors), the
    sum of those fp64, always in the same order.
    Raises ValueError when a tensor is not contiguous.
    """
    if not all(x.is_contiguous() for x in tensors):
        raise ValueError("squared_norm: a tensor is not contiguous")
    flat = [x.detach().view(-1) for x in tensors if x.numel() > 0]
    return _squared_norm(flat) if flat else torch.zeros((), dtype=torch.float64, device=device)


def _check_lists(lists: dict[str, Sequence[Tensor]]) -> None:
    params = lists["params"]
    for name, tensors in lists.items():
        if len(tensors) != len(params) and not (name == "copies" and not tensors):
            raise ValueError(f"adamw_step: {len(params)} params but {len(tensors)} {name}; expected equally many")
        for x, p in zip(tensors, params, strict=False):
            if x.shape != p.shape or not x.is_contiguous():
                raise ValueError(
                    f"adamw_step: a tensor of {name} {tuple(x.shape)} with strides {x.stride()} "
                    f"must be contiguous and have the shape of its parameter, {tuple(p.shape)}"
                )


@custom_op("ppomax::adamw_step", mutates_args=("params", "grads", "exp_avg", "exp_avg_sq", "copies"))
def _step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    copies: list[Tensor],
    grad_scale: Tensor | None,
    is_finite: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    zero_grads: bool,
) -> None:
    implementation("adamw", *params, *grads, grad_scale, is_finite).adamw_step(
        params,
        grads,
        exp_avg,
        exp_avg_sq,
        copies,
        lr=lr,
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=weight_decay,
        step=step,
        grad_scale=grad_scale,
        is_finite=is_finite,
        zero_grads=zero_grads,
    )


@custom_op("ppomax::squared_norm", mutates_args=())
def _squared_norm(tensors: list[Tensor]) -> Tensor:
    return implementation("adamw", *tensors).squared_norm(tensors)


@_squared_norm.register_fake
def _(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty((), dtype=torch.float64)
