"""The matrix products of one PPO iteration and nothing else: what no engine can do without.

Each product of the layers and heads has the shape that a packed engine gives it: decoding one row per response, scoring
and learning all tokens of a pass in one pack. Attention's products, which depend on its kernel, are not among them.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ppomax.engine.models.shape import ModelShape


@dataclass(frozen=True)
class Pass:
    """rows: tokens that go through the layers. head_rows: of those, what the vocabulary head sees. times: how often.
    backward: with the products of both gradients.
    """

    rows: int
    head_rows: int
    times: int = 1
    backward: bool = False


def passes(prompts: int, prompt_tokens: int, new_tokens: int, minibatches: int, *, recomputes: bool) -> dict[str, list]:
    """Passes of an iteration with `prompts` responses of exactly new_tokens tokens, by phase.

    Rollout: prefill and decoding. Scoring: reference, reward model, critic, and the policy where old log-probs are
    recomputed. Update: policy and critic, minibatch by minibatch.
    """
    tokens, sampled = prompts * (prompt_tokens + new_tokens), prompts * new_tokens
    learned, learned_rows = tokens // minibatches, sampled // minibatches
    return {
        "rollout": [Pass(prompts * prompt_tokens, prompts), Pass(prompts, prompts, times=new_tokens - 1)],
        "scoring": [Pass(tokens, sampled, times=2 if recomputes else 1), Pass(tokens, 0, times=2)],
        "update": [
            Pass(learned, learned_rows, times=minibatches, backward=True),
            Pass(learned, 0, times=minibatches, backward=True),
        ],
    }


class Products:
    """Weights of one model and inputs, made once; `run` multiplies."""

    def __init__(self, shape: ModelShape, dtype: torch.dtype, device: torch.device) -> None:
        self._make = partial(torch.randn, dtype=dtype, device=device)
        heads = shape.num_heads * shape.head_dim
        mixed = heads + 2 * shape.num_query_groups * shape.head_dim
        hidden, wide = shape.hidden_size, shape.ffn_hidden_size
        sizes = [(mixed, hidden), (hidden, heads), (2 * wide, hidden), (hidden, wide)]
        # A copy per layer: with one set of weights for all of them the caches would hold what a model's do not.
        self._layers = [[self._make(size) for size in sizes] for _ in range(shape.num_layers)]
        self._head = self._make(shape.vocab_size, hidden)
        self._inputs: dict[tuple[int, int], Tensor] = {}

    def run(self, work: Pass) -> None:
        for _ in range(work.times):
            for layer in self._layers:
                for weight in layer:
                    self._multiply(weight, work.rows, work.backward)
            if work.head_rows:
                self._multiply(self._head, work.head_rows, work.backward)

    def _multiply(self, weight: Tensor, rows: int, backward: bool) -> None:
        outputs, inputs = weight.shape
        x = self._input(rows, inputs)
        torch.mm(x, weight.T)
        if backward:
            grad = self._input(rows, outputs)
            torch.mm(grad, weight)
            torch.mm(grad.T, x)

    def _input(self, rows: int, columns: int) -> Tensor:
        if (rows, columns) not in self._inputs:
            self._inputs[rows, columns] = self._make(rows, columns)
        return self._inputs[rows, columns]
