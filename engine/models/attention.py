"""Self-attention over packed sequences, for training and scoring (generation: rollout/inference.py).

Every tensor is packed: sequences end to end along one token axis, no padding. What the layers need to know of the
packing travels as `PackedSequences` in the place of Megatron's `packed_seq_params`, so that its blocks, recomputation
and pipelines carry it along unchanged.
"""

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ppomax.engine.errors import ConfigError
from ppomax.engine.models.shape import ModelShape
from ppomax.kernels import packed_attention as c_kernel
from ppomax.kernels.rope import rope


@dataclass(frozen=True)
class PackedSequences:
    """The packing of N tokens.

    cu_seqlens [n + 1] int32: where each sequence starts, and N. max_seqlen: the longest one.
    cos, sin [N, head_dim / 2] float32: rotary factors of each token's position.
    backend: attention kernel, one of "flash_attn", "varlen", "c_kernel", "sdpa".
    """

    cu_seqlens: Tensor
    max_seqlen: int
    cos: Tensor
    sin: Tensor
    backend: str


class PackedSelfAttention(SelfAttention):
    """Megatron's SelfAttention (its projections, its checkpoint layout) with RoPE and core attention over packed
    sequences.
    """

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, *unused: object, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        pack: PackedSequences = kwargs["packed_seq_params"]
        mixed, _ = self.linear_qkv(hidden_states)
        mixed = own_groups(mixed.squeeze(1), self.config, self.pg_collection.tp)
        attend = self._attend_in_one if pack.backend == "c_kernel" else self._attend
        output = attend(mixed, pack)
        projected, bias = self.linear_proj(output.reshape(output.shape[0], 1, -1))
        return projected, bias

    def _attend_in_one(self, mixed: Tensor, pack: PackedSequences) -> Tensor:
        """As `_attend`, by the C kernel; it keeps no scores, so there is nothing for selective recomputation to do."""
        if self.config.qk_layernorm:
            queries, keys, values = mixed.split([mixed.shape[2] - 2, 1, 1], dim=2)
            mixed = torch.cat([self.q_layernorm(queries), self.k_layernorm(keys), values], dim=2)
        return c_kernel.packed_attention(mixed, pack.cos, pack.sin, pack.cu_seqlens, pack.max_seqlen)

    def _attend(self, mixed: Tensor, pack: PackedSequences) -> Tensor:
        """[N, groups/tp, heads_per_group + 2, head_dim] -> [N, heads/tp, head_dim]."""
        query, key, value = mixed.split([mixed.shape[2] - 2, 1, 1], dim=2)
        query, key, value = query.reshape(mixed.shape[0], -1, mixed.shape[3]), key.squeeze(2), value.squeeze(2)
        if self.config.qk_layernorm:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        query, key = rope(query, pack.cos, pack.sin), rope(key, pack.cos, pack.sin)
        if self.checkpoint_core_attention and self.training:
            return checkpoint(lambda q, k, v: packed_attention(q, k, v, pack), False, query, key, value)
        return packed_attention(query, key, value, pack)


def own_groups(mixed: Tensor, config: TransformerConfig, tp: dist.ProcessGroup) -> Tensor:
    """This rank's heads [N, groups, heads_per_group + 2, head_dim], group by group: query heads, key, value.

    mixed: what Megatron's linear_qkv gives this rank, [N, num_groups * (heads_per_group + 2) * head_dim / tp]. Where
    there are fewer groups than ranks, several ranks have the same group and each has some of its query heads.
    """
    groups, head_dim = config.num_query_groups, config.kv_channels
    heads_per_group = config.num_attention_heads // groups
    ranks_per_group = max(1, tp.size() // groups)
    if ranks_per_group == 1:
        return mixed.view(mixed.shape[0], -1, heads_per_group + 2, head_dim)
    mixed = _gather_columns(mixed, tp).view(mixed.shape[0], groups, heads_per_group + 2, head_dim)
    group, part = divmod(tp.rank(), ranks_per_group)
    mixed = mixed[:, group : group + 1]
    queries = mixed[:, :, :heads_per_group].chunk(ranks_per_group, dim=2)[part]
    return torch.cat([queries, mixed[:, :, heads_per_group:]], dim=2)


class _GatherColumns(torch.autograd.Function):
    """All-gather along the last dimension; the gradients of all ranks are summed and each takes its slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(ctx.group.size(), dim=-1)[ctx.group.rank()].contiguous(), None


def _gather_columns(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return _GatherColumns.apply(x, group)


class NoCoreAttention(torch.nn.Module):
    """Stands where Megatron's spec wants a core-attention module; `packed_attention` does its work."""

    def __init__(self, **unused: object) -> None:
        super().__init__()


def packed_attention(query: Tensor, key: Tensor, value: Tensor, pack: PackedSequences) -> Tensor:
    """Causal attention inside each sequence: query [N, heads, d], key and value [N, groups, d] -> [N, heads, d]."""
    if pack.backend == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        cu, longest = pack.cu_seqlens, pack.max_seqlen
        return flash_attn_varlen_func(query, key, value, cu, cu, longest, longest, causal=True)
    if pack.backend == "varlen":
        return _varlen(query, key, value, pack)
    return _padded_sdpa(query, key, value, pack)


def _varlen(query: Tensor, key: Tensor, value: Tensor, pack: PackedSequences) -> Tensor:
    """torch.nn.attention.varlen; its keywords changed between torch releases, so they are probed."""
    attend, causal, has_gqa = _varlen_function()
    if has_gqa:
        causal = {**causal, "enable_gqa": True}
    elif query.shape[1] != key.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    cu, longest = pack.cu_seqlens, pack.max_seqlen
    return attend(query, key, value, cu, cu, longest, longest, **causal)


@lru_cache(maxsize=1)
def _varlen_function() -> tuple[Callable[..., Any], dict[str, Any], bool]:
    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"is_causal": True} if "is_causal" in names else {"window_size": (-1, 0)}
    return varlen_attn, causal, "enable_gqa" in names


