"""A reward model's scores of pairs of responses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ppomax.engine.config import RunConfig
from ppomax.engine.data.chat import Template
from ppomax.engine.data.datasets import fit_pair
from ppomax.engine.errors import DataError
from ppomax.engine.judge.responses import Pair
from ppomax.engine.models.roles import Role
from ppomax.engine.ppo.scoring import sequence_scores


def encode_pairs(pairs: Sequence[Pair], template: Template, *, max_tokens: int) -> list[Tensor]:
    """A, B, A, ...: token ids of prompt, response and EOS; both of a pair lose the same old turns where they must.

    EOS stands behind responses that were cut at a limit too, and alone for an empty one. Raises DataError for a pair
    that does not fit.
    """
    sequences = []
    for number, pair in enumerate(pairs, 1):
        one, other = (
            template.encode_response(text) if text.strip() else [template.tokenizer.eos_id] for text in (pair.a, pair.b)
        )
        try:
            prompt, _ = fit_pair(pair.prompt, one, other, template, max_tokens=max_tokens)
        except DataError as error:
            raise DataError(f"pair {number} of {len(pairs)}: {error}") from None
        sequences += [torch.tensor([*prompt, *one]), torch.tensor([*prompt, *other])]
    return sequences


def score_pairs(reward: Role, sequences: Sequence[Tensor], config: RunConfig) -> Tensor:
    """[N, 2] float32: scores of A and B of encode_pairs. Every rank must call it; all get the scores."""
    scores = sequence_scores(reward, sequences, tokens_per_microbatch=config.train.tokens_per_microbatch)
    reward.groups.give_to_all(scores)
    return scores.view(-1, 2).cpu()
