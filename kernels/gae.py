"""Generalised advantage estimation (Schulman et al. 2016) over the kept tokens of each row."""

from torch import Tensor

from ppomax.kernels.dispatch import implementation


def gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns; a masked token is transparent: the recursion passes over it as if it were not there.

    rewards, values [B, T] float, in units of reward: values is V(s_t), before the token is known.
    response_mask [B, T] bool: True on the tokens that count; may have gaps.
    gamma, lam: discount and GAE's lambda, both in [0, 1].
    bootstrap [B] float: value after the last kept token (of a truncated response). Unset: 0 (the response has ended).
    Returns (advantages, returns), each [B, T] float32 (float64 for float64 rewards), constants, 0 outside the mask:
        delta_t = r_t + gamma V_next - V_t,  A_t = delta_t + gamma lam A_next,  returns_t = A_t + V_t.
    Raises ValueError on shapes that do not fit and on gamma or lam outside [0, 1].
    Source: paper Eq. 9 and Fig. 1.
    """
    check_gae("gae", values, response_mask, bootstrap, gamma=gamma, lam=lam)
    if rewards.shape != values.shape:
        raise ValueError(
            f"gae: rewards {tuple(rewards.shape)} and values {tuple(values.shape)}; expected the same [B, T]"
        )
    compute = implementation("gae", rewards, values, response_mask, bootstrap)
    return compute.gae(rewards, values, response_mask, gamma=gamma, lam=lam, bootstrap=bootstrap)


def check_gae(
    function: str, values: Tensor, response_mask: Tensor, bootstrap: Tensor | None, *, gamma: float, lam: float
) -> None:
    """Raises ValueError unless values and response_mask are [B, T], bootstrap [B], gamma and lam in [0, 1]."""
    if values.dim() != 2 or values.shape != response_mask.shape:
        raise ValueError(
            f"{function}: values {tuple(values.shape)} and response_mask {tuple(response_mask.shape)}; "
            "expected the same [B, T]"
        )
    if bootstrap is not None and bootstrap.shape != values.shape[:1]:
        raise ValueError(
            f"{function}: bootstrap {tuple(bootstrap.shape)}; expected {tuple(values.shape[:1])}, one per row"
        )
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"{function}: gamma {gamma} and lam {lam} must be in [0, 1]")
