"""Generation in one process, compared with transformers and with forward passes that have no cache."""

from dataclasses import replace

import pytest
import torch
import transformers
from torch import Tensor

from ppomax.engine.config import RunConfig, SamplingConfig
from ppomax.engine.config_models import ArchitectureConfig, ModelConfig
from ppomax.engine.data.batches import last_token_rows, make_packs
from ppomax.engine.errors import DataError, DoesNotFitError
from ppomax.engine.models.roles import Role, make_role, random_reader
from ppomax.engine.models.shape import ModelShape
from ppomax.engine.parallel.device import start
from ppomax.engine.parallel.groups import make_groups
from ppomax.engine.parallel.layout import ParallelLayout
from ppomax.engine.ppo.types import Rollout
from ppomax.engine.rollout import paged_cache
from ppomax.engine.rollout.generate import _free_memory, generate, request_seeds
from ppomax.engine.rollout.inference import InferenceStage
from ppomax.engine.rollout.scheduler import Scheduler
from ppomax.kernels import native
from ppomax.kernels.decoding_c import decode
from ppomax.kernels.sampling import sample_with_margins

PAD, NO_EOS = 0, -1
SHAPE = ModelShape(
    vocab_size=97,
    hidden_size=64,
    num_layers=4,
    num_heads=4,
    num_query_groups=2,
    head_dim=16,
    ffn_hidden_size=96,
    max_position_embeddings=64,
    rope_theta=10000.0,
    norm_eps=1e-6,
    tie_embeddings=False,
)
# Weights far larger than those that training starts from: logits differ clearly, so no draw is close to a tie.
CONFIG = RunConfig(model=ModelConfig(init=ArchitectureConfig(init_std=0.15)))
GREEDY = SamplingConfig(temperature=0, top_p=1, repetition_penalty=1, max_new_tokens=12)
PAPER = SamplingConfig(temperature=0.8, top_p=0.9, repetition_penalty=1.3, max_new_tokens=12)
TOP_K = SamplingConfig(temperature=1.5, top_p=1, top_k=20, repetition_penalty=1, max_new_tokens=12)
SETTINGS = pytest.mark.parametrize("sampling", [GREEDY, PAPER, TOP_K], ids=["greedy", "paper", "top_k"])


