"""Several ranks behind the rollout protocol: aborts that one of them learns of, and ids that are only padding."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from ppomax.engine.config import RunConfig, SamplingConfig
from ppomax.engine.config_models import ArchitectureConfig, ModelConfig
from ppomax.engine.models.shape import ModelShape

pytestmark = pytest.mark.dist

# 97 tokens: padded to 98 at tp 2.
SHAPE = ModelShape(
    vocab_size=97,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_query_groups=2,
    head_dim=8,
    ffn_hidden_size=48,
    max_position_embeddings=64,
    rope_theta=10000.0,
    norm_eps=1e-6,
    tie_embeddings=False,
)
CONFIG = RunConfig(model=ModelConfig(init=ArchitectureConfig(init_std=0.15)))
SAMPLING = SamplingConfig(temperature=1.0, top_p=1, repetition_penalty=1.1)
LENGTHS = (7, 1, 20, 12, 9, 3)


def make(layout):
    """(role, backend, requests) on this rank."""
    from ppomax.engine.models.roles import make_role, random_reader
    from ppomax.engine.parallel.device import start
    from ppomax.engine.parallel.groups import make_groups
    from ppomax.engine.parallel.layout import ParallelLayout
    from ppomax.engine.rollout.backend import RolloutRequest
    from ppomax.engine.rollout.embedded import EmbeddedBackend

    torch.set_num_threads(1)
    start(60)
    groups = make_groups({"policy": ParallelLayout(*layout)})["policy"]
    role = make_role("policy", SHAPE, random_reader(SHAPE, CONFIG), CONFIG, groups, source="random")
    generator = torch.Generator().manual_seed(5)
    prompts = [tuple(torch.randint(97, (length,), generator=generator).tolist()) for length in LENGTHS]
    requests = [RolloutRequest(10 + b, prompt, SAMPLING, b, 30) for b, prompt in enumerate(prompts)]
    return role, EmbeddedBackend(role, eos_id=-1), requests


def abort_on_one_rank(layout):
    """Completions: whole; with three aborts, two of them from the last rank alone while it runs; whole again."""
    from ppomax.engine.rollout.flight import Flight

    _, backend, requests = make(layout)
    whole = backend.generate(requests)
    launches = []
    launch = Flight.launch

    def aborting(self):
        launches.append(self)
        if len(launches) == 9 and dist.get_rank() == dist.get_world_size() - 1:
            backend.abort([request.id for request in requests[:5]])
        return launch(self)

    if dist.get_rank() == 0:
        backend.abort([15])
    with patch.object(Flight, "launch", aborting):
        completions = backend.generate(requests)
    return whole, completions, backend.generate(requests)


@pytest.mark.parametrize("layout", [(2, 1, 1), (1, 2, 1), (2, 2, 1), (2, 1, 2)], ids=["tp2", "pp2", "tp2_pp2", "dp2"])
def test_an_abort_that_one_rank_learns_of_ends_the_request_on_all_of_its_replica(on_ranks, layout):
    first, *others = on_ranks(layout[0] * layout[1] * layout[2], abort_on_one_rank, layout)
    for other in others:
        assert other == first
    whole, completions, again = first
    assert [completion.finish_reason for completion in completions[5:]] == ["abort"]
    assert completions[5].tokens == ()
    aborted = [b for b in range(5) if completions[b].finish_reason == "abort"]
    # The last rank is of the second replica, which has half of the requests.
    assert len(aborted) == 5 if layout[2] == 1 else 0 < len(aborted) < 5
    for b in range(5):
        num_tokens = len(completions[b].tokens)
        assert completions[b].tokens == whole[b].tokens[:num_tokens]
        assert 3 <= num_tokens < 15 if b in aborted else num_tokens == 30
    assert [replace(c, logprobs=()) for c in again] == [replace(c, logprobs=()) for c in whole]


def generate_with_a_tempting_padding_id(layout):
    """Tokens, where the logit of the padding id is by far the largest or the smallest."""
    role, backend, requests = make(layout)
    if role.groups.tp_rank == 1:
        weight = role.stage.vocabulary_weight()
        assert weight.shape[0] == 49
        weight.data[-1] = 100 * weight.data[0]
    return [completion.tokens for completion in backend.generate(requests)]


def test_an_id_that_is_only_padding_is_never_sampled(on_ranks):
    tempted, _ = on_ranks(2, generate_with_a_tempting_padding_id, (2, 1, 1))
    (expected,) = on_ranks(1, generate_with_a_tempting_padding_id, (1, 1, 1))
    assert tempted == expected
    assert max(max(tokens) for tokens in tempted) < 97
