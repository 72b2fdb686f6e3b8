"""Llama-family models on Megatron-core's GPTModel: configuration, layer spec, and forward over a pack.

`PackedModel` is GPTModel with another forward: it returns hidden states (between chunks) or the hidden states of the
rows that the pack selects (last chunk). Heads work on those rows alone, so no logits of prompt tokens ever exist.

A pipeline rank holds one chunk of the model, or `vpp` of them, which take turns (interleaved pipeline parallelism).
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from ppomax.engine.config_models import ModelConfig
from ppomax.engine.data.batches import Pack
from ppomax.engine.models.attention import (
    NoCoreAttention,
    PackedSelfAttention,
    PackedSequences,
    choose_backend,
    rotary_factors,
)
from ppomax.engine.models.norm import RMSNorm, SwiGluMLP
from ppomax.engine.models.shape import ModelShape, check_split
from ppomax.engine.parallel.groups import RoleGroups

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ScalarHead(torch.nn.Module):
    """hidden [M, H] -> values [M] float32; its weight [1, H] is whole on every tensor-parallel rank."""

    def __init__(self, hidden_size: int, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, hidden_size, dtype=config.params_dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden.float() @ self.weight.float().T).squeeze(-1)


class PackedModel(GPTModel):
    """One chunk of a policy (vocabulary head) or of a reward / value model (scalar head): layers that follow each
    other on one pipeline rank, the first chunk of the first rank with the embedding, the last of the last with the
    head.
    """

    def __init__(
        self,
        config: TransformerConfig,
        shape: ModelShape,
        groups: RoleGroups,
        attention: str,
        *,
        chunk: int,
        extra_scalar_head: bool,
    ) -> None:
        # What Megatron calls it; it takes no number where there is no interleaving.
        vp_stage = chunk if groups.layout.vpp > 1 else None
        super().__init__(
            config,
            _layer_spec(config, groups, vp_stage),
            vocab_size=shape.padded_vocab_size(groups.layout.tp),
            max_sequence_length=shape.max_position_embeddings,
            pre_process=groups.is_first_stage and chunk == 0,
            post_process=groups.is_last_stage and chunk == groups.layout.vpp - 1,
            share_embeddings_and_output_weights=shape.tie_embeddings,
            position_embedding_type="none",  # rotary factors come with the pack
            pg_collection=groups.megatron,
            vp_stage=vp_stage,
        )
        _mark_tensor_parallel(self)
        self.shape = shape
        self.has_scalar_head = shape.scalar or extra_scalar_head  # of the whole model, whatever this chunk holds
        # Whether `forward` sums the gradients of its result over tp, by a reduce-scatter. Scalar heads give every rank
        # the whole gradient.
        self.sums_hidden_grad = config.sequence_parallel and not self.has_scalar_head
        self.backend = choose_backend(attention, config.params_dtype, shape.head_dim)
        if shape.scalar and self.post_process:
            # Frees the vocabulary head that GPTModel made.
            self.output_layer = ScalarHead(shape.hidden_size, config)
        if extra_scalar_head and self.post_process:
            self.scalar_head = ScalarHead(shape.hidden_size, config)

    def vocabulary_weight(self) -> Tensor:
        """Last chunk of a model with a vocabulary head: its weight [V/tp, H]."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def scalars(self, hidden: Tensor) -> Tensor:
        """Last chunk of a model with a scalar head: hidden [M, H] -> [M] float32."""
        return self._scalar_head()(hidden)

    def scalar_weight(self) -> Tensor:
        """Last chunk of a model with a scalar head: its weight [1, H], for losses that compute the head themselves."""
        return self._scalar_head().weight

    def _scalar_head(self) -> ScalarHead:
        return self.output_layer if self.shape.scalar else self.scalar_head

    def forward(self, pack: Pack) -> Tensor:
        """Hidden states [N(/tp), 1, H] of this chunk; of the last chunk those of the rows that the pack selects, [M,
        H].
        """
        cos, sin = rotary_factors(pack.positions, self.shape)
        packed = PackedSequences(pack.cu_seqlens, pack.max_seqlen, cos, sin, self.backend)
        hidden = None
        if self.pre_process:
            hidden = self.embedding(input_ids=pack.tokens[None], position_ids=pack.positions[None])
        hidden = self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=packed)
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            # Back comes every tp rank's part of the gradient, to be summed and split, or the whole one, to be split.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=self.sums_hidden_grad, group=self.pg_collection.tp
            )
        return hidden[:, 0].index_select(0, pack.rows)

    def tie_embeddings_and_output_weights_state_dict(
        self,
        sharded_state_dict: dict[str, Any],
        output_layer_weight_key: str,
        first_stage_word_emb_key: str,
        metadata: dict[str, Any],
    ) -> None:
        """As Megatron's, with this role's groups where it asks the global `parallel_state`."""
        if not self.post_process or self.pre_process:
            return
        sharded_state_dict[output_layer_weight_key] = make_tp_sharded_tensor_for_checkpoint(
            tensor=self.shared_embedding_or_output_weight(),
            key=first_stage_word_emb_key,
            replica_id=(1, 0, dist.get_rank(metadata["dp_cp_group"])),  # 1: the copy of the first stage's embedding
            allow_shape_mismatch=True,
            tp_group=self.pg_collection.tp,
            dp_cp_group=metadata["dp_cp_group"],
        )


