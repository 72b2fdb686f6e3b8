"""Calls of kernels/ as production makes them: the compile gate compiles them, the benchmark times some of them.

A `Case` is one call of a public function with inputs that a `Maker` fills: random numbers on a device, or nothing at
all on "meta", where only shapes and types exist. Sizes are those of a 7B model (hidden 4096, feed-forward 11008,
vocabularies of 32,000 to 151,936) on 8192 tokens, and of 13B where a row's size chooses another program.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ppomax.kernels.adamw import adamw_step
from ppomax.kernels.experience import experience
from ppomax.kernels.gae import gae
from ppomax.kernels.linear_logprobs import linear_full_kl, linear_logprobs, linear_policy_loss
from ppomax.kernels.logprobs import token_logprobs
from ppomax.kernels.policy_loss import policy_loss
from ppomax.kernels.rms_norm import rms_norm
from ppomax.kernels.rope import rope
from ppomax.kernels.sampling import sample
from ppomax.kernels.swiglu import swiglu
from ppomax.kernels.token_rewards import token_rewards
from ppomax.kernels.value_loss import value_loss
from ppomax.kernels.whiten import masked_moments, whiten

BF16, FP32 = torch.bfloat16, torch.float32
NUM_TOKENS = 8192
HIDDEN, WIDE_HIDDEN, FEED_FORWARD = 4096, 5120, 11008
VOCABULARIES = (32000, 128256, 151936)


class Maker:
    """Draws inputs on one device, the same ones for every device but "meta", which has no entries."""

    def __init__(self, device: torch.device | str, seed: int = 0) -> None:
        self.device = torch.device(device)
        self.is_meta = self.device.type == "meta"
        self._generator = None if self.is_meta else torch.Generator(self.device).manual_seed(seed)

    def normal(self, *size: int, dtype: torch.dtype = FP32, std: float = 1.0) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self.device).normal_(0.0, std, generator=self._generator)

    def uniform(self, *size: int) -> Tensor:
        return torch.empty(size, device=self.device).uniform_(generator=self._generator)

    def zeros(self, *size: int) -> Tensor:
        return torch.zeros(size, device=self.device)

    def integers(self, *size: int, high: int) -> Tensor:
        return torch.empty(size, dtype=torch.int64, device=self.device).random_(0, high, generator=self._generator)

    def labels(self, num_rows: int, vocab_size: int) -> Tensor:
        """One label in eight masks its row."""
        labels = self.integers(num_rows, high=vocab_size)
        return torch.where(torch.arange(num_rows, device=self.device) % 8 == 7, -1, labels)

    def mask(self, B: int, T: int, *, with_gaps: bool = False) -> Tensor:
        """Responses that begin within the first quarter of their row and end within the last."""
        start, end = self.integers(B, 1, high=T // 4 + 1), T - self.integers(B, 1, high=T // 4 + 1)
        position = torch.arange(T, device=self.device)[None]
        inside = (position >= start) & (position < end)
        return inside & (self.uniform(B, T) < 0.8) if with_gaps else inside

    def token_weights(self, num_tokens: int) -> Tensor:
        """One over the number of kept tokens; one token in eight has none."""
        kept = torch.arange(num_tokens, device=self.device) % 8 != 7
        return kept / kept.sum()


@dataclass(frozen=True)
class Case:
    """function(*inputs(maker), **settings), of whose inputs the first `num_gradients` get a gradient."""

    op: str
    name: str
    function: Callable[..., Any]
    inputs: Callable[[Maker], Sequence[Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    num_gradients: int = 0


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a result: one, or those of nested tuples, lists and the values of dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [x for item in value for x in tensors_in(item)] if isinstance(value, tuple | list) else []


def run(case: Case, inputs: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients): the gradients of a fixed weighted sum of the outputs that have one."""
    given = [x.detach().requires_grad_() if i < case.num_gradients else x for i, x in enumerate(inputs)]
    outputs = tensors_in(case.function(*given, **case.settings))
    differentiable = [x for x in outputs if x.requires_grad]
    if not case.num_gradients:
        return outputs, []
    upstream = [torch.linspace(0.5, 1.5, x.numel(), device=x.device).view(x.shape).to(x.dtype) for x in differentiable]
    gradients = torch.autograd.grad(differentiable, given[: case.num_gradients], upstream)
    return [x.detach() for x in outputs], list(gradients)


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

    return Case("linear_logprobs", f"full KL {N} x {H} x {V} {name_of(dtype)}", linear_full_kl, inputs)


