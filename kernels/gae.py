"""Generalised advantage estimation (Schulman et al. 2016) over the kept tokens of each row."""

import torch
from torch import Tensor
from torch.library import custom_op

from ppomax.kernels.dispatch import implementation
from ppomax.kernels.numerics import wide_dtype
from ppomax.kernels.packed_rows import count_rows


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns; a masked token is transparent: the recursion passes over it as if it were not there.

    rewards, values [B, T] float, in units of reward: values is V(s_t), before the token is known.
    response_mask [B, T] bool: True on the tokens that count; may have gaps.
    gamma, lam: discount and GAE's lambda, both in [0, 1].
    bootstrap [B] float: value after the last kept token (of a truncated response). Unset: 0 (the response has ended).
    cu_seqlens, max_seqlen: every [B, T] is a packed [K] instead (packed_rows.py); both or neither.
    Returns (advantages, returns), each [B, T] float32 (float64 for float64 rewards), constants, 0 outside the mask:
        delta_t = r_t + gamma V_next - V_t,  A_t = delta_t + gamma lam A_next,  returns_t = A_t + V_t.
    Raises ValueError on shapes that do not fit and on gamma or lam outside [0, 1].
    Source: paper Eq. 9 and Fig. 1.
    """
    check_gae("gae", values, response_mask, bootstrap, cu_seqlens, max_seqlen, gamma=gamma, lam=lam)
    if rewards.shape != values.shape:
        raise ValueError(
            f"gae: rewards {tuple(rewards.shape)} and values {tuple(values.shape)}; expected the same [B, T]"
        )
    return _gae(rewards, values, response_mask, gamma, lam, bootstrap, cu_seqlens, max_seqlen)


def check_gae(
    function: str,
    values: Tensor,
    response_mask: Tensor,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    *,
    gamma: float,
    lam: float,
) -> None:
    """Raises ValueError unless values and the mask are [B, T] (packed: [K]), bootstrap [B], gamma and lam in [0, 1]."""
    num_rows = count_rows(function, response_mask, cu_seqlens, max_seqlen)
    if values.shape != response_mask.shape:
        raise ValueError(
            f"{function}: values {tuple(values.shape)} and response_mask {tuple(response_mask.shape)}; "
            "expected the same [B, T]"
        )
    if bootstrap is not None and bootstrap.shape != (num_rows,):
        raise ValueError(f"{function}: bootstrap {tuple(bootstrap.shape)}; expected {(num_rows,)}, one per row")
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"{function}: gamma {gamma} and lam {lam} must be in [0, 1]")


@custom_op("ppomax::gae", mutates_args=())
def _gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor]:
    if not response_mask.numel():
        return _empty(rewards), _empty(rewards)
    compute = implementation("gae", rewards, values, response_mask, bootstrap, cu_seqlens)
    return compute.gae(
        rewards,
        values,
        response_mask,
        gamma=gamma,
        lam=lam,
        bootstrap=bootstrap,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
    )


@_gae.register_fake
def _(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor]:
    return _empty(rewards), _empty(rewards)


def _empty(rewards: Tensor) -> Tensor:
    return rewards.new_empty(rewards.shape, dtype=wide_dtype(rewards))