def _padded_sdpa(query: Tensor, key: Tensor, value: Tensor, pack: PackedSequences) -> Tensor:
    """Pads every sequence on the right to the longest: under a causal mask no real token sees the padding behind it."""
    num_tokens, num_sequences = query.shape[0], pack.cu_seqlens.numel() - 1
    if num_sequences == 1:
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
    starts, lengths = pack.cu_seqlens[:-1].long(), pack.cu_seqlens.diff().long()
    column = torch.arange(pack.max_seqlen, device=query.device)
    index = torch.where(column < lengths[:, None], starts[:, None] + column, num_tokens)  # [n, longest]
    q, k, v = (pad(x, (0, 0, 0, 0, 0, 1))[index].transpose(1, 2) for x in (query, key, value))
    output = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    sequence = torch.repeat_interleave(
        torch.arange(num_sequences, device=query.device), lengths, output_size=num_tokens
    )
    return output[sequence, torch.arange(num_tokens, device=query.device) - starts[sequence]]


def choose_backend(requested: str, dtype: torch.dtype, head_dim: int) -> str:
    """The attention kernel for "auto": flash-attn when importable, torch's variable-length attention on CUDA, our C
    kernel on a CPU, else SDPA. Raises ConfigError for another that cannot run here.
    """
    possible = ["sdpa"]
    if not torch.cuda.is_available() and c_kernel.can_attend(torch.empty(0, dtype=dtype), head_dim):
        possible.append("c_kernel")
    if torch.cuda.is_available() and dtype in (torch.bfloat16, torch.float16):
        modules = {"varlen": "torch.nn.attention.varlen", "flash_attn": "flash_attn"}
        possible += [name for name, module in modules.items() if importlib.util.find_spec(module) is not None]
    if requested == "auto":
        return possible[-1]
    if requested not in possible:
        raise ConfigError(
            f"model.attention {requested!r} cannot run here: flash_attn and varlen need CUDA, model.dtype=bf16 and "
            "their package, c_kernel a CPU, a C compiler, model.dtype=fp32 and heads of a multiple of 16; "
            f"expected auto or one of {', '.join(possible)}"
        )
    return requested


def rotary_factors(positions: Tensor, shape: ModelShape) -> tuple[Tensor, Tensor]:
    """cos and sin [N, head_dim / 2] float32 of the positions [N], with the shape's frequency scaling."""
    angles = positions.float()[:, None] * inverse_frequencies(shape).to(positions.device, non_blocking=True)[None]
    return angles.cos(), angles.sin()


def inverse_frequencies(shape: ModelShape) -> Tensor:
    """Rotary frequencies [head_dim / 2] float32; "llama3" stretches the long wavelengths as Llama 3.1 does."""
    exponent = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    frequencies = 1.0 / (shape.rope_theta**exponent)
    scaling = shape.rope_scaling
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind != "llama3":
        return frequencies
    # Rotations within the original context: few of them are interpolated, many are kept, those between are blended.
    rotations = scaling.original_max_position_embeddings * frequencies / (2 * torch.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((rotations - scaling.low_freq_factor) / span).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor
