"""Rotary position embedding of queries and keys (Su et al. 2021), in the half-rotation layout of Llama checkpoints."""

from typing import Any

from torch import Tensor
from torch.library import custom_op

from ppomax.kernels.dispatch import implementation


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates dimension pairs (i, i + D/2) of every head by the angles of its token's position.

    x [N, heads, D] float: queries or keys of packed tokens, copied only where the entries of a head are not neighbours.
    cos, sin [N, D/2] or [N, D] float: of the angles; of D columns the first D/2 count, as Hugging Face repeats them.
    Returns [N, heads, D] in x's dtype, computed in fp32 and rounded once; differentiable in x.
    Raises ValueError when D is odd or cos and sin do not fit x.
    """
    num_tokens, _, head_size = x.shape if x.dim() == 3 else (0, 0, 1)
    if (
        head_size % 2
        or cos.shape != sin.shape
        or cos.shape not in ((num_tokens, head_size // 2), (num_tokens, head_size))
    ):
        raise ValueError(
            f"rope: x {tuple(x.shape)} with cos {tuple(cos.shape)} and sin {tuple(sin.shape)}; "
            "expected x [N, heads, D] with D even, cos and sin both [N, D/2] or both [N, D]"
        )
    half = head_size // 2
    return _rotate(x, cos[:, :half].detach(), sin[:, :half].detach(), False)


@custom_op("ppomax::rope", mutates_args=())
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    x, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, cos, sin))
    return implementation("rope", x, cos, sin).rotate(x, cos, sin, inverse=inverse)


@_rotate.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _propagate(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    """A rotation's transpose is the rotation by the negative angle."""
    return _rotate(grad, *ctx.saved_tensors, not ctx.inverse), None, None, None


_rotate.register_autograd(_propagate, setup_context=_save)
