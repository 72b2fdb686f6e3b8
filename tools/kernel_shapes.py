"""The calls that stand for production: a 7B model on 8192 tokens, and 13B where the size of a row decides more."""

from typing import Any

from ppomax.tools.kernel_cases import (
    adamw_case,
    experience_case,
    gae_case,
    linear_cross_entropy_case,
    linear_full_kl_case,
    linear_logprobs_case,
    linear_policy_loss_case,
    logprobs_case,
    moments_case,
    packed_experience_case,
    packed_gae_case,
    packed_rewards_case,
    policy_loss_case,
    rms_norm_case,
    rope_case,
    sampling_case,
    squared_norm_case,
    swiglu_case,
    token_rewards_case,
    value_head_loss_case,
    value_loss_case,
    whiten_case,
)
from ppomax.tools.kernel_inputs import BF16, FP32, Case

NUM_TOKENS = 8192
HIDDEN, WIDE_HIDDEN, FEED_FORWARD = 4096, 5120, 11008
VOCABULARIES = (32000, 128256, 151936)
PAPER_SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1}
LARGE_BATCH = (1024, 8192)

PRODUCTION: tuple[Case, ...] = (
    *(rms_norm_case(NUM_TOKENS, H, dtype) for H in (HIDDEN, WIDE_HIDDEN) for dtype in (BF16, FP32)),
    *(swiglu_case(NUM_TOKENS, F, dtype) for F in (FEED_FORWARD, 13824) for dtype in (BF16, FP32)),
    *(rope_case(NUM_TOKENS, heads) for heads in (32, 8)),
    rope_case(NUM_TOKENS, 32, dtype=FP32),
    *(logprobs_case(NUM_TOKENS, V, dtype) for V in VOCABULARIES for dtype in (BF16, FP32)),
    logprobs_case(NUM_TOKENS, 128256 // 8, temperature=0.7),
    *(linear_logprobs_case(NUM_TOKENS, HIDDEN, V) for V in (32000, 128256)),
    linear_logprobs_case(NUM_TOKENS, HIDDEN, 32000, FP32),
    linear_policy_loss_case(NUM_TOKENS, HIDDEN, 128256),
    linear_policy_loss_case(NUM_TOKENS, HIDDEN, 32000, FP32),
    linear_policy_loss_case(NUM_TOKENS, HIDDEN, 32000, with_all=True),
    linear_cross_entropy_case(NUM_TOKENS, HIDDEN, 128256),
    linear_full_kl_case(NUM_TOKENS, HIDDEN, 32000),
    *(token_rewards_case(64, 1024, estimator) for estimator in ("k1", "k2", "k3")),
    token_rewards_case(64, 1024, "full", kl=True, step_rewards=True),
    *(gae_case(B, T) for B, T in ((64, 1024), (8, 8192), LARGE_BATCH)),
    gae_case(64, 1024, bootstrap=True),
    *(experience_case(B, T) for B, T in ((64, 1024), (8, 512), (8, 8192), LARGE_BATCH)),
    *(experience_case(64, 1024, estimator) for estimator in ("k2", "k3")),
    experience_case(64, 1024, "full", kl=True, step_rewards=True, bootstrap=True),
    *(case(256, 1024) for case in (packed_experience_case, packed_gae_case, packed_rewards_case)),
    *(case(*LARGE_BATCH, dtype) for case in (whiten_case, moments_case) for dtype in (FP32, BF16)),
    moments_case(64, 1024),
    policy_loss_case(NUM_TOKENS),
    policy_loss_case(64 * NUM_TOKENS),
    policy_loss_case(NUM_TOKENS, "no dual clip", dual_clip=None),
    policy_loss_case(NUM_TOKENS, "whitened, clipped advantages", whitened=True, advantage_clip=0.5),
    policy_loss_case(NUM_TOKENS, "importance weights", weighted=True),
    policy_loss_case(NUM_TOKENS, "penalty", objective="penalty", clip=None, penalty_beta=0.1),
    *(value_loss_case(N) for N in (NUM_TOKENS, 64 * NUM_TOKENS)),
    value_loss_case(NUM_TOKENS, None),
    value_loss_case(NUM_TOKENS, dtype=BF16),
    *(value_head_loss_case(NUM_TOKENS, H, dtype) for H in (HIDDEN, WIDE_HIDDEN) for dtype in (BF16, FP32)),
    *(sampling_case(64, V) for V in (32000, 151936)),
    sampling_case(64, 151936, "bf16", dtype=BF16),
    sampling_case(64, 151936, "greedy", temperature=0.0),
    sampling_case(64, 151936, "top-k", top_k=50),
    sampling_case(64, 151936, "paper", **PAPER_SAMPLING),
    *(case(10**9 // 4, dtype) for case in (adamw_case, squared_norm_case) for dtype in (FP32, BF16)),
    adamw_case(10**9 // 4, with_all=True),
)
