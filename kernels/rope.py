"""Rotary position embedding of queries and keys (Su et al. 2021), in the half-rotation layout of Llama checkpoints."""

from torch import Tensor

from ppomax.kernels.dispatch import implementation


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates dimension pairs (i, i + D/2) of every head by the angles of its token's position.

    x [N, heads, D] float: queries or keys of packed tokens.
    cos, sin [N, D/2] or [N, D] float: of the angles; of D columns the first D/2 count, as Hugging Face repeats them.
    Returns [N, heads, D] in x's dtype, computed in fp32; differentiable in x.
    Raises ValueError when D is odd or cos and sin do not fit x.
    """
    num_tokens, _, head_size = x.shape
    if (
        head_size % 2
        or cos.shape != sin.shape
        or cos.shape not in ((num_tokens, head_size // 2), (num_tokens, head_size))
    ):
        raise ValueError(
            f"rope: x {tuple(x.shape)} with cos {tuple(cos.shape)} and sin {tuple(sin.shape)}; "
            "expected x [N, heads, D] with D even, cos and sin both [N, D/2] or both [N, D]"
        )
    return implementation("rope", x, cos, sin).rope(x, cos[:, : head_size // 2], sin[:, : head_size // 2])
