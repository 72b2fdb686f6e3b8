"""Builders of calls of kernels/, of any size: what the compile gate, the benchmark and the GPU tests are made of."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ppomax.kernels.adamw import adamw_step, squared_norm
from ppomax.kernels.experience import experience
from ppomax.kernels.gae import gae
from ppomax.kernels.linear_full_kl import linear_full_kl
from ppomax.kernels.linear_logprobs import linear_logprobs
from ppomax.kernels.linear_policy_loss import linear_cross_entropy, linear_policy_loss
from ppomax.kernels.logprobs import token_logprobs
from ppomax.kernels.paged_attention import paged_attention, store_pages
from ppomax.kernels.policy_loss import policy_loss
from ppomax.kernels.rms_norm import rms_norm
from ppomax.kernels.rope import rope
from ppomax.kernels.rope_store import rope_store
from ppomax.kernels.sampling import sample
from ppomax.kernels.swiglu import swiglu
from ppomax.kernels.token_rewards import token_rewards
from ppomax.kernels.value_head_loss import value_head_loss
from ppomax.kernels.value_loss import value_loss
from ppomax.kernels.whiten import Moments, masked_moments, whiten
from ppomax.tools.kernel_inputs import BF16, FP32, Case, Maker, name_of


def rms_norm_case(N: int, H: int, dtype: torch.dtype = BF16) -> Case:
    def inputs(make: Maker) -> Sequence[Any]:
        return make.normal(N, H, dtype=dtype), 1 + make.normal(H, dtype=dtype, std=0.1)

    return Case("rms_norm", f"{N} x {H} {name_of(dtype)}", rms_norm, inputs, {"eps": 1e-6}, 2)


def swiglu_case(N: int, F: int, dtype: torch.dtype = BF16) -> Case:
    return Case(
        "swiglu", f"{N} x {F} {name_of(dtype)}", swiglu, lambda make: (make.normal(N, 2 * F, dtype=dtype),), {}, 1
    )


def rope_case(N: int, heads: int, D: int = 128, dtype: torch.dtype = BF16) -> Case:
    """Queries and keys together would be 32 + 8 heads in a 7B model with grouped keys."""

    def inputs(make: Maker) -> Sequence[Any]:
        position = torch.arange(N, device=make.device)[:, None] % 2048
        angle = position * 10000.0 ** (-torch.arange(D // 2, device=make.device)[None] / (D // 2))
        return make.normal(N, heads, D, dtype=dtype), angle.cos(), angle.sin()

    return Case("rope", f"{N} x {heads} x {D} {name_of(dtype)}", rope, inputs, {}, 1)


def logprobs_case(N: int, V: int, dtype: torch.dtype = BF16, temperature: float = 1.0) -> Case:
    def inputs(make: Maker) -> Sequence[Any]:
        return make.normal(N, V, dtype=dtype, std=2.0), make.labels(N, V)

    name = f"{N} x {V} {name_of(dtype)}"
    return Case("logprobs", name, token_logprobs, inputs, {"temperature": temperature}, 1)


def linear_logprobs_case(N: int, H: int, V: int, dtype: torch.dtype = BF16) -> Case:
    def inputs(make: Maker) -> Sequence[Any]:
        return *head_of(make, N, H, V, dtype), make.labels(N, V)

    return Case("linear_logprobs", f"{N} x {H} x {V} {name_of(dtype)}", linear_logprobs, inputs, {}, 2)


def linear_full_kl_case(N: int, H: int, V: int, dtype: torch.dtype = BF16) -> Case:
    def inputs(make: Maker) -> Sequence[Any]:
        return *head_of(make, N, H, V, dtype), *head_of(make, N, H, V, dtype)

    return Case("linear_full_kl", f"{N} x {H} x {V} {name_of(dtype)}", linear_full_kl, inputs)


def linear_policy_loss_case(N: int, H: int, V: int, dtype: torch.dtype = BF16, *, with_all: bool = False) -> Case:
    """with_all: advantages whitened by given moments, importance weights, and a language-model loss."""

    def inputs(make: Maker) -> Sequence[Any]:
        head, labels = head_of(make, N, H, V, dtype), make.labels(N, V)
        extra = [make.uniform(N), make.token_weights(N), *moments_of(make, N)] if with_all else []
        return *head, labels, make.normal(N, std=0.3) - 10, make.normal(N), make.token_weights(N), *extra

    def called(*given: Tensor, **settings: Any) -> Any:
        if with_all:
            settings |= {"importance_weights": given[6], "lm_weights": given[7], "moments": Moments(*given[8:])}
        return linear_policy_loss(*given[:6], **settings)

    settings = {"clip": 0.2, "dual_clip": 3.0, "entropy_coef": 0.01}
    name = f"{N} x {H} x {V} {name_of(dtype)}" + (" all options" if with_all else "")
    return Case("linear_policy_loss", name, called, inputs, settings, 2)


def linear_cross_entropy_case(N: int, H: int, V: int, dtype: torch.dtype = BF16) -> Case:
    def inputs(make: Maker) -> Sequence[Any]:
        return *head_of(make, N, H, V, dtype), make.labels(N, V), make.token_weights(N)

    name = f"cross-entropy {N} x {H} x {V} {name_of(dtype)}"
    return Case("linear_policy_loss", name, linear_cross_entropy, inputs, {}, 2)


def head_of(make: Maker, N: int, H: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Hidden states and a head whose logits have standard deviation 2."""
    return make.normal(N, H, dtype=dtype), make.normal(V, H, dtype=dtype, std=2 * H**-0.5)


