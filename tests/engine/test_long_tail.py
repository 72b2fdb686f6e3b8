"""Responses that go on from what is there, generation that ends with the first responses, and both in turn."""

import json
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch

from ppomax.engine.config import RunConfig, SamplingConfig
from ppomax.engine.config_checks import impossible_combinations
from ppomax.engine.config_models import ArchitectureConfig, ModelConfig
from ppomax.engine.config_ppo import PpoConfig
from ppomax.engine.errors import CheckpointError
from ppomax.engine.models.roles import make_role, random_reader
from ppomax.engine.models.shape import ModelShape
from ppomax.engine.parallel.device import start
from ppomax.engine.parallel.groups import make_groups
from ppomax.engine.parallel.layout import ParallelLayout
from ppomax.engine.ppo.rewards import KlController, RewardScaler
from ppomax.engine.rollout.batch import Begun
from ppomax.engine.rollout.generate import generate, request_seeds
from ppomax.engine.rollout.long_tail import Started, first_to_end
from ppomax.engine.rollout.scheduler import Scheduler
from ppomax.engine.rollout.watch import Quota
from ppomax.engine.train_ppo import TrainState

SHAPE = ModelShape(
    vocab_size=24,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_query_groups=2,
    head_dim=8,
    ffn_hidden_size=48,
    max_position_embeddings=96,
    rope_theta=10000.0,
    norm_eps=1e-6,
    tie_embeddings=False,
)
CONFIG = RunConfig(model=ModelConfig(init=ArchitectureConfig(init_std=0.15)))
# Flat enough for EOS to come after 1 to 40 tokens; the penalty sees what has begun.
SAMPLING = SamplingConfig(temperature=3.0, top_p=1, repetition_penalty=1.3, max_new_tokens=40)
EOS = 11
NUM = 24
LAYOUTS = (
    {},
    {"page_size": 1, "batch_size": 5},
    {"page_size": 4, "tokens_per_step": 7, "batch_size": 6, "steps_ahead": 4},
    {"steps_ahead": 9},
)


@pytest.fixture(scope="module")
def role():
    torch.set_num_threads(1)
    start(60)
    groups = make_groups({"policy": ParallelLayout(1, 1, 1)})["policy"]
    return make_role("policy", SHAPE, random_reader(SHAPE, CONFIG), CONFIG, groups, source="random")


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(5)
    return [tuple(torch.randint(12, 24, (1 + b * 7 % 20,), generator=generator).tolist()) for b in range(NUM)]


SEEDS = request_seeds(3, 0, NUM)


def respond(role, prompts, sampling=SAMPLING, **options):
    options = {"seeds": SEEDS, "eos_id": EOS, "pad_id": 0, **options}
    return generate(role, prompts, sampling, **options)


def responses(rollout):
    rows = (rollout.tokens, rollout.prompt_lengths, rollout.lengths)
    return [tuple(tokens[start:end]) for tokens, start, end in zip(*(x.tolist() for x in rows), strict=True)]


def logprobs_of(rollout):
    return [x[mask].tolist() for x, mask in zip(rollout.sampling_logprobs, rollout.response_mask, strict=True)]


@pytest.fixture(scope="module")
def whole(role, prompts):
    """The responses to their ends."""
    rollout = respond(role, prompts)
    lengths = rollout.response_mask.sum(1)
    assert len(lengths.unique()) > 12  # ragged
    assert 0 < rollout.finished.sum() < NUM
    assert rollout.margins[rollout.response_mask].min() > 1e-5
    return rollout


def cut(response, length):
    """The beginning of a response, with log-probs that are recognisable."""
    tokens = response[:length]
    return Begun(tokens, tuple(-float(i) / 8 for i in range(len(tokens))), finished=tokens == response)


def test_a_response_goes_on_as_if_it_had_not_stopped(role, prompts, whole):
    expected = responses(whole)
    begun = [cut(response, b * 5 % 13) for b, response in enumerate(expected)]
    begun = [replace(one, finished=one.finished and one.tokens[-1:] == (EOS,)) for one in begun]
    for changes in LAYOUTS:
        rollout = respond(role, prompts, SAMPLING.model_copy(update=changes), begun=begun)
        assert responses(rollout) == expected
        assert rollout.finished.tolist() == whole.finished.tolist()
        for ours, theirs, one in zip(logprobs_of(rollout), logprobs_of(whole), begun, strict=True):
            assert ours[: len(one.tokens)] == list(one.logprobs)
            assert ours[len(one.tokens) :] == pytest.approx(theirs[len(one.tokens) :], abs=5e-5)
    assert sum(one.finished for one in begun) > 1
    assert sum(not one.tokens for one in begun) > 1


