"""The forward pass of generation: a chunk of this rank over the tokens of a step, by plain products and our kernels.

It reads the weights that are trained, in place, and leaves out what training needs: autograd, Megatron's modules with
their hooks, sequence parallelism.
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
from ppomax.kernels.decoding import DecodingOps, Matrix, decoding_ops
from ppomax.kernels.decoding_c import Layers, Model, Panels, can_decode


@dataclass(frozen=True)
class _Layer:
    """Weights of a layer on this rank; matrices as the operations keep them. Unset where the model has none."""

    input_norm: Tensor
    qkv: Matrix
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    projection: Matrix
    mlp_norm: Tensor
    gate_up: Matrix
    down: Matrix


class InferenceStage:
    """The stage of a role on this rank, in one chunk or several. Made once per call of the generator: weights must not
    change meanwhile.

    max_length: the longest request, tokens. page_size: of the cache, tokens.
    """

    def __init__(self, role: Role, max_length: int, page_size: int) -> None:
        first, last = role.chunks[0], role.chunks[-1]
        self.config, self.tp = first.config, role.groups.megatron.tp
        self.embedding = first.embedding.word_embeddings.weight if first.pre_process else None
        heads_per_group = self.config.num_attention_heads // self.config.num_query_groups
        weight = first.decoder.layers[0].input_layernorm.weight
        sizes = {"head_dim": self.config.kv_channels, "heads_per_group": heads_per_group, "page_size": page_size}
        self.ops = ops = decoding_ops(weight, **sizes)
        numbers = count()  # of the layers on this rank: their places in the cache
        self.chunks = [[(next(numbers), _layer(layer, ops)) for layer in chunk.decoder.layers] for chunk in role.chunks]
        self._whole_layers = [self._together(layers) for layers in self.chunks]
        self.final_norm = last.decoder.final_layernorm.weight if last.post_process else None
        self.head = ops.matrix(last.vocabulary_weight().detach()) if last.post_process else None
        positions = torch.arange(max_length, device=role.device)
        self.cos, self.sin = (x.contiguous() for x in rotary_factors(positions, role.shape))
        self.model = self._model(heads_per_group)

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
        layers, together = self.chunks[chunk], self._whole_layers[chunk]
        if together is not None and can_decode(hidden):
            heads = self.config.num_attention_heads // self.config.num_query_groups
            step.decode(hidden, together, layers[0][0], cos, sin, heads_per_group=heads, eps=eps)
            layers = []
        for number, layer in layers:
            normed = ops.rms_norm(hidden, layer.input_norm, eps)
            mixed = ops.product(normed, layer.qkv)
            if layer.qkv_bias is not None:
                mixed += layer.qkv_bias
            mixed = own_groups(mixed, self.config, self.tp)  # [N, groups, heads_per_group + 2, head_dim]
            if layer.q_norm is not None and layer.k_norm is not None:
                self._normalise(mixed[:, :, :-2], layer.q_norm)
                self._normalise(mixed[:, :, -2:-1], layer.k_norm)
            attended = step.attend(ops, number, mixed, cos, sin)
            hidden = self._add(hidden, attended, layer.projection)
            normed = ops.rms_norm(hidden, layer.mlp_norm, eps)
            hidden = self._add(hidden, ops.swiglu(ops.product(normed, layer.gate_up)), layer.down)
        if self.final_norm is None or chunk < len(self.chunks) - 1:
            return hidden
        if rows is not None:
            hidden = hidden.index_select(0, rows)
        return ops.rms_norm(hidden, self.final_norm, eps)

    def _together(self, layers: list[tuple[int, _Layer]]) -> Layers | None:
        """A chunk's layers for one call; None where they need their operations one by one."""
        if not self.ops.takes_whole_layers or self.tp.size() > 1 or not layers or layers[0][1].q_norm is not None:
            return None
        return Layers(
            [(x.input_norm, x.qkv, x.qkv_bias, x.projection, x.mlp_norm, x.gate_up, x.down) for _, x in layers]
        )

    def _model(self, heads_per_group: int) -> Model | None:
        """For several steps in one call; None unless the whole model is here and its layers go in one call."""
        layers, embedding, head = self._whole_layers[0], self.embedding, self.head
        if len(self.chunks) > 1 or layers is None or embedding is None or self.final_norm is None:
            return None
        assert isinstance(head, Panels)
        eps = self.config.layernorm_epsilon
        return Model(layers, embedding.detach(), self.final_norm, head, self.cos, self.sin, heads_per_group, eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, V/tp] float32 of hidden [R, H], last stage: bfloat16 logits would be off by up to 0.4 %."""
        assert self.head is not None
        if hidden.dtype == torch.float32:
            return self.ops.product(hidden, self.head)
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

    def _add(self, hidden: Tensor, x: Tensor, weight: Matrix) -> Tensor:
        """hidden + x weight, in place; the product is summed over tp."""
        if self.tp.size() == 1:
            return self.ops.add_product(hidden, x, weight)
        product = self.ops.product(x, weight)
        dist.all_reduce(product, group=self.tp)
        return hidden.add_(product)


def _layer(layer: Any, ops: DecodingOps) -> _Layer:
    attention, mlp = layer.self_attention, layer.mlp
    has_norms = attention.config.qk_layernorm
    return _Layer(
        input_norm=layer.input_layernorm.weight,
        qkv=ops.matrix(attention.linear_qkv.weight.detach()),
        qkv_bias=attention.linear_qkv.bias,
        q_norm=attention.q_layernorm.weight if has_norms else None,
        k_norm=attention.k_layernorm.weight if has_norms else None,
        projection=ops.matrix(attention.linear_proj.weight.detach()),
        mlp_norm=layer.pre_mlp_layernorm.weight,
        gate_up=ops.matrix(mlp.linear_fc1.weight.detach()),
        down=ops.matrix(mlp.linear_fc2.weight.detach()),
    )