def moments_of(make: Maker, count: int) -> list[Tensor]:
    """Count, mean and sum of squared differences, of a standard deviation near 1.4."""
    return [make.zeros(1)[0].double() + x for x in (count, 0.1, 2.0 * count)]


def token_rewards_case(B: int, T: int, kl_estimator: str = "k1", **optional: bool) -> Case:
    def inputs(make: Maker) -> Sequence[Any]:
        return make.normal(B), make.normal(B, T, std=0.3), make.normal(B, T, std=0.3), make.mask(B, T)

    name = f"{B} x {T} {kl_estimator}" + "".join(f" {key}" for key in optional)
    settings = {"kl_coef": 0.1, "kl_estimator": kl_estimator}
    return Case("token_rewards", name, *_with_optional(token_rewards, inputs, B, T, optional), settings)


def gae_case(B: int, T: int, *, with_gaps: bool = False, **optional: bool) -> Case:
    def inputs(make: Maker) -> Sequence[Any]:
        return make.normal(B, T), make.normal(B, T), make.mask(B, T, with_gaps=with_gaps)

    name = f"{B} x {T}{' with gaps' if with_gaps else ''}" + "".join(f" {key}" for key in optional)
    return Case("gae", name, *_with_optional(gae, inputs, B, T, optional), {"gamma": 1.0, "lam": 0.95})


def experience_case(B: int, T: int, kl_estimator: str = "k1", *, with_gaps: bool = False, **optional: bool) -> Case:
    def inputs(make: Maker) -> Sequence[Any]:
        logprobs = [make.normal(B, T, std=0.3) for _ in range(2)]
        return make.normal(B), *logprobs, make.normal(B, T), make.mask(B, T, with_gaps=with_gaps)

    gaps = " with gaps" if with_gaps else ""
    name = f"{B} x {T} {kl_estimator}{gaps}" + "".join(f" {key}" for key in optional)
    settings = {"kl_coef": 0.1, "kl_estimator": kl_estimator, "gamma": 1.0, "lam": 0.95}
    return Case("experience", name, *_with_optional(experience, inputs, B, T, optional), settings)


def _with_optional(
    function: Callable[..., Any], inputs: Callable[[Maker], Sequence[Any]], B: int, T: int, optional: dict[str, bool]
) -> tuple[Callable[..., Any], Callable[[Maker], Sequence[Any]]]:
    """The function and its inputs, with optional tensors behind them: bootstrap [B], or step_rewards and kl [B, T]."""
    names = [name for name, is_given in optional.items() if is_given]

    def with_optional(make: Maker) -> Sequence[Any]:
        return *inputs(make), *(make.normal(B) if name == "bootstrap" else make.normal(B, T) for name in names)

    def called(*given: Tensor, **settings: Any) -> Any:
        num_required = len(given) - len(names)
        extra = dict(zip(names, given[num_required:], strict=True))
        return function(*given[:num_required], **extra, **settings)

    return called, with_optional


def whiten_case(B: int, T: int, dtype: torch.dtype = FP32) -> Case:
    def inputs(make: Maker) -> Sequence[Any]:
        return make.normal(B, T, dtype=dtype), make.mask(B, T)

    return Case("whiten", f"{B} x {T} {name_of(dtype)}", whiten, inputs)


def moments_case(B: int, T: int, dtype: torch.dtype = FP32) -> Case:
    def inputs(make: Maker) -> Sequence[Any]:
        return make.normal(B, T, dtype=dtype), make.mask(B, T)

    return Case("whiten", f"moments {B} x {T} {name_of(dtype)}", masked_moments, inputs)


def policy_loss_case(
    N: int, name: str = "", *, whitened: bool = False, weighted: bool = False, **settings: Any
) -> Case:
    """whitened: advantages by given moments. weighted: with importance weights."""

    def inputs(make: Maker) -> Sequence[Any]:
        old = make.normal(N) - 3
        extra = [make.uniform(N)] if weighted else []
        extra += moments_of(make, N) if whitened else []
        return old + make.normal(N, std=0.1), old, make.normal(N), make.token_weights(N), *extra

    def called(logprobs: Tensor, old: Tensor, advantages: Tensor, weights: Tensor, *extra: Tensor, **given: Any) -> Any:
        given |= {"importance_weights": extra[0]} if weighted else {}
        given |= {"moments": Moments(*extra[-3:])} if whitened else {}
        return policy_loss(logprobs, old, advantages, weights, **given)

    label = f"{N} {name}".rstrip()
    return Case("policy_loss", label, called, inputs, {"clip": 0.2, "dual_clip": 3.0, **settings}, 1)