def _mark_tensor_parallel(model: torch.nn.Module) -> None:
    """Sets the attributes by which Megatron tells split weights from copies in gradient norms.

    Its layers set them while drawing initial weights, which we skip.
    """
    dimensions = {ColumnParallelLinear: 0, RowParallelLinear: 1, VocabParallelEmbedding: 0}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(module) in dimensions and weight is not None:
            set_tensor_model_parallel_attributes(weight, True, dimensions[type(module)], 1)


def build_chunks(
    model: ModelConfig,
    shape: ModelShape,
    groups: RoleGroups,
    *,
    sequence_parallel: bool,
    extra_scalar_head: bool = False,
    on_cpu: bool = False,
) -> list[PackedModel]:
    """This rank's chunks, in order, with uninitialised weights (they are always loaded or drawn afterwards).

    extra_scalar_head: a scalar head beside the vocabulary head (reward models while the LM term of Eq. 2 trains them).
    """
    layout = groups.layout
    check_split(
        shape,
        tp=layout.tp,
        pp=layout.pp,
        vpp=layout.vpp,
        first_stage_layers=layout.first_stage_layers,
        last_stage_layers=layout.last_stage_layers,
    )
    config = transformer_config(model, shape, groups, sequence_parallel=sequence_parallel, on_cpu=on_cpu)
    return [
        PackedModel(config, shape, groups, model.attention, chunk=chunk, extra_scalar_head=extra_scalar_head)
        for chunk in range(groups.layout.vpp)
    ]


def transformer_config(
    model: ModelConfig, shape: ModelShape, groups: RoleGroups, *, sequence_parallel: bool, on_cpu: bool
) -> TransformerConfig:
    layout, dtype = groups.layout, DTYPES[model.dtype]
    first, last = layout.first_stage_layers, layout.last_stage_layers
    recompute: dict[str, Any] = {"recompute_granularity": None if model.recompute == "none" else model.recompute}
    if model.recompute == "full":
        recompute |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn_hidden_size,
        layernorm_epsilon=shape.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        num_layers_in_first_pipeline_stage=first,
        # Of two stages one number says it all; with both Megatron divides by the 0 stages between them.
        num_layers_in_last_pipeline_stage=None if layout.pp == 2 and first is not None else last,
        sequence_parallel=sequence_parallel and layout.tp > 1,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Weights are loaded or drawn by roles.py, the same for every layout.
        perform_initialization=False,
        use_cpu_initialization=on_cpu,
        # Losses arrive as sums weighted by the global token count: Megatron must neither average nor rescale them.
        calculate_per_token_loss=True,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        # With two stages and batched exchanges the interleaved schedule mixes up what goes forward and backward: the
        # losses would be wrong, silently.
        batch_p2p_comm=torch.cuda.is_available() and layout.vpp == 1,
        overlap_p2p_comm=layout.vpp > 1,
        deallocate_pipeline_outputs=False,
        **recompute,
    )


def _layer_spec(config: TransformerConfig, groups: RoleGroups, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Megatron's layers with our norm, attention and activation; no TransformerEngine, no apex."""
    qk_norm = RMSNorm if config.qk_layernorm else IdentityOp
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=PackedSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=NoCoreAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=SwiGluMLP,
                # Megatron hands these to its own MLP class only.
                params={"tp_group": groups.megatron.tp, "ffn_hidden_size": config.ffn_hidden_size},
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,
            # The names that Megatron's own specs give these weights in checkpoints.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )
    num_layers = get_num_layers_to_build(config, vp_stage, pp_rank=groups.pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)