def test_samples_of_a_prompt_may_have_begun_apart(role, prompts):
    seeds = request_seeds(4, 0, 12)
    expected = responses(respond(role, prompts[:4], seeds=seeds, samples=3, eos_id=-1))
    begun = [cut(response, (3, 0, 0, 0, 5, 0, 2, 2, 9, 0, 0, 0)[b]) for b, response in enumerate(expected)]
    sampling = SAMPLING.model_copy(update={"page_size": 4, "batch_size": 7})
    rollout = respond(role, prompts[:4], sampling, seeds=seeds, samples=3, eos_id=-1, begun=begun)
    assert responses(rollout) == expected


def test_a_stop_sequence_may_lie_across_the_seam(role, prompts):
    expected = responses(respond(role, prompts, eos_id=-1))
    stop = expected[0][5:8]
    begun = [cut(response, 6) for response in expected]
    rollout = respond(role, prompts, eos_id=-1, begun=begun, stop_sequences=[stop])
    assert responses(rollout)[0] == expected[0][:8]
    assert rollout.finished[0]


def test_the_fewest_new_tokens_count_from_the_beginning(role, prompts, whole):
    sampling = SAMPLING.model_copy(update={"min_new_tokens": 6})
    expected = responses(respond(role, prompts, sampling))
    begun = [cut(response, 3) for response in expected]
    assert responses(respond(role, prompts, sampling, begun=begun)) == expected
    assert min(map(len, expected)) >= 6 > min(map(len, responses(whole)))


def first_by_hand(drawn, num_wanted):
    """(rows that end first, tokens of the last of them) from the tokens that each would draw to its end."""
    order = sorted(range(len(drawn)), key=lambda b: (drawn[b], b))
    return sorted(order[:num_wanted]), drawn[order[num_wanted - 1]]


@pytest.mark.parametrize("num_wanted", [1, 8, 17, NUM])
def test_generation_ends_with_the_responses_that_end_first(role, prompts, whole, num_wanted):
    expected = responses(whole)
    rows, longest = first_by_hand(list(map(len, expected)), num_wanted)
    for changes in LAYOUTS:
        rollout = respond(role, prompts, SAMPLING.model_copy(update=changes), watch=partial(Quota, num_wanted))
        assert responses(rollout) == [response[:longest] for response in expected]
        ends = [whole.finished[b].item() and len(expected[b]) <= longest for b in range(NUM)]
        assert rollout.finished.tolist() == ends
        assert all(len(expected[b]) <= longest for b in rows)


def test_the_tail_is_not_decoded(role, prompts, whole, monkeypatch):
    """Of every response no more tokens than the last one wanted has, and those of two looks."""
    steps = []
    plan = Scheduler.plan

    def counting(self):
        step = plan(self)
        steps.append(0 if step is None else sum(entry.is_last for entry in step.entries))
        return step

    monkeypatch.setattr(Scheduler, "plan", counting)
    lengths = list(map(len, responses(whole)))
    _, longest = first_by_hand(lengths, 12)
    respond(role, prompts)
    all_steps, all_tokens = sum(map(bool, steps)), sum(steps)
    steps.clear()
    respond(role, prompts, watch=partial(Quota, 12))
    print(f"steps {sum(map(bool, steps))} of {all_steps}, tokens {sum(steps)} of {all_tokens}, last wanted {longest}")
    assert (all_steps, all_tokens) == (40, sum(lengths))
    assert sum(map(bool, steps)) <= longest + Quota.every < 40
    assert sum(steps) <= sum(min(length, longest + Quota.every) for length in lengths) < all_tokens


def iterate(role, prompts, num_wanted, size, changes, *, num_steps=12):
    """Iterations that carry what is left over, with the same weights; prompt b has the seed b."""
    sampling, next_prompt, carried, taken, records = SAMPLING.model_copy(update=changes), 0, [], [], []
    for step in range(num_steps):
        new = range(next_prompt, min(len(prompts), next_prompt + size - len(carried)))
        next_prompt = new.stop
        started = [*carried, *(Started(prompts[b], b, step) for b in new)]
        result = first_to_end(role, started, num_wanted, step, sampling, eos_id=EOS, pad_id=0, max_length=96)
        taken.append(list(zip(result.rollout.tokens.tolist(), responses(result.rollout), strict=True)))
        carried = [Started.from_json(json.loads(json.dumps(asdict(one)))) for one in result.rest]
        assert tuple(carried) == result.rest
        assert len(taken[-1]) == num_wanted
        records.append(result.metrics)
        if next_prompt == len(prompts):
            break
    return taken, carried, records, next_prompt


