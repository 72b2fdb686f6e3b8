"""The paper's repetition penalty for vLLM, whose own one counts the tokens of the prompt too."""

from typing import Any

import torch
from torch import Tensor


def make_penalty_processor() -> type:
    """A class of logits processors, for LLM(logits_processors=...).

    Once per distinct generated token, positive logits are divided by the request's extra_args["repetition_penalty"],
    others multiplied by it, as in kernels/sampling.
    """
    from vllm.v1.sample.logits_processor import LogitsProcessor
    from vllm.v1.sample.logits_processor.builtin import process_dict_updates

    class GeneratedTokenPenalty(LogitsProcessor):
        def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
            # {row of the batch: (penalty, the request's generated tokens, which vLLM extends)}
            self._rows: dict[int, tuple[float, list[int]]] = {}

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: Any) -> None:
            process_dict_updates(self._rows, batch_update, _penalty_of)

        def apply(self, logits: Tensor) -> Tensor:
            pairs = [(row, token) for row, (_, tokens) in self._rows.items() for token in set(tokens)]
            if not pairs:
                return logits
            rows, tokens = torch.tensor(pairs).to(logits.device, non_blocking=True).unbind(1)
            penalty = torch.tensor([self._rows[row][0] for row, _ in pairs]).to(logits.device, non_blocking=True)
            chosen = logits[rows, tokens]
            logits[rows, tokens] = torch.where(chosen > 0, chosen / penalty, chosen * penalty)
            return logits

    return GeneratedTokenPenalty


def _penalty_of(params: Any, prompt: list[int] | None, generated: list[int]) -> tuple[float, list[int]] | None:
    penalty = (params.extra_args or {}).get("repetition_penalty", 1.0)
    return (penalty, generated) if penalty != 1 else None
