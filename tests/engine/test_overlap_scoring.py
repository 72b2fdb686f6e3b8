"""Scoring of responses that have ended while others are still being sampled."""

from functools import partial

import pytest
import torch

from ppomax.engine.config import RunConfig, SamplingConfig
from ppomax.engine.config_checks import impossible_combinations
from ppomax.engine.config_models import ArchitectureConfig
from ppomax.engine.config_ppo import PpoConfig
from ppomax.engine.models.roles import as_scalar, make_role, random_reader, role_groups
from ppomax.engine.models.shape import shape_from_init
from ppomax.engine.parallel.device import start, stop
from ppomax.engine.ppo import scoring
from ppomax.engine.ppo.scoring import RolloutScorer
from ppomax.engine.ppo.types import take_rows
from ppomax.engine.rollout.generate import generate, request_seeds
from ppomax.engine.rollout.scheduler import Scheduler
from ppomax.engine.rollout.watch import Ended

PROMPTS = [list(range(2, 3 + b * 5 % 9)) for b in range(14)]
SAMPLING = SamplingConfig(temperature=2.0, top_p=1, max_new_tokens=50, batch_size=10)
EOS = 1


@pytest.fixture(scope="module")
def roles():
    """policy, reward, critic, reference, process."""
    torch.set_num_threads(1)
    start(60)
    groups = role_groups(RunConfig())
    init = ArchitectureConfig(
        hidden_size=32, num_layers=2, num_heads=4, num_query_groups=2, ffn_hidden_size=64, init_std=0.2
    )

    def role(name, seed, *, scalar=False):
        config = RunConfig.model_validate({"model": {"init": init.model_dump()}, "train": {"seed": seed}})
        shape = shape_from_init(init, 17)
        shape = as_scalar(shape) if scalar else shape
        place = "reward" if name == "process" else name
        return make_role(name, shape, random_reader(shape, config), config, groups[place], source="random")

    scalars = role("reward", 2, scalar=True), role("critic", 3, scalar=True)
    yield role("policy", 1), *scalars, role("reference", 4), role("process", 5, scalar=True)
    stop()


def respond(policy, watch=None):
    seeds = request_seeds(1, 0, len(PROMPTS))
    return generate(policy, PROMPTS, SAMPLING, seeds=seeds, eos_id=EOS, pad_id=0, watch=watch)


def scorer_of(roles, reference=True):
    policy, reward, critic, ref, process = roles
    options = {"process": process, "step_ends": step_ends, "sampler": policy, "limit": 64}
    return RolloutScorer(reward, critic, ref if reference else None, **options)


def step_ends(rollout):
    return rollout.response_mask & (rollout.tokens[:, 1:] % 4 == EOS)


def test_responses_are_told_once_and_whole_while_others_are_sampled(roles, monkeypatch):
    told, num_running = [], []
    plan = Scheduler.plan

    def noting(self):
        step = plan(self)
        num_running.append(0 if step is None else len(step.entries))
        return step

    monkeypatch.setattr(Scheduler, "plan", noting)

    def on_ended(rows, part):
        told.append((rows, part, len(num_running)))

    rollout = respond(roles[0], partial(Ended, 2, on_ended, 0))
    expected = respond(roles[0])
    assert all(torch.equal(x, getattr(expected, name)) for name, x in vars(rollout).items())
    rows = [row for rows, _, _ in told for row in rows]
    assert len(told) > 1
    assert len(set(rows)) == len(rows) < len(PROMPTS)
    for rows, part, num_steps in told:
        assert len(rows) >= 2
        assert sum(num_running[num_steps : num_steps + 8]) > 0  # the others go on
        for name, x in vars(take_rows(rollout, torch.tensor(rows))).items():
            assert torch.equal(x, getattr(part, name)), name


@pytest.mark.parametrize("reference", [True, False])
def test_scores_in_parts_are_those_of_the_whole(roles, reference, monkeypatch):
    num_sequences = []
    original = scoring.sequence_scores

    def counting(role, sequences, **options):
        num_sequences.append(len(sequences))
        return original(role, sequences, **options)

    monkeypatch.setattr(scoring, "sequence_scores", counting)
    early = scorer_of(roles, reference)
    rollout = respond(roles[0], partial(Ended, 3, early.add, 0))
    found = early.finish(rollout)
    assert early.num_scored == sum(num_sequences[:-1]) >= 3
    assert sum(num_sequences) == len(PROMPTS)
    expected = scorer_of(roles, reference).finish(rollout)
    for name, x in vars(expected).items():
        if x is None:
            assert name == "ref_logprobs"
            assert not reference
            assert found.ref_logprobs is None
        else:
            torch.testing.assert_close(getattr(found, name), x, atol=2e-6, rtol=1e-5)
            assert x.any()


def test_all_rows_may_have_come_early(roles):
    rollout = respond(roles[0])
    early, rows = scorer_of(roles), torch.arange(len(PROMPTS)).flip(0)
    early.add(rows[:9].tolist(), take_rows(rollout, rows[:9]))
    early.add(rows[9:].tolist(), take_rows(rollout, rows[9:]))
    found, expected = early.finish(rollout), scorer_of(roles).finish(rollout)
    for name, x in vars(expected).items():
        torch.testing.assert_close(getattr(found, name), x, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"overlap_scoring": 128}, "nothing would be scored early"),
        ({"overlap_scoring": 8, "over_sampling_size": 160}, "known only when the last of them has ended"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, fault):
    with pytest.raises(ValueError, match=fault):
        PpoConfig(**settings)


def test_only_ppo_with_the_embedded_generator_scores_early():
    def faults(command, **sampling):
        config = RunConfig(ppo=PpoConfig(overlap_scoring=8), sampling=SamplingConfig(**sampling))
        return [fault for fault in impossible_combinations(config, command) if "overlap_scoring" in fault]

    assert "serve ppo alone" in faults("critic")[0]
    assert "embedded generator" in faults("ppo", backend="vllm")[0]
    assert faults("ppo") == faults("sft") == []


def test_roles_on_ranks_of_their_own_are_refused():
    def faults(**layouts: dict[str, int]) -> list[str]:
        config = RunConfig.model_validate({"ppo": {"overlap_scoring": 4}, "parallel": layouts})
        return [fault for fault in impossible_combinations(config, "ppo") if "overlap_scoring" in fault]

    (fault,) = faults(critic={"first_rank": 1}, reward={"num_ranks": 1})
    assert "parallel.critic, parallel.reward has ranks of its own" in fault
    assert faults(critic={"tp": 2}) == []
