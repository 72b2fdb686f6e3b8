"""The forward pass of generation: a chunk of this rank over the tokens of a step, by plain products and our kernels.

It reads the weights that are trained, in place, and leaves out what training needs: autograd, Megatron's modules with
their hooks, sequence parallelism. On a CPU matrices are kept a second time, transposed, while generation lasts:
products with few rows, of which decoding consists, are up to twice as fast.
"""

from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import embedding

from ppomax.engine.models.attention import own_groups, rotary_factors
from ppomax.engine.models.roles import Role
from ppomax.engine.rollout.paged_cache import PagedStep
from ppomax.kernels.decoding import decoding_ops

ROW_GAP = 32
"""Numbers between the rows of a transposed matrix on a CPU: rows at a distance of a power of two share cache lines."""


@dataclass(frozen=True)
class _Layer:
    """Weights of a layer; matrices as [inputs, outputs] of this rank. Unset where the model has none."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    projection: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


class InferenceStage:
    """The stage of a role on this rank, in one chunk or several. Made once per call of the generator: weights must not
    change meanwhile.

    max_length: the longest request, tokens.
    """

    def __init__(self, role: Role, max_length: int) -> None:
        first, last = role.chunks[0], role.chunks[-1]
        self.config, self.tp = first.config, role.groups.megatron.tp
        self.embedding = first.embedding.word_embeddings.weight if first.pre_process else None
        numbers = count()  # of the layers on this rank: their places in the cache
        self.chunks = [[(next(numbers), _layer(layer)) for layer in chunk.decoder.layers] for chunk in role.chunks]
        heads_per_group = self.config.num_attention_heads // self.config.num_query_groups
        weight = self.chunks[0][0][1].input_norm
        self.ops = decoding_ops(weight, head_dim=self.config.kv_channels, heads_per_group=heads_per_group)
        self.final_norm = last.decoder.final_layernorm.weight if last.post_process else None
        self.head = _matrix(last.vocabulary_weight()) if last.post_process else None
        positions = torch.arange(max_length, device=role.device)
        self.cos, self.sin = (x.contiguous() for x in rotary_factors(positions, role.shape))

    def run_chunk(
        self,
        chunk: int,
        tokens: Tensor,
        positions: Tensor,
        rows: Tensor | None,
        received: Tensor | None,
        step: PagedStep,
    ) -> Tensor:
        """Hidden states [N, H] of a chunk; of the last chunk of the last stage, normalised, those of `rows` [M] (None:
        all), [M, H].

        tokens, positions [N] int64. received [N, H]: from the chunk before, overwritten; None for the first of all.
        """
        hidden = self._embed(tokens) if received is None else received
        cos, sin = self.cos[positions], self.sin[positions]
        ops, eps = self.ops, self.config.layernorm_epsilon
        for number, layer in self.chunks[chunk]:
            normed = ops.rms_norm(hidden, layer.input_norm, eps)
            mixed = _product(normed, layer.qkv, layer.qkv_bias)
            mixed = own_groups(mixed, self.config, self.tp)  # [N, groups, heads_per_group + 2, head_dim]
            if layer.q_norm is not None and layer.k_norm is not None:
                self._normalise(mixed[:, :, :-2], layer.q_norm)
                self._normalise(mixed[:, :, -2:-1], layer.k_norm)
            attended = step.attend(ops, number, mixed, cos, sin)
            hidden = self._add(hidden, attended, layer.projection)
            normed = ops.rms_norm(hidden, layer.mlp_norm, eps)
            hidden = self._add(hidden, ops.swiglu(normed @ layer.gate_up), layer.down)
        if self.final_norm is None or chunk < len(self.chunks) - 1:
            return hidden
        if rows is not None:
            hidden = hidden.index_select(0, rows)
        return ops.rms_norm(hidden, self.final_norm, eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, V/tp] float32 of hidden [R, H], last stage: bfloat16 logits would be off by up to 0.4 %."""
        assert self.head is not None
        if hidden.dtype == torch.float32:
            return hidden @ self.head
        if hidden.is_cuda:
            return torch.mm(hidden, self.head, out_dtype=torch.float32)
        return hidden.float() @ self.head.float()

    def _embed(self, tokens: Tensor) -> Tensor:
        weight = self.embedding
        assert weight is not None
        if self.tp.size() == 1:
            return embedding(tokens, weight)
        local = tokens - self.tp.rank() * weight.shape[0]
        is_own = (local >= 0) & (local < weight.shape[0])
        hidden = embedding(torch.where(is_own, local, 0), weight) * is_own[:, None]
        dist.all_reduce(hidden, group=self.tp)
        return hidden

    def _normalise(self, heads: Tensor, weight: Tensor) -> None:
        """RMSNorm of each head, in place."""
        flat = heads.reshape(-1, heads.shape[-1])
        heads.copy_(self.ops.rms_norm(flat, weight, self.config.layernorm_epsilon).view(heads.shape))

    def _add(self, hidden: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """hidden + x weight, the product summed over tp and, in 16 bits, rounded before the sum as in training."""
        if self.tp.size() == 1 and hidden.dtype == torch.float32:
            return hidden.addmm_(x, weight)
        product = x @ weight
        if self.tp.size() > 1:
            dist.all_reduce(product, group=self.tp)
        return hidden.add_(product)


def _layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attention, layer.mlp
    has_norms = attention.config.qk_layernorm
    return _Layer(
        input_norm=layer.input_layernorm.weight,
        qkv=_matrix(attention.linear_qkv.weight),
        qkv_bias=attention.linear_qkv.bias,
        q_norm=attention.q_layernorm.weight if has_norms else None,
        k_norm=attention.k_layernorm.weight if has_norms else None,
        projection=_matrix(attention.linear_proj.weight),
        mlp_norm=layer.pre_mlp_layernorm.weight,
        gate_up=_matrix(mlp.linear_fc1.weight),
        down=_matrix(mlp.linear_fc2.weight),
    )


def _matrix(weight: Tensor) -> Tensor:
    """A weight [outputs, inputs] as [inputs, outputs]."""
    transposed = weight.detach().T
    if weight.is_cuda:
        return transposed
    if weight.dtype != torch.float32:
        return transposed.contiguous()  # products in 16 bits may read what lies between rows
    inputs, outputs = transposed.shape
    return transposed.new_empty(inputs, outputs + ROW_GAP)[:, :outputs].copy_(transposed)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight if bias is None else torch.addmm(bias, x, weight)
