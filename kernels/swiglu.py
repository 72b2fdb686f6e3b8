"""The gated activation of Llama's feed-forward layers (Shazeer 2020)."""

from torch import Tensor

from ppomax.kernels.dispatch import implementation


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the two halves of the last dimension.

    gate_up [..., 2F] float: output of the joint projection, gate first.
    Returns [..., F] in the input's dtype, computed in fp32; differentiable.
    Raises ValueError when the last dimension is odd.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu: last dimension {gate_up.shape[-1]} is odd; expected gate and up, 2F columns")
    return implementation("swiglu", gate_up).swiglu(gate_up)
