"""Sampling in torch.

The draw is the argmax of s_v + g_v over the kept tokens: with g_v = -log(-log u_v) its probability is softmax(s).
"""

import torch
from torch import Tensor

from ppomax.kernels.numerics import wide
from ppomax.kernels.philox import token_uniforms


@torch.no_grad()
def sample(
    logits: Tensor,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    repetition_penalty: float,
    seen: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ppomax.kernels.sampling; logits [R, vocab] are whole here."""
    logits = wide(logits)
    scores = logits
    if seen is not None and repetition_penalty != 1:
        penalised = torch.where(scores < 0, scores * repetition_penalty, scores / repetition_penalty)
        scores = torch.where(seen[:, : scores.shape[1]], penalised, scores)
    if temperature > 0:
        scores = filtered(scores / temperature, top_k=top_k, top_p=top_p)
        uniforms = token_uniforms(seeds, positions, scores.shape[1])
        scores = scores.double() - (-uniforms.log()).log()
    best, tokens = scores.max(dim=1)
    second = scores.scatter(1, tokens[:, None], -torch.inf).amax(dim=1)
    logprobs = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=1)
    return tokens, logprobs.float(), (best - second).float()


def filtered(scores: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """scores [R, vocab] with -inf for the tokens that top-k, then top-p of the renormalised rest, drop."""
    if top_k == 0 and top_p == 1:
        return scores
    descending, order = scores.sort(dim=1, descending=True, stable=True)  # equal scores stay in the order of their ids
    if top_k > 0:
        descending[:, top_k:] = -torch.inf
    if top_p < 1:
        probabilities = descending.double().softmax(dim=1)
        likelier = probabilities.cumsum(dim=1) - probabilities
        descending = torch.where(likelier < top_p, descending, -torch.inf)  # the first has 0 before it and stays
    return torch.empty_like(scores).scatter_(1, order, descending)