def test_carried_responses_end_as_if_they_had_not_been_carried_whatever_the_settings(role, prompts):
    many = prompts * 2
    taken, carried, records, num_started = iterate(role, many, 6, 15, {})
    expected = responses(generate(role, many, SAMPLING, seeds=torch.arange(len(many)), eos_id=EOS, pad_id=0))
    ends = [response for responses in taken for _, response in responses]
    assert len(ends) + len(carried) == num_started == len(many)
    by_seed = {one.seed: one for one in carried}
    assert sorted(ends) == sorted(expected[b] for b in range(num_started) if b not in by_seed)
    for seed, one in by_seed.items():
        assert one.begun.tokens == expected[seed][: len(one.begun.tokens)]
        assert len(one.begun.logprobs) == len(one.begun.tokens)
        assert one.begun.finished == (one.begun.tokens[-1:] == (EOS,))
    assert max(record["response_age_max"] for record in records) > 2
    assert records[0]["carried_tokens"] == 0 < records[-1]["carried_tokens"] < 1
    assert records[0]["response_age_max"] == 0
    for changes in LAYOUTS[1:]:
        other_taken, other_carried, other_records, _ = iterate(role, many, 6, 15, changes)
        assert (other_taken, other_records) == (taken, records)
        assert list(map(without_logprobs, other_carried)) == list(map(without_logprobs, carried))


def without_logprobs(one):
    return replace(one, begun=replace(one.begun, logprobs=()))


def test_of_responses_that_end_together_the_first_rows_are_taken_and_the_others_come_first_next_time(role, prompts):
    """All end with their only token, so nothing is drawn in the second iteration."""
    sampling = SAMPLING.model_copy(update={"max_new_tokens": 1})
    started = [Started(prompt, b, 0) for b, prompt in enumerate(prompts[:6])]
    options = {"eos_id": EOS, "pad_id": 0, "max_length": 96}
    first = first_to_end(role, started, 4, 0, sampling, **options)
    assert first.rollout.prompt_lengths.tolist() == [len(prompt) for prompt in prompts[:4]]
    assert [one.seed for one in first.rest] == [4, 5]
    new = Started(prompts[6], 6, 1)
    second = first_to_end(role, [*first.rest, new], 2, 1, sampling, **options)
    assert second.rollout.prompt_lengths.tolist() == [len(prompt) for prompt in prompts[4:6]]
    assert second.metrics == {
        "response_age_mean": 1,
        "response_age_max": 1,
        "carried_tokens": 1,
        "tokens_drawn_max": 0,
    }
    assert second.rest == (new,)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"over_sampling_size": 128}, "not larger than ppo.rollout_size"),
        ({"partial_rollout": True}, "ppo.over_sampling_size is 0"),
    ],
)
def test_settings_that_leave_nothing_over_are_refused(settings, fault):
    with pytest.raises(ValueError, match=fault):
        PpoConfig(**settings)


def test_only_ppo_with_the_embedded_generator_samples_more_than_it_takes():
    def faults(command, **sampling):
        config = RunConfig(ppo=PpoConfig(over_sampling_size=200), sampling=SamplingConfig(**sampling))
        return [fault for fault in impossible_combinations(config, command) if "over_sampling_size" in fault]

    assert "serve ppo alone" in faults("critic")[0]
    assert "embedded generator" in faults("ppo", backend="vllm")[0]
    assert faults("ppo") == faults("sft") == []


def test_the_state_of_an_earlier_version_is_refused():
    state = TrainState(2, 8, 24, 0, RewardScaler(2, 0.1, 0.3), KlController(0.1), (Started((1, 2), 7, 1),))
    content = json.loads(json.dumps(state.to_json()))
    assert TrainState.from_json(content) == state
    del content["carried"], content["prompt_position"]
    with pytest.raises(CheckpointError, match=r"lacks carried, prompt_position: .* earlier version"):
        TrainState.from_json(content)
