"""RMSNorm and the gated MLP as Megatron modules that call our kernels."""

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ppomax.kernels.rms_norm import rms_norm
from ppomax.kernels.swiglu import swiglu


class RMSNorm(torch.nn.Module):
    """Megatron's norm interface over `kernels/rms_norm`; unlike its own local norm it supports sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Under sequence parallelism each tp rank sees some of the tokens: finalize_model_grads sums these gradients
        # over tp.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)


class SwiGluMLP(MLP):
    """Megatron's MLP with the activation in `kernels/swiglu`."""

    def forward(self, hidden_states: Tensor, *unused: object, **also_unused: object) -> tuple[Tensor, None]:
        gate_up, _ = self.linear_fc1(hidden_states)
        output, _ = self.linear_fc2(swiglu(gate_up))
        return output, None
