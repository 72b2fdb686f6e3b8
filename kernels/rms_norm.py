"""Root-mean-square normalisation of hidden states (Zhang and Sennrich 2019)."""

from torch import Tensor

from ppomax.kernels.dispatch import implementation


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Scales each vector of the last dimension to root mean square 1, then by weight.

    x [..., H] float: hidden states. weight [H] float: gain. eps: added to the mean square.
    Returns x / sqrt(mean(x^2) + eps) * weight, computed in fp32 throughout and rounded once, in x's dtype;
    differentiable in both.
    Raises ValueError when weight does not have the size of x's last dimension.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: weight {tuple(weight.shape)} must be {tuple(x.shape[-1:])}, the last dimension of x"
        )
    return implementation("rms_norm", x, weight).rms_norm(x, weight, eps=eps)
