"""Compares a Hugging Face folder's logits in transformers with the engine's."""

from typing import Any

import torch
from torch import Tensor

from ppomax.engine.config import RunConfig
from ppomax.engine.data.batches import Pack, Rows
from ppomax.engine.models.roles import load_role, role_groups, role_packs
from ppomax.engine.parallel.device import start, stop
from ppomax.engine.parallel.pipeline import run_forward

LENGTHS = (1, 7, 33, 64)
"""Tokens of the random sequences that are compared; together they make one ragged pack."""


def max_logit_difference(folder: str, *, seed: int = 0) -> float:
    """Largest |logit - logit| over random ragged sequences, fp32, of a causal-LM folder; one process, any device."""
    from transformers import AutoModelForCausalLM

    start(600)
    try:
        config = RunConfig()
        role = load_role("policy", folder, config, role_groups(config)["policy"])
        vocab_size = role.shape.vocab_size
        generator = torch.Generator().manual_seed(seed)
        lengths = [min(length, role.shape.max_position_embeddings) for length in LENGTHS]
        sequences = [torch.randint(0, vocab_size, (length,), generator=generator) for length in lengths]
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        every = [torch.arange(length) for length in lengths]
        rows = Rows(
            every, [torch.full_like(row, -1) for row in every], [s + row for s, row in zip(starts, every, strict=True)]
        )
        packs = role_packs(role, sequences, rows, sum(lengths))

        def logits(hidden: Tensor, pack: Pack) -> Tensor:
            return (hidden.float() @ role.stage.vocabulary_weight().float().T)[:, :vocab_size]

        ours = run_forward(role.modules, role.groups, packs, logits, sum(lengths), width=vocab_size)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = model.to(role.device).eval()
        with torch.no_grad():
            theirs = torch.cat([model(sequence[None].to(role.device)).logits[0] for sequence in sequences])
        return float((ours - theirs).abs().max())
    finally:
        stop()
