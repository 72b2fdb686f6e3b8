"""Scoring on a stream of its own while others are sampled gives the numbers of scoring afterwards."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from ppomax.engine.config import RunConfig, SamplingConfig
from ppomax.engine.models.roles import Role, load_role, role_groups
from ppomax.engine.parallel.device import start, stop
from ppomax.engine.ppo.scoring import RolloutScorer
from ppomax.engine.rollout.generate import generate, request_seeds
from ppomax.engine.rollout.watch import Ended

pytestmark = pytest.mark.gpu

EOS = 275
SAMPLING = SamplingConfig(temperature=1.0, top_p=1, repetition_penalty=1, max_new_tokens=100)


@pytest.fixture
def roles(tiny: Any, device: torch.device) -> Iterator[dict[str, Role]]:
    start(60)
    groups = role_groups(RunConfig())
    folders = {"policy": "policy", "reference": "policy", "reward": "reward", "critic": "critic"}
    yield {
        name: load_role(name, tiny.model(folder), RunConfig(), groups[name], scalar=folder != "policy")
        for name, folder in folders.items()
    }
    stop()


def test_parts_on_another_stream_are_those_of_the_whole(roles: dict[str, Role]) -> None:
    prompts = [list(range(1, 2 + b % 20)) for b in range(48)]
    for attempt in range(3):
        models = (roles["reward"], roles["critic"], roles["reference"])
        early = RolloutScorer(*models, sampler=roles["policy"], limit=512)
        rollout = generate(
            roles["policy"],
            prompts,
            SAMPLING,
            seeds=request_seeds(1, attempt, len(prompts)),
            eos_id=EOS,
            pad_id=0,
            watch=partial(Ended, 4, early.add, 0),
        )
        assert early.num_scored > 8
        found, expected = early.finish(rollout), RolloutScorer(*models, limit=512).finish(rollout)
        for name, x in vars(expected).items():
            torch.testing.assert_close(getattr(found, name), x, atol=1e-4, rtol=1e-4)
