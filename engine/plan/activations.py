"""What the forward pass of one micro-batch leaves for the backward pass on one rank, and what a pass needs besides.

Counted tensor by tensor from the engine's layers (docs/planning.md lists them), for fused attention as on CUDA.
"""

from ppomax.engine.models.shape import ModelShape
from ppomax.engine.parallel.layout import ParallelLayout
from ppomax.engine.plan.weights import layer_matrices, num_layers, vocabulary_matrix

LOGITS_BYTES = {"cpu": 2**28, "cuda": 2**31}
"""As kernels/linear.py: fp32 logits that exist at the same time."""
ROW_UNIT = 128


def layer_bytes(shape: ModelShape, tp: int, *, itemsize: int, sequence_parallel: bool, recompute: str) -> float:
    """Bytes a token that one layer keeps for its backward pass."""
    sp = tp if sequence_parallel else 1
    hidden = shape.hidden_size / sp
    if recompute == "full":
        return itemsize * hidden
    query, groups = shape.num_heads * shape.head_dim / tp, max(shape.num_query_groups, tp) * shape.head_dim / tp
    mixed = query + 2 * groups
    norms = itemsize * 4 * hidden + 8 / sp  # two inputs and outputs, two scales
    attention = itemsize * (query + groups + mixed + query)  # rotated query and key, what value is a part of, output
    if recompute == "none":
        attention += 4 * shape.num_heads / tp  # the sums of the softmax
    if shape.qk_norm:
        attention += itemsize * (query + groups) + 4 * (query + groups) / shape.head_dim
    feed_forward = itemsize * 3 * shape.ffn_hidden_size / tp
    return norms + attention + feed_forward


def chunks_in_flight(layout: ParallelLayout, pp_rank: int, num_microbatches: int) -> int:
    """Most forward passes of a chunk whose backward pass has not come yet, on one rank: Megatron's 1F1B, or its
    interleaved schedule.
    """
    if layout.vpp == 1:
        return min(layout.pp - pp_rank, num_microbatches)
    warm_up = 2 * (layout.pp - pp_rank - 1) + (layout.vpp - 1) * layout.pp
    return min(warm_up + 1, num_microbatches * layout.vpp)


def saved_bytes(
    shape: ModelShape,
    layout: ParallelLayout,
    pp_rank: int,
    *,
    tokens: int,
    num_microbatches: int,
    itemsize: int,
    sequence_parallel: bool,
    recompute: str,
) -> int:
    """Of all micro-batches in flight on one rank, each of `tokens` tokens."""
    sp = layout.tp if sequence_parallel else 1
    layers = num_layers(shape, layout, pp_rank)

    def of_layer(recompute: str) -> float:
        return layer_bytes(
            shape, layout.tp, itemsize=itemsize, sequence_parallel=sequence_parallel, recompute=recompute
        )

    per_token = layers * of_layer(recompute)
    if layout.pp > 1:
        per_token += itemsize * shape.hidden_size / sp  # what a chunk sends is kept for its backward pass
    saved = chunks_in_flight(layout, pp_rank, num_microbatches) * per_token * tokens
    if pp_rank == layout.pp - 1:
        # Of one micro-batch: what the last norm read, and the gradient of hidden states that the head gives at once.
        saved += tokens * ((itemsize * shape.hidden_size + 4) / sp + itemsize * shape.hidden_size)
    if recompute == "full":  # of the layer whose backward pass runs
        saved += tokens * of_layer("none")
    return int(saved)


def pass_bytes(
    shape: ModelShape, tp: int, *, tokens: int, itemsize: int, sequence_parallel: bool, backward: bool
) -> int:
    """Most that lives only while one layer runs: of the feed-forward part, its largest."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size / tp
    if not backward:
        return int(tokens * itemsize * (3 * hidden + 3 * ffn))
    weight = max(layer_matrices(shape, tp).values())
    return int(itemsize * (tokens * (3 * hidden + 3 * ffn) + weight))


def logits_bytes(shape: ModelShape, tp: int, *, rows: int, device: str, backward: bool) -> int:
    """fp32 logits of a chunk of rows, and on the way back fp32 gradients of hidden states where they are summed over
    tp. A scalar head needs nothing worth counting.
    """
    if shape.scalar:
        return 0
    columns = vocabulary_matrix(shape, tp) // shape.hidden_size
    fitting = max(1, LOGITS_BYTES[device] // (4 * columns))
    fitting = fitting // ROW_UNIT * ROW_UNIT if fitting >= ROW_UNIT else fitting
    logits = 4 * columns * min(rows, fitting)
    return logits + (4 * rows * shape.hidden_size if backward and tp > 1 else 0)
