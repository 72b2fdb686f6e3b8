"""SwiGLU in torch: gate * sigmoid(gate) * up."""

from torch import Tensor
from torch.nn.functional import silu

from ppomax.kernels.numerics import wide


def swiglu(gate_up: Tensor) -> Tensor:
    """See ppomax.kernels.swiglu."""
    gate, up = wide(gate_up).chunk(2, dim=-1)
    return (silu(gate) * up).to(gate_up.dtype)