def linear_policy_loss_case(N: int, H: int, V: int, dtype: torch.dtype = BF16) -> Case:
    def inputs(make: Maker) -> Sequence[Any]:
        head, labels = head_of(make, N, H, V, dtype), make.labels(N, V)
        return *head, labels, make.normal(N) - 10, make.normal(N), make.token_weights(N)

    settings = {"clip": 0.2, "dual_clip": 3.0, "entropy_coef": 0.01}
    name = f"policy loss {N} x {H} x {V} {name_of(dtype)}"
    return Case("linear_logprobs", name, linear_policy_loss, inputs, settings, 2)


def head_of(make: Maker, N: int, H: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Hidden states and a head whose logits have standard deviation 2."""
    return make.normal(N, H, dtype=dtype), make.normal(V, H, dtype=dtype, std=2 * H**-0.5)


def token_rewards_case(B: int, T: int, kl_estimator: str = "k1", **optional: bool) -> Case:
    def inputs(make: Maker) -> Sequence[Any]:
        return make.normal(B), make.normal(B, T, std=0.3), make.normal(B, T, std=0.3), make.mask(B, T)

    name = f"{B} x {T} {kl_estimator}" + "".join(f" {key}" for key in optional)
    settings = {"kl_coef": 0.1, "kl_estimator": kl_estimator}
    return Case("token_rewards", name, *_with_optional(token_rewards, inputs, B, T, optional), settings)


def gae_case(B: int, T: int, **optional: bool) -> Case:
    def inputs(make: Maker) -> Sequence[Any]:
        return make.normal(B, T), make.normal(B, T), make.mask(B, T)

    name = f"{B} x {T}" + "".join(f" {key}" for key in optional)
    return Case("gae", name, *_with_optional(gae, inputs, B, T, optional), {"gamma": 1.0, "lam": 0.95})


def experience_case(B: int, T: int, kl_estimator: str = "k1", *, with_gaps: bool = False, **optional: bool) -> Case:
    def inputs(make: Maker) -> Sequence[Any]:
        logprobs = [make.normal(B, T, std=0.3) for _ in range(2)]
        return make.normal(B), *logprobs, make.normal(B, T), make.mask(B, T, with_gaps=with_gaps)

    name = f"{B} x {T} {kl_estimator}" + "".join(f" {key}" for key in optional)
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


def policy_loss_case(N: int, name: str = "", **settings: Any) -> Case:
    def inputs(make: Maker) -> Sequence[Any]:
        old = make.normal(N) - 3
        return old + make.normal(N, std=0.1), old, make.normal(N), make.token_weights(N)

    label = f"{N} {name}".rstrip()
    return Case("policy_loss", label, policy_loss, inputs, {"clip": 0.2, "dual_clip": 3.0, **settings}, 1)


def value_loss_case(N: int, clip: float | None = 0.2, dtype: torch.dtype = FP32) -> Case:
    def inputs(make: Maker) -> Sequence[Any]:
        old = make.normal(N)
        values = (old + make.normal(N, std=0.2)).to(dtype)
        return values, old, old + make.normal(N), make.token_weights(N)

    name = f"{N} {name_of(dtype)}" + ("" if clip else " unclipped")
    return Case("value_loss", name, value_loss, inputs, {"clip": clip}, 1)


def sampling_case(R: int, V: int, name: str = "plain", **settings: Any) -> Case:
    """R requests; a fiftieth of the vocabulary was seen where there is a repetition penalty."""
    chosen = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, **settings}
    penalised = chosen["repetition_penalty"] != 1.0

    def inputs(make: Maker) -> Sequence[Any]:
        seen = make.uniform(R, V) < 0.02 if penalised else None
        return make.normal(R, V, std=2.0), seen, make.integers(R, high=2**62), make.integers(R, high=2048)

    def called(logits: Tensor, seen: Tensor | None, seeds: Tensor, positions: Tensor, **settings: Any) -> Any:
        return sample(logits, seen=seen, seeds=seeds, positions=positions, **settings)

    return Case("sampling", f"{R} x {V} {name}", called, inputs, chosen)


def adamw_case(num_params: int, dtype: torch.dtype = FP32) -> Case:
    """Updates its inputs in place, and so gives nothing back."""

    def inputs(make: Maker) -> Sequence[Any]:
        state = [make.zeros(num_params)], [make.zeros(num_params)]
        return [make.normal(num_params)], [make.normal(num_params, dtype=dtype)], *state

    settings = {"lr": 1e-5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "step": 3}
    return Case("adamw", f"{num_params} parameters, {name_of(dtype)} gradient", adamw_step, inputs, settings)


def name_of(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}[dtype]


PAPER_SAMPLING = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1}
LARGE_BATCH = (1024, 8192)

PRODUCTION: tuple[Case, ...] = (
    *(rms_norm_case(NUM_TOKENS, H, dtype) for H in (HIDDEN, WIDE_HIDDEN) for dtype in (BF16, FP32)),
    *(swiglu_case(NUM_TOKENS, F, dtype) for F in (FEED_FORWARD, 13824) for dtype in (BF16, FP32)),
    *(rope_case(NUM_TOKENS, heads, dtype=dtype) for heads in (32, 8) for dtype in (BF16, FP32)),
    *(logprobs_case(NUM_TOKENS, V, dtype) for V in VOCABULARIES for dtype in (BF16, FP32)),
    logprobs_case(NUM_TOKENS, 128256 // 8, temperature=0.7),
    *(linear_logprobs_case(NUM_TOKENS, HIDDEN, V) for V in (32000, 128256)),
    linear_logprobs_case(NUM_TOKENS, HIDDEN, 32000, FP32),
    linear_policy_loss_case(NUM_TOKENS, HIDDEN, 128256),
    linear_full_kl_case(NUM_TOKENS, HIDDEN, 32000),
    *(token_rewards_case(64, 1024, estimator) for estimator in ("k1", "k2", "k3")),
    token_rewards_case(64, 1024, "full", kl=True, step_rewards=True),
    *(gae_case(B, T) for B, T in ((64, 1024), (8, 8192), LARGE_BATCH)),
    gae_case(64, 1024, bootstrap=True),
    *(experience_case(B, T) for B, T in ((64, 1024), (8, 512), (8, 8192), LARGE_BATCH)),
    *(experience_case(64, 1024, estimator) for estimator in ("k2", "k3")),
    experience_case(64, 1024, "full", kl=True, step_rewards=True, bootstrap=True),
    *(case(*LARGE_BATCH, dtype) for case in (whiten_case, moments_case) for dtype in (FP32, BF16)),
    moments_case(64, 1024),
    policy_loss_case(NUM_TOKENS),
    policy_loss_case(64 * NUM_TOKENS),
    policy_loss_case(NUM_TOKENS, "no dual clip", dual_clip=None),
    policy_loss_case(NUM_TOKENS, "clipped advantages", advantage_clip=0.5),
    policy_loss_case(NUM_TOKENS, "penalty", objective="penalty", clip=None, penalty_beta=0.1),
    *(value_loss_case(N) for N in (NUM_TOKENS, 64 * NUM_TOKENS)),
    value_loss_case(NUM_TOKENS, None),
    value_loss_case(NUM_TOKENS, dtype=BF16),
    *(sampling_case(64, V) for V in (32000, 151936)),
    sampling_case(64, 151936, "greedy", temperature=0.0),
    sampling_case(64, 151936, "top-k", top_k=50),
    sampling_case(64, 151936, "paper", **PAPER_SAMPLING),
    *(adamw_case(10**9 // 4, dtype) for dtype in (FP32, BF16)),
)
