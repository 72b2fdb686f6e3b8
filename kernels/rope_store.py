"""Rotary embedding of queries and keys on the keys' and values' way into the pages of a cache. No gradients.

What `rope` and `store_pages` do in three passes and a copy; decoding has little more to do than start its kernels.
"""

from torch import Tensor
from torch.library import custom_op

from ppomax.kernels.dispatch import implementation


def rope_store(
    mixed: Tensor, cos: Tensor, sin: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor
) -> Tensor:
    """Rotates query heads and keys by the angles of their token's position; keys and values go to their pages.

    mixed [N, groups, heads_per_group + 2, d] float: of each group its query heads, its key and its value.
    cos, sin [N, d / 2] float: of the angles, in the half-rotation layout of `rope`.
    key_pages, value_pages [num_pages, page_size, groups, d] in the dtype of mixed, of equal strides.
    slots [N] int: page * page_size + offset of each token, no two alike; of a token with slot < 0 nothing is stored.
    Returns the queries [N, groups * heads_per_group, d] in the dtype of mixed, computed in fp32 and rounded once.
    Never waits for the device. Raises ValueError on shapes and types that do not fit.
    """
    num_tokens, groups, width, d = mixed.shape if mixed.dim() == 4 else (0, 0, 0, 1)
    fits = cos.shape == sin.shape == (num_tokens, d // 2) and slots.shape == (num_tokens,)
    pages = (key_pages, value_pages)
    if width < 3 or d % 2 or not fits or any(x.dim() != 4 or x.shape[2:] != (groups, d) for x in pages):
        raise ValueError(
            f"rope_store: mixed {tuple(mixed.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}, pages "
            f"{[tuple(x.shape) for x in pages]}, slots {tuple(slots.shape)}; expected [N, groups, heads_per_group + 2, "
            "d] with d even, [N, d / 2] twice, [num_pages, page_size, groups, d] twice and [N]"
        )
    if any(x.dtype != mixed.dtype or x.stride() != key_pages.stride() or x.stride(3) != 1 for x in pages):
        raise ValueError(
            f"rope_store: pages of {[(x.dtype, x.stride()) for x in pages]}; expected {mixed.dtype}, as mixed, with "
            "equal strides that end with 1"
        )
    tensors = (mixed, cos, sin)
    return _rope_store(*(x.detach().contiguous() for x in tensors), key_pages, value_pages, slots.contiguous())


@custom_op("ppomax::rope_store", mutates_args=("key_pages", "value_pages"))
def _rope_store(
    mixed: Tensor, cos: Tensor, sin: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor
) -> Tensor:
    version = implementation("rope_store", mixed, key_pages)
    return version.rope_store(mixed, cos, sin, key_pages, value_pages, slots)


@_rope_store.register_fake
def _(mixed: Tensor, *others: Tensor) -> Tensor:
    num_tokens, groups, width, d = mixed.shape
    return mixed.new_empty(num_tokens, groups * (width - 2), d)
