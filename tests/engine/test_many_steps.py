"""Several decoding steps in one call, against step by step: the same bits, whatever ends, waits or is drawn how."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ppomax.engine.config import SamplingConfig
from ppomax.engine.models.roles import Role, make_role, random_reader
from ppomax.engine.models.shape import ModelShape
from ppomax.engine.parallel.device import start
from ppomax.engine.parallel.groups import make_groups
from ppomax.engine.parallel.layout import ParallelLayout
from ppomax.engine.ppo.types import Rollout
from ppomax.engine.rollout.batch import Begun
from ppomax.engine.rollout.generate import generate, request_seeds
from ppomax.engine.rollout.many_steps import ManySteps
from ppomax.engine.rollout.scheduler import Scheduler
from ppomax.kernels import decoding_c, native
from tests.engine.test_generate import CONFIG, SHAPE

EOS = 11
SAMPLING = SamplingConfig(temperature=1.0, top_p=1, repetition_penalty=1, max_new_tokens=30, page_size=4)
pytestmark = pytest.mark.skipif(native.load() is None, reason="there is no C compiler")


@pytest.fixture(scope="module", autouse=True)
def _started() -> None:
    start(60)


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("PPOMAX_KERNELS", "cpu")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make(shape: ModelShape = SHAPE) -> Role:
    groups = make_groups({"policy": ParallelLayout(1, 1, 1)})["policy"]
    return make_role("policy", shape, random_reader(shape, CONFIG), CONFIG, groups, source="random")


@pytest.fixture(scope="module")
def role() -> Role:
    return make()


def prompts_of(lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(12, SHAPE.vocab_size, (length,), generator=generator).tolist() for length in lengths]


LENGTHS = (7, 1, 30, 12, 12, 3, 25, 18, 2, 9)


def seeds_of(num: int) -> Tensor:
    """Not side by side in memory: a caller may cut them out of others."""
    return request_seeds(3, 4, 2 * num)[::2]


def both_ways(
    role: Role, monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]], sampling: SamplingConfig, **options: Any
) -> tuple[Rollout, Rollout, list[int]]:
    """In one call and step by step, which is what a listener to tokens gets; and how many steps each call took."""
    seeds = seeds_of(len(prompts) * options.get("samples", 1))
    options = {"eos_id": EOS, "pad_id": 0, "seeds": seeds, **options}
    taken: list[int] = []
    run = ManySteps.run

    def noted(self: ManySteps, *given: Any) -> list[list[int]]:
        taken.append(given[-1])
        return run(self, *given)

    monkeypatch.setattr(ManySteps, "run", noted)
    together = generate(role, prompts, sampling, **options)
    num_calls = len(taken)
    alone = generate(role, prompts, sampling, on_token=lambda *_: None, **options)
    assert len(taken) == num_calls
    return together, alone, taken


def assert_same(together: Rollout, alone: Rollout) -> None:
    for name, x in vars(alone).items():
        y: Tensor = getattr(together, name)
        assert torch.equal(torch.nan_to_num(x, nan=-7.0), torch.nan_to_num(y, nan=-7.0)), name


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.7},
        {"temperature": 2.0, "top_k": 20},
        {"temperature": 1.3, "top_p": 0.8},
        {"top_p": 0.9, "top_k": 5, "min_new_tokens": 4},
        {"min_new_tokens": 9},
        {"min_new_tokens": 30},
        {"page_size": 1},
        {"page_size": 32},
        {"page_size": 5, "max_new_tokens": 34},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
    ],
    ids=lambda changes: "-".join(f"{name}={value}" for name, value in changes.items()) or "plain",
)
def test_bits_are_those_of_single_steps(role, monkeypatch, changes: dict[str, Any], threads: int) -> None:
    torch.set_num_threads(threads)
    sampling = SAMPLING.model_copy(update=changes)
    together, alone, taken = both_ways(role, monkeypatch, prompts_of(LENGTHS), sampling)
    assert_same(together, alone)
    assert bool(taken) == (sampling.max_new_tokens > 1)
    if not changes:
        assert taken == [16, 13], "all requests go on together after their prompts"
        assert 0 < together.finished.sum() < len(LENGTHS), "some end by EOS, some by their limit"


def test_a_response_that_has_ended_is_computed_no_further(role, monkeypatch) -> None:
    run, found = ManySteps.run, []

    def noted(self: ManySteps, *given: Any) -> list[list[int]]:
        found.append(run(self, *given))
        return found[-1]

    monkeypatch.setattr(ManySteps, "run", noted)
    generate(role, prompts_of(LENGTHS), SAMPLING, seeds=seeds_of(10), eos_id=EOS, pad_id=0)
    after = [tokens[tokens.index(EOS) + 1 :] for steps in found for tokens in zip(*steps, strict=True) if EOS in tokens]
    assert sum(map(len, after)) > 0
    assert not any(map(any, after)), "places behind the end stay as they were"


def test_requests_wait_share_prompts_and_have_limits_of_their_own(role, monkeypatch) -> None:
    sampling = SAMPLING.model_copy(update={"batch_size": 7, "tokens_per_step": 20, "page_size": 4})
    limits = [3 + 5 * b % 28 for b in range(30)]
    together, alone, taken = both_ways(role, monkeypatch, prompts_of(LENGTHS), sampling, samples=3, limits=limits)
    assert_same(together, alone)
    assert taken


def test_stop_sequences_and_responses_that_have_begun(role, monkeypatch) -> None:
    prompts = prompts_of(LENGTHS)
    plain = generate(role, prompts, SAMPLING, seeds=seeds_of(10), eos_id=-1, pad_id=0)
    stops = [plain.tokens[b, length + 6 : length + 8].tolist() for b, length in enumerate(LENGTHS[:4])]
    together, alone, taken = both_ways(role, monkeypatch, prompts, SAMPLING, stop_sequences=stops, eos_id=-1)
    assert_same(together, alone)
    assert together.finished[:4].all()
    assert taken
    begun = [Begun(tuple(range(13, 13 + b)), (-1.0,) * b, b == 7) for b in range(10)]
    together, alone, taken = both_ways(role, monkeypatch, prompts, SAMPLING, begun=begun)
    assert_same(together, alone)
    assert taken


def test_more_requests_than_one_call_takes_and_a_cache_without_room(role, monkeypatch) -> None:
    many = prompts_of((3,) * (decoding_c.MOST_ROWS + 5))
    sampling = SAMPLING.model_copy(update={"batch_size": 200, "max_new_tokens": 20})
    together, alone, taken = both_ways(role, monkeypatch, many, sampling)
    assert_same(together, alone)
    assert taken, "some have ended, and the others are few enough"
    tokens = 24 * 8  # of which the cache holds so many
    budget = tokens * 2 * SHAPE.num_layers * SHAPE.num_query_groups * SHAPE.head_dim * 4 / 2**30
    tight = SAMPLING.model_copy(update={"cache_gib": budget, "page_size": 8})
    preempted: list[int] = []
    plan = Scheduler.plan

    def noted(self: Scheduler) -> Any:
        step = plan(self)
        preempted.extend(() if step is None else step.preempted)
        return step

    monkeypatch.setattr(Scheduler, "plan", noted)
    together, alone, _ = both_ways(role, monkeypatch, prompts_of(LENGTHS), tight)
    assert_same(together, alone)
    assert preempted


def test_models_with_biases_tied_or_without_groups(monkeypatch) -> None:
    for changes in ({"qkv_bias": True}, {"tie_embeddings": True}, {"num_query_groups": 4}, {"num_layers": 1}):
        other = make(replace(SHAPE, **changes))
        together, alone, taken = both_ways(other, monkeypatch, prompts_of(LENGTHS), SAMPLING)
        assert_same(together, alone)
        assert taken, changes


def test_logits_that_are_no_numbers_do_as_in_single_steps(monkeypatch) -> None:
    role = make()
    for value in (torch.nan, torch.inf):
        with torch.no_grad():
            role.stage.vocabulary_weight()[40] = value
        together, alone, taken = both_ways(role, monkeypatch, prompts_of(LENGTHS), SAMPLING)
        assert_same(together, alone)
        assert taken


def test_what_needs_a_look_between_steps_goes_step_by_step(role, monkeypatch) -> None:
    penalised = SAMPLING.model_copy(update={"repetition_penalty": 1.2})
    for sampling, options in ((penalised, {}), (SAMPLING, {"watch": lambda *_: Nobody()})):
        *_, taken = both_ways(role, monkeypatch, prompts_of(LENGTHS), sampling, **options)
        assert not taken
    monkeypatch.setattr(decoding_c, "CACHED_BYTES", 0)
    *_, taken = both_ways(role, monkeypatch, prompts_of(LENGTHS), SAMPLING)
    assert not taken


class Nobody:
    """Looks and does nothing."""

    every, goes_on = 1, False

    def look(self, flights: Any) -> None:
        pass
