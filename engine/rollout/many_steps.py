"""Several decoding steps in one call of the C kernels, for a model that lies whole on one CPU.

A step of a small model takes a millisecond, most of it in the calls around it. Where no prompt waits and nobody looks
on there is nothing to do between two steps that could not be done after some of them.
"""

import numpy as np
import torch

from ppomax.engine.config import SamplingConfig
from ppomax.engine.rollout.batch import Batch
from ppomax.engine.rollout.paged_cache import PagedCache
from ppomax.kernels.decoding_c import Drawn, DrawRule, Model, decode_steps

MOST_STEPS = 16
"""At a time. Those of a response that has ended are planned in vain, but not computed."""


class ManySteps:
    """Takes requests of a batch some steps further. eos_id, min_new_tokens: as in StopRule."""

    def __init__(
        self,
        model: Model,
        batch: Batch,
        sampling: SamplingConfig,
        *,
        vocab_size: int,
        eos_id: int,
        min_new_tokens: int,
    ) -> None:
        self._model, self._first_ends = model, (batch.prompt_lengths + min_new_tokens - 1).int()
        self._rule = DrawRule(
            vocab_size=vocab_size,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            eos_id=eos_id,
            has_early=min_new_tokens > 0 and eos_id >= 0,
        )
        self._drawn = Drawn(batch.tokens, batch.logprobs, batch.drawn_logprobs, batch.margins, batch.seeds)

    @staticmethod
    def fits(model: Model, sampling: SamplingConfig) -> bool:
        """Whether one call can do all that a step does, and takes no longer than a step of a large model."""
        return model.layers.are_in_cache and sampling.repetition_penalty == 1

    def run(
        self, cache: PagedCache, requests: np.ndarray, positions: np.ndarray, page_tables: np.ndarray, num_steps: int
    ) -> list[list[int]]:
        """num_steps more tokens of each request, or until it ends by EOS, written into the batch; returns them by step,
        with anything for requests that had ended.

        requests, positions [R] int32: rows of the batch and the places of their last tokens. page_tables [R, P] int32:
        with pages for all steps.
        """
        rows = torch.from_numpy(requests.copy())
        first_ends = self._first_ends[rows]
        after = torch.from_numpy(positions.astype(np.int64))[:, None] + torch.arange(1, num_steps + 1)
        index = rows.long()[:, None]
        places = torch.from_numpy(positions.copy()), first_ends, torch.from_numpy(page_tables.copy())
        decode_steps(self._model, self._rule, self._drawn, cache.keys, cache.values, rows, *places, num_steps)
        return self._drawn.tokens[index, after].T.tolist()