def packed_experience_case(B: int, T: int, kl_estimator: str = "k1") -> Case:
    """Rows of T down to T / 2 tokens, one after the other, with gaps in their masks."""
    ends = list(accumulate(T - row % 5 * (T // 8) for row in range(B)))

    def inputs(make: Maker) -> Sequence[Any]:
        num = ends[-1]
        logprobs = [make.normal(num, std=0.3) for _ in range(2)]
        mask = make.mask(1, num, with_gaps=True)[0]
        return make.normal(B), *logprobs, make.normal(num), mask, torch.tensor([0, *ends], device=make.device)

    def called(*given: Tensor, **settings: Any) -> Any:
        return experience(*given[:5], cu_seqlens=given[5], **settings)

    settings = {"kl_coef": 0.1, "kl_estimator": kl_estimator, "gamma": 1.0, "lam": 0.95, "max_seqlen": T}
    return Case("experience", f"{B} packed rows of {T} {kl_estimator}", called, inputs, settings)


def packed_gae_case(B: int, T: int) -> Case:
    """Rows as those of packed_experience_case."""
    whole = packed_experience_case(B, T)

    def inputs(make: Maker) -> Sequence[Any]:
        _, rewards, _, values, mask, cu_seqlens = whole.inputs(make)
        return rewards, values, mask, cu_seqlens

    def called(rewards: Tensor, values: Tensor, mask: Tensor, cu_seqlens: Tensor, **settings: Any) -> Any:
        return gae(rewards, values, mask, cu_seqlens=cu_seqlens, **settings)

    return Case("gae", f"{B} packed rows of {T}", called, inputs, {"gamma": 1.0, "lam": 0.95, "max_seqlen": T})


def packed_rewards_case(B: int, T: int) -> Case:
    """Rows as those of packed_experience_case."""
    whole = packed_experience_case(B, T)

    def inputs(make: Maker) -> Sequence[Any]:
        scores, logprobs, ref_logprobs, _, mask, cu_seqlens = whole.inputs(make)
        return scores, logprobs, ref_logprobs, mask, cu_seqlens

    def called(*given: Tensor, **settings: Any) -> Any:
        return token_rewards(*given[:4], cu_seqlens=given[4], **settings)

    return Case("token_rewards", f"{B} packed rows of {T}", called, inputs, {"kl_coef": 0.1, "max_seqlen": T})


def value_loss_case(N: int, clip: float | None = 0.2, dtype: torch.dtype = FP32) -> Case:
    def inputs(make: Maker) -> Sequence[Any]:
        old = make.normal(N)
        values = (old + make.normal(N, std=0.2)).to(dtype)
        return values, old, old + make.normal(N), make.token_weights(N)

    name = f"{N} {name_of(dtype)}" + ("" if clip else " unclipped")
    return Case("value_loss", name, value_loss, inputs, {"clip": clip}, 1)


def value_head_loss_case(N: int, H: int, dtype: torch.dtype = BF16) -> Case:
    def inputs(make: Maker) -> Sequence[Any]:
        head = make.normal(N, H, dtype=dtype), make.normal(H, dtype=dtype, std=H**-0.5)
        return *head, make.normal(N), make.normal(N), make.token_weights(N)

    name = f"{N} x {H} {name_of(dtype)}"
    return Case("value_head_loss", name, value_head_loss, inputs, {"clip": 0.2}, 2)


def sampling_case(R: int, V: int, name: str = "plain", *, dtype: torch.dtype = FP32, **settings: Any) -> Case:
    """R requests; a fiftieth of the vocabulary was seen where there is a repetition penalty."""
    chosen = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, **settings}
    penalised = chosen["repetition_penalty"] != 1.0

    def inputs(make: Maker) -> Sequence[Any]:
        seen = make.uniform(R, V) < 0.02 if penalised else None
        return make.normal(R, V, dtype=dtype, std=2.0), seen, make.integers(R, high=2**62), make.integers(R, high=2048)

    def called(logits: Tensor, seen: Tensor | None, seeds: Tensor, positions: Tensor, **settings: Any) -> Any:
        return sample(logits, seen=seen, seeds=seeds, positions=positions, **settings)

    return Case("sampling", f"{R} x {V} {name}", called, inputs, chosen)


def paged_attention_case(
    R: int,
    context: int,
    queries: int | Sequence[int] = 1,
    *,
    heads: int = 32,
    groups: int = 8,
    D: int = 128,
    page_size: int = 64,
    dtype: torch.dtype = BF16,
) -> Case:
    """R requests with this context, or down to half of it, and this many queries, or these in turn."""
    counts = [queries] if isinstance(queries, int) else list(queries)
    ends = list(accumulate(counts[r % len(counts)] for r in range(R)))
    P = -(-context // page_size)

    def inputs(make: Maker) -> Sequence[Any]:
        cu_queries = torch.tensor([0, *ends], dtype=torch.int32, device=make.device)
        shorter = (torch.arange(R, dtype=torch.int32, device=make.device) % 5) * (0 if make.dense else context // 8)
        # Neighbours of a request lie far apart in the cache.
        page_tables = (torch.arange(R * P, device=make.device) * 7919 % (R * P)).view(R, P).int()
        query = make.normal(ends[-1], heads, D, dtype=dtype)
        pages = [make.normal(R * P, page_size, groups, D, dtype=dtype) for _ in range(2)]
        return query, *pages, page_tables, torch.maximum(context - shorter, cu_queries.diff()), cu_queries

    name = f"{R} x {context} of {page_size}, {queries} queries, {heads} / {groups} x {D} {name_of(dtype)}"
    return Case("paged_attention", name, paged_attention, inputs, {"max_query": max(counts), "max_context": context})


def store_pages_case(N: int, groups: int = 8, D: int = 128, page_size: int = 64, dtype: torch.dtype = BF16) -> Case:
    """Writes to its inputs, and so gives nothing back. One token in eight is skipped."""
    num_pages = -(-2 * N // page_size)

    def inputs(make: Maker) -> Sequence[Any]:
        slots = torch.arange(N, device=make.device) * 7919 % (num_pages * page_size)
        slots = torch.where((torch.arange(N, device=make.device) % 8 != 7) | make.dense, slots, -1)
        tokens = [make.normal(N, groups, D, dtype=dtype) for _ in range(2)]
        return *tokens, *(make.zeros(num_pages, page_size, groups, D).to(dtype) for _ in range(2)), slots

    return Case("paged_attention", f"store {N} x {groups} x {D} {name_of(dtype)}", store_pages, inputs)


def rope_store_case(
    N: int,
    heads: int = 32,
    groups: int = 8,
    D: int = 128,
    page_size: int = 64,
    dtype: torch.dtype = BF16,
    *,
    in_place: bool = False,
) -> Case:
    """Gives the queries, and copies of the pages with what was written; in_place: the queries alone."""
    num_pages = -(-N // page_size)

    def inputs(make: Maker) -> Sequence[Any]:
        mixed = make.normal(N, groups, heads // groups + 2, D, dtype=dtype)
        angles = [make.uniform(N, D // 2) for _ in range(2)]
        slots = (torch.arange(N, device=make.device) * 7919 % (num_pages * page_size)).int()
        return mixed, *angles, *(make.zeros(num_pages, page_size, groups, D).to(dtype) for _ in range(2)), slots

    def copying(mixed: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> Any:
        keys, values = keys.clone(), values.clone()
        return rope_store(mixed, cos, sin, keys, values, slots), keys, values

    function = rope_store if in_place else copying
    return Case("rope_store", f"{N} x {heads} / {groups} x {D} {name_of(dtype)}", function, inputs)


def adamw_case(num_params: int, dtype: torch.dtype = FP32, *, with_all: bool = False) -> Case:
    """Updates its inputs in place, and so gives nothing back. with_all: scaled, zeroed gradients, a copy, a flag."""

    def inputs(make: Maker) -> Sequence[Any]:
        state = [make.zeros(num_params)], [make.zeros(num_params)]
        required = [make.normal(num_params)], [make.normal(num_params, dtype=dtype)], *state
        if not with_all:
            return required
        return *required, make.uniform(1)[0], make.uniform(1)[0] >= 0, [make.zeros(num_params).to(BF16)]

    def called(params: Any, grads: Any, exp_avg: Any, exp_avg_sq: Any, *rest: Any, **given: Any) -> None:
        if rest:
            given |= {"grad_scale": rest[0], "is_finite": rest[1], "copies": rest[2], "zero_grads": True}
        adamw_step(params, grads, exp_avg, exp_avg_sq, **given)

    settings = {"lr": 1e-5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "step": 3}
    name = f"{num_params} parameters, {name_of(dtype)} gradient" + (", all options" if with_all else "")
    return Case("adamw", name, called, inputs, settings)


def squared_norm_case(num_entries: int, dtype: torch.dtype = FP32) -> Case:
    def called(x: Tensor) -> Tensor:
        return squared_norm([x], device=x.device)

    name = f"squared norm of {num_entries} {name_of(dtype)}"
    return Case("adamw", name, called, lambda make: [make.normal(num_entries, dtype=dtype)])
