"""The operations of kernels/ as plain PyTorch, the way training code writes them: what our versions are compared with.

Each function takes the inputs and settings of the operation's case in kernel_cases.py, and gives its first outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    full = x.float()
    return weight * (full * torch.rsqrt(full.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def torch_rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (torch.cat((table, table), dim=-1)[:, None].to(x.dtype) for table in (cos, sin))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rope_store(
    mixed: Tensor, cos: Tensor, sin: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor
) -> Tensor:
    query, key, value = mixed.split([mixed.shape[2] - 2, 1, 1], dim=2)
    key_pages.flatten(0, 1)[slots] = rope(key.squeeze(2), cos, sin).to(key_pages.dtype)
    value_pages.flatten(0, 1)[slots] = value.squeeze(2)
    return rope(query.flatten(1, 2), cos, sin)


def token_logprobs(logits: Tensor, labels: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    all_logprobs = F.log_softmax(logits.float() / temperature, dim=-1)
    entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
    return all_logprobs.gather(1, labels[:, None])[:, 0], entropy


def linear_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return token_logprobs(hidden @ weight.T, labels)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip: float,
    dual_clip: float,
    entropy_coef: float,
) -> Tensor:
    logprobs, entropy = linear_logprobs(hidden, weight, labels)
    loss = policy_loss(logprobs, old_logprobs, advantages, weights, clip=clip, dual_clip=dual_clip)
    return loss - entropy_coef * (weights * entropy).sum()


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    return (weights * F.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")).sum()


def linear_full_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    logprobs, ref_logprobs = (
        F.log_softmax((x @ w.T).float(), dim=-1) for x, w in ((hidden, weight), (ref_hidden, ref_weight))
    )
    return (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor, *, clip: float, dual_clip: float
) -> Tensor:
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return (weights * loss).sum()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, *, clip: float) -> Tensor:
    clipped = torch.clamp(values, old_values - clip, old_values + clip)
    return (weights * 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())).sum()


def value_head_loss(
    hidden: Tensor, weight: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, *, clip: float
) -> Tensor:
    return value_loss((hidden @ weight).float(), old_values, returns, weights, clip=clip)


def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, kl_coef: float, kl_estimator: str = "k1"
) -> tuple[Tensor, Tensor]:
    """Of the estimator k1."""
    kl = (logprobs - ref_logprobs) * mask
    rewards = -kl_coef * kl
    last = (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(-1)
    return rewards.scatter_add(1, last[:, None], scores[:, None]), kl


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Backwards over T; a masked token hands on what came from its right."""
    kept = mask.to(values.dtype)
    advantage, next_value = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    advantages = []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        candidate = delta + gamma * lam * advantage
        advantage = candidate * kept[:, t] + (1 - kept[:, t]) * advantage
        next_value = values[:, t] * kept[:, t] + (1 - kept[:, t]) * next_value
        advantages.append(advantage)
    whole = torch.stack(advantages[::-1], dim=1) * kept
    return whole, (whole + values) * kept


def gae_without_gaps(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, ...]:
    """Three operations for each of T tokens: right only where no row has gaps."""
    rewards, values = rewards * mask, values * mask
    deltas = rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values
    advantage = torch.zeros_like(values[:, 0])
    advantages = []
    for t in reversed(range(values.shape[1])):
        advantage = deltas[:, t] + gamma * lam * advantage
        advantages.append(advantage)
    whole = torch.stack(advantages[::-1], dim=1) * mask
    return whole, (whole + values) * mask


def experience(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    kl_estimator: str,
    gamma: float,
    lam: float,
    recursion: Any = gae,
) -> tuple[Tensor, ...]:
    rewards, kl = token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef=kl_coef)
    advantages, returns = recursion(rewards, values, mask, gamma=gamma, lam=lam)
    return rewards, kl, advantages, returns, *masked_moments(advantages, mask)


def experience_without_gaps(*inputs: Tensor, **settings: Any) -> tuple[Tensor, ...]:
    return experience(*inputs, **settings, recursion=gae_without_gaps)


def masked_moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    count = mask.sum()
    mean = (x * mask).sum() / count
    return count, mean, ((x - mean).square() * mask).sum()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    count, mean, m2 = masked_moments(x, mask)
    return (x - mean) * torch.rsqrt(m2 / count + 1e-6) * mask


def sample(
    logits: Tensor,
    seen: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    repetition_penalty: float,
) -> tuple[Tensor, Tensor]:
    """By sorting; the noise is torch's, so that tokens differ from ours and between batches."""
    changed = logits.float()
    if seen is not None:
        penalised = torch.where(changed < 0, changed * repetition_penalty, changed / repetition_penalty)
        changed = torch.where(seen, penalised, changed)
    changed = changed / temperature
    if top_p < 1:
        ordered, index = changed.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        dropped = probabilities.cumsum(-1) - probabilities >= top_p
        changed = changed.scatter(1, index, ordered.masked_fill(dropped, float("-inf")))
    tokens = torch.multinomial(changed.softmax(-1), 1)
    return tokens[:, 0], F.log_softmax(logits.float(), dim=-1).gather(1, tokens)[:, 0]


def paged_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_tables: Tensor,
    context_lengths: Tensor,
    cu_queries: Tensor,
    *,
    max_query: int,
    max_context: int,
) -> Tensor:
    """Gathers the pages of all requests, each padded to the longest; as many queries for each."""
    tables = page_tables[:, : -(-max_context // key_pages.shape[1])].long()
    key, value = (x[tables].flatten(1, 2)[:, :max_context].transpose(1, 2) for x in (key_pages, value_pages))
    counts, step = cu_queries.diff(), torch.arange(max_query, device=query.device)
    rows = (cu_queries[:-1, None] + step).clamp(max=query.shape[0] - 1)
    last = (context_lengths - counts)[:, None] + step
    mask = torch.arange(max_context, device=query.device) <= last[..., None]
    heads = query[rows].transpose(1, 2)
    output = F.scaled_dot_product_attention(heads, key, value, attn_mask=mask[:, None], enable_gqa=True).transpose(1, 2)
    request = torch.arange(tables.shape[0], device=query.device)
    request = request.repeat_interleave(counts, output_size=query.shape[0])
    return output[request, torch.arange(query.shape[0], device=query.device) - cu_queries[request]]


def adamw(params: list[Tensor], grads: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor], **s: Any) -> None:
    """One operation after the other."""
    (beta1, beta2), step = s["betas"], s["step"]
    for p, g, m, v in zip(params, grads, exp_avg, exp_avg_sq, strict=True):
        grad = g.float()
        p.mul_(1 - s["lr"] * s["weight_decay"])
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        p.addcdiv_(m, (v / (1 - beta2**step)).sqrt_().add_(s["eps"]), value=-s["lr"] / (1 - beta1**step))