@pytest.fixture(scope="module")
def role() -> Role:
    torch.set_num_threads(1)
    start(60)
    groups = make_groups({"policy": ParallelLayout(1, 1, 1)})["policy"]
    return make_role("policy", SHAPE, random_reader(SHAPE, CONFIG), CONFIG, groups, source="random")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Ragged prompts, of one token up to 30, in no order of length."""
    generator = torch.Generator().manual_seed(5)
    lengths = [7, 1, 30, 12, 12, 3, 25, 18, 2, 9]
    return [torch.randint(SHAPE.vocab_size, (length,), generator=generator).tolist() for length in lengths]


def respond(
    role: Role, prompts: list[list[int]], sampling: SamplingConfig, *, seeds: Tensor | None = None, eos_id: int = NO_EOS
) -> Rollout:
    seeds = request_seeds(1, 2, len(prompts)) if seeds is None else seeds
    return generate(role, prompts, sampling, seeds=seeds, eos_id=eos_id, pad_id=PAD)


def responses(rollout: Rollout) -> list[list[int]]:
    spans = zip(rollout.tokens.tolist(), rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), strict=True)
    return [tokens[start:end] for tokens, start, end in spans]


def transformers_model(role: Role) -> transformers.LlamaForCausalLM:
    """The same weights in transformers."""
    config = transformers.LlamaConfig(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.hidden_size,
        intermediate_size=SHAPE.ffn_hidden_size,
        num_hidden_layers=SHAPE.num_layers,
        num_attention_heads=SHAPE.num_heads,
        num_key_value_heads=SHAPE.num_query_groups,
        head_dim=SHAPE.head_dim,
        max_position_embeddings=SHAPE.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": SHAPE.rope_theta},
        rms_norm_eps=SHAPE.norm_eps,
        tie_word_embeddings=SHAPE.tie_embeddings,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    reader = random_reader(SHAPE, CONFIG)
    model.load_state_dict({name: reader.read(name) for name in reader.sizes})
    return model


@torch.no_grad()
def respond_without_cache(
    role: Role, prompts: list[list[int]], sampling: SamplingConfig, seeds: Tensor
) -> list[list[int]]:
    """Every token from a forward pass over the whole sequence before it; no response ends early."""
    generated: list[list[int]] = [[] for _ in prompts]
    for _ in range(sampling.max_new_tokens):
        sequences = [torch.tensor(prompt + new) for prompt, new in zip(prompts, generated, strict=True)]
        lengths = [sequence.numel() for sequence in sequences]
        (pack,) = make_packs(sequences, last_token_rows(lengths), [range(len(prompts))])
        seen = torch.zeros(len(prompts), SHAPE.vocab_size, dtype=torch.bool)
        for row, new in zip(seen, generated, strict=True):
            row[new] = True
        tokens = sample_with_margins(
            role.stage(pack) @ role.stage.vocabulary_weight().T,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
            seen=seen,
            seeds=seeds,
            positions=torch.tensor(lengths),
        ).tokens
        for new, token in zip(generated, tokens.tolist(), strict=True):
            new.append(token)
    return generated


def test_greedy_responses_equal_those_of_transformers(role, prompts):
    model = transformers_model(role)
    ours = responses(respond(role, prompts, GREEDY))
    for prompt, response in zip(prompts, ours, strict=True):
        expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=GREEDY.max_new_tokens)
        assert response == expected[0, len(prompt) :].tolist()


@SETTINGS
def test_responses_equal_those_without_a_cache(role, prompts, sampling):
    seeds = request_seeds(1, 2, len(prompts))
    rollout = respond(role, prompts, sampling)
    assert rollout.margins[rollout.response_mask].min() > 1e-4  # no tie: equality is no matter of luck
    assert responses(rollout) == respond_without_cache(role, prompts, sampling, seeds)


@SETTINGS
def test_sampling_logprobs_are_of_the_unmodified_distribution(role, prompts, sampling):
    rollout = respond(role, prompts, sampling)
    mask = rollout.response_mask
    # Right padding is invisible under a causal mask.
    with torch.no_grad():
        logits = transformers_model(role)(rollout.tokens).logits
    expected = logits[:, :-1].log_softmax(-1).gather(2, rollout.tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(rollout.sampling_logprobs[mask], expected[mask], atol=5e-5, rtol=0)
    assert not rollout.sampling_logprobs[~mask].any()


def test_a_rollout_is_laid_out_as_its_lengths_say(role, prompts):
    rollout = respond(role, prompts, PAPER)
    num_rows, width = rollout.tokens.shape
    assert (num_rows, width) == (len(prompts), max(map(len, prompts)) + PAPER.max_new_tokens)
    assert rollout.response_mask.sum(1).tolist() == (rollout.lengths - rollout.prompt_lengths).tolist()
    for tokens, prompt, response in zip(rollout.tokens.tolist(), prompts, responses(rollout), strict=True):
        assert tokens == prompt + response + [PAD] * (width - len(prompt) - len(response))


@pytest.mark.parametrize("num_slots", [1, 3, 8])
def test_responses_do_not_depend_on_the_slots(role, prompts, num_slots):
    eos_id = responses(respond(role, prompts, PAPER))[0][3]  # some responses end early, so that slots change hands
    whole = respond(role, prompts, PAPER, eos_id=eos_id)
    few = respond(role, prompts, PAPER.model_copy(update={"batch_size": num_slots}), eos_id=eos_id)
    assert len(set((whole.lengths - whole.prompt_lengths).tolist())) > 1
    assert responses(few) == responses(whole)
    assert few.finished.tolist() == whole.finished.tolist()
    torch.testing.assert_close(few.sampling_logprobs, whole.sampling_logprobs, atol=2e-5, rtol=0)


def test_responses_do_not_depend_on_the_order_of_the_prompts(role, prompts):
    seeds = request_seeds(1, 2, len(prompts))
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(3))
    shuffled = respond(role, [prompts[b] for b in order], PAPER, seeds=seeds[order])
    expected = responses(respond(role, prompts, PAPER, seeds=seeds))
    assert responses(shuffled) == [expected[b] for b in order]


def test_a_response_does_not_depend_on_the_rest_of_the_batch(role, prompts):
    seeds = request_seeds(1, 2, len(prompts))
    expected = responses(respond(role, prompts, PAPER, seeds=seeds))
    for b in (1, 2, 5):
        assert responses(respond(role, [prompts[b]], PAPER, seeds=seeds[b : b + 1])) == [expected[b]]


def test_a_response_ends_with_the_first_eos(role, prompts):
    unending = responses(respond(role, prompts, PAPER))
    eos_id = unending[4][5]
    rollout = respond(role, prompts, PAPER, eos_id=eos_id)
    for response, longer, finished in zip(responses(rollout), unending, rollout.finished.tolist(), strict=True):
        assert finished == (eos_id in longer)
        assert response == (longer[: longer.index(eos_id) + 1] if finished else longer)


def test_eos_can_be_the_only_token(role, prompts):
    eos_id = responses(respond(role, prompts, GREEDY))[2][0]
    rollout = respond(role, prompts, GREEDY, eos_id=eos_id)
    assert responses(rollout)[2] == [eos_id]
    assert rollout.finished[2]
    assert rollout.response_mask[2].nonzero().tolist() == [[len(prompts[2]) - 1]]


def test_one_new_token_is_the_first_of_many(role, prompts):
    many = responses(respond(role, prompts, PAPER))
    one = respond(role, prompts, PAPER.model_copy(update={"max_new_tokens": 1}))
    assert responses(one) == [response[:1] for response in many]
    assert not one.finished.any()


def test_the_repetition_penalty_spares_the_prompt(role):
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randperm(SHAPE.vocab_size, generator=generator)[:50].tolist() for _ in range(8)]
    one_token = GREEDY.model_copy(update={"max_new_tokens": 1})
    expected = responses(respond(role, prompts, one_token))
    assert any(response[0] in prompt for prompt, response in zip(prompts, expected, strict=True))
    assert responses(respond(role, prompts, one_token.model_copy(update={"repetition_penalty": 50.0}))) == expected


def test_the_repetition_penalty_makes_responses_repeat_less(role, prompts):
    def num_repeats(sampling: SamplingConfig) -> int:
        return sum(len(response) - len(set(response)) for response in responses(respond(role, prompts, sampling)))

    long = GREEDY.model_copy(update={"max_new_tokens": 30})
    assert num_repeats(long.model_copy(update={"repetition_penalty": 50.0})) == 0 < num_repeats(long)


@pytest.mark.parametrize("max_length", [None, 40])
def test_a_response_ends_where_the_context_is_full(role, prompts, max_length):
    context = max_length or SHAPE.max_position_embeddings
    sampling = PAPER.model_copy(update={"max_new_tokens": 1000})
    seeds = request_seeds(0, 0, len(prompts))
    rollout = generate(role, prompts, sampling, seeds=seeds, eos_id=NO_EOS, pad_id=PAD, max_length=max_length)
    assert rollout.lengths.tolist() == [context] * len(prompts)
    assert not rollout.finished.any()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], r"prompt 1 is empty"),
        ([1] * 64, r"prompt 1 has 64 tokens, .* context of 64"),
        ([1] * 80, r"prompt 1 has 80 tokens, .* context of 64"),
    ],
    ids=["empty", "fills_the_context", "exceeds_the_context"],
)
def test_a_prompt_without_room_is_refused(role, bad, message):
    with pytest.raises(DataError, match=message):
        respond(role, [[1, 2], bad], GREEDY)


def test_no_prompts_are_refused(role):
    with pytest.raises(DataError, match="no prompts"):
        respond(role, [], GREEDY)


def test_generation_follows_the_weights_and_leaves_no_trace(role, prompts):
    before = responses(respond(role, prompts, GREEDY))
    weight = role.stage.vocabulary_weight()
    original = weight.clone()
    weight.data.copy_(original.roll(1, dims=0))
    changed = responses(respond(role, prompts, GREEDY))
    weight.data.copy_(original)
    assert [response[0] for response in changed] == [(response[0] + 1) % SHAPE.vocab_size for response in before]
    assert responses(respond(role, prompts, GREEDY)) == before


def test_a_rollout_can_enter_autograd(role, prompts):
    rollout = respond(role, prompts, PAPER)
    scale = torch.ones((), requires_grad=True)
    (rollout.sampling_logprobs * scale).sum().backward()
    torch.testing.assert_close(scale.grad, rollout.sampling_logprobs.sum())


def test_request_seeds_differ_in_every_argument():
    seeds = torch.stack(
        [request_seeds(run, step, 500, sample=n) for run in range(2) for step in range(3) for n in range(2)]
    )
    assert seeds.unique().numel() == seeds.numel()
    assert (seeds >= 0).all()
    # Each of the 63 bits is set in about half of the 6000 seeds: 0.5 +- 6 standard deviations.
    shares = torch.stack([(seeds >> bit & 1).float().mean() for bit in range(63)])
    assert ((shares - 0.5).abs() < 6 * 0.5 / seeds.numel() ** 0.5).all()


def test_request_seeds_of_more_prompts_begin_with_those_of_fewer():
    assert request_seeds(7, 3, 5).tolist() == request_seeds(7, 3, 9)[:5].tolist()


def test_page_sizes_chunks_and_stop_checks_change_no_token(role, prompts):
    eos_id = responses(respond(role, prompts, PAPER))[0][3]
    expected = responses(respond(role, prompts, PAPER, eos_id=eos_id))
    for changes in (
        {"page_size": 1},
        {"page_size": 4, "tokens_per_step": 5, "batch_size": 4},
        {"page_size": 64, "tokens_per_step": 16, "batch_size": 3},
        {"page_size": 8, "steps_ahead": 2},
        {"page_size": 4, "tokens_per_step": 7, "batch_size": 6, "steps_ahead": 4},
    ):
        rollout = respond(role, prompts, PAPER.model_copy(update=changes), eos_id=eos_id)
        assert responses(rollout) == expected, changes
        assert rollout.finished.any()
        assert not rollout.finished.all()


def cache_gib(num_pages: int, page_size: int) -> float:
    bytes_per_token = 2 * SHAPE.num_layers * SHAPE.num_query_groups * SHAPE.head_dim * 4
    return num_pages * page_size * bytes_per_token / 2**30


def test_a_full_cache_preempts_and_changes_no_token(role, prompts, monkeypatch):
    preempted = []
    plan = Scheduler.plan

    def noting(self):
        step = plan(self)
        preempted.extend(() if step is None else step.preempted)
        return step

    monkeypatch.setattr(Scheduler, "plan", noting)
    expected = responses(respond(role, prompts, PAPER))
    assert not preempted
    # 42 tokens at most: 11 pages for the longest request.
    small = PAPER.model_copy(update={"page_size": 4, "cache_gib": cache_gib(13, 4)})
    assert responses(respond(role, prompts, small)) == expected
    assert preempted


def test_a_cache_too_small_for_one_request_is_refused_with_the_numbers(role, prompts):
    small = PAPER.model_copy(update={"page_size": 4, "cache_gib": cache_gib(10, 4)})
    with pytest.raises(DoesNotFitError, match="10"):
        respond(role, prompts, small)


def test_several_samples_of_a_prompt_are_those_of_prompts_side_by_side(role, prompts):
    repeated = [prompt for prompt in prompts for _ in range(3)]
    seeds = request_seeds(5, 0, len(repeated))
    expected = generate(role, repeated, PAPER, seeds=seeds, eos_id=NO_EOS, pad_id=PAD)
    for changes in ({}, {"page_size": 4, "tokens_per_step": 9, "batch_size": 5}, {"page_size": 8, "batch_size": 2}):
        sampling = PAPER.model_copy(update=changes)
        shared = generate(role, prompts, sampling, seeds=seeds, eos_id=NO_EOS, pad_id=PAD, samples=3)
        assert responses(shared) == responses(expected)
    assert len({tuple(response) for response in responses(expected)}) > len(prompts)


def test_every_request_may_have_a_limit_of_its_own(role, prompts):
    limits = [0, 1, 5, 12, 3, 7, 0, 2, 12, 4]
    seeds = request_seeds(1, 2, len(prompts))
    rollout = generate(role, prompts, PAPER, seeds=seeds, eos_id=NO_EOS, pad_id=PAD, limits=limits)
    whole = responses(respond(role, prompts, PAPER))
    assert responses(rollout) == [response[:limit] for response, limit in zip(whole, limits, strict=True)]


def test_a_stop_sequence_ends_a_response_and_is_kept(role, prompts):
    whole = responses(respond(role, prompts, PAPER))
    stop = whole[4][3:5]
    seeds = request_seeds(1, 2, len(prompts))
    rollout = generate(role, prompts, PAPER, seeds=seeds, eos_id=NO_EOS, pad_id=PAD, stop_sequences=[stop])
    assert responses(rollout)[4][-2:] == stop
    for response, longer, finished in zip(responses(rollout), whole, rollout.finished.tolist(), strict=True):
        assert response == longer[: len(response)]
        assert finished == (response[-2:] == stop)


def test_eos_is_not_drawn_before_the_fewest_new_tokens(role, prompts):
    eos_id = responses(respond(role, prompts, PAPER))[4][0]
    assert respond(role, prompts, PAPER, eos_id=eos_id).response_mask.sum(1).min() == 1
    sampling = PAPER.model_copy(update={"min_new_tokens": 6})
    rollout = respond(role, prompts, sampling, eos_id=eos_id)
    assert rollout.response_mask.sum(1).min() >= 6
    assert all(eos_id not in response[:5] for response in responses(rollout))


def test_tokens_are_told_as_they_come(role, prompts):
    told: dict[int, list[int]] = {b: [] for b in range(len(prompts))}
    seeds = request_seeds(1, 2, len(prompts))
    eos_id = responses(respond(role, prompts, PAPER))[0][3]
    rollout = generate(
        role,
        prompts,
        PAPER.model_copy(update={"steps_ahead": 2}),
        seeds=seeds,
        eos_id=eos_id,
        pad_id=PAD,
        on_token=lambda row, token: told[row].append(token),
    )
    assert list(told.values()) == responses(rollout)


def test_memory_that_torch_keeps_is_free_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a step of training torch keeps nearly all of a GPU, though hardly any of it is in use."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 75)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    assert _free_memory(torch.device("cuda")) == 46


@pytest.mark.parametrize("has_bias", [False, True])
def test_layers_in_one_call_give_the_bits_of_one_operation_after_another(
    role: Role, prompts: list[list[int]], has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PPOMAX_KERNELS", "cpu")
    if native.load() is None:
        pytest.skip(reason="there is no C compiler")
    shape = replace(SHAPE, qkv_bias=has_bias)
    role = make_role("policy", shape, random_reader(shape, CONFIG), CONFIG, role.groups, source="random")
    if has_bias:
        for layer in role.chunks[0].decoder.layers:
            torch.nn.init.normal_(layer.self_attention.linear_qkv.bias, generator=torch.Generator().manual_seed(3))
    calls = []
    monkeypatch.setattr(paged_cache, "decode", lambda *given, **more: (calls.append(1), decode(*given, **more)))
    together = respond(role, prompts, PAPER)
    assert calls
    monkeypatch.setattr(InferenceStage, "_together", lambda *_: None)
    one_by_one = respond(role, prompts, PAPER)
    assert together.tokens.equal(one_by_one.tokens)
    assert together.sampling_logprobs.equal(one_by_one.sampling_logprobs)
