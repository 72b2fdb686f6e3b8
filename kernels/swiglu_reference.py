"""SwiGLU in torch: y = gate s up with s = sigmoid(gate)."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from ppomax.kernels.numerics import wide


def forward(gate_up: Tensor) -> Tensor:
    """y [N, F] in the dtype of gate_up [N, 2F]."""
    gate, up = wide(gate_up).chunk(2, dim=-1)
    return (silu(gate) * up).to(gate_up.dtype)


def backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """d loss / d gate_up [N, 2F] in its dtype, from grad = d loss / d y [N, F].

    d gate = grad up s (1 + gate (1 - s)), d up = grad gate s.
    """
    gate, up = wide(gate_up).chunk(2, dim=-1)
    full, sigmoid = wide(grad), gate.sigmoid()
    grad_gate = full * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat((grad_gate, full * gate * sigmoid), dim=-1).to(gate_up.dtype)
