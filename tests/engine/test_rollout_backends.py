"""What every rollout backend promises: the embedded engine, and transformers as the oracle.

vLLM is compared with the embedded engine in tests/vllm.
"""

import threading
from dataclasses import replace

import pytest
import torch
import transformers

from ppomax.engine.config import RunConfig, SamplingConfig, TrainConfig
from ppomax.engine.config_checks import impossible_combinations
from ppomax.engine.config_models import ArchitectureConfig, ModelConfig
from ppomax.engine.errors import DataError
from ppomax.engine.models.hf_checkpoint import load_weights
from ppomax.engine.models.hf_export import export_weights
from ppomax.engine.models.roles import make_role, random_reader
from ppomax.engine.models.shape import ModelShape
from ppomax.engine.parallel.device import start
from ppomax.engine.parallel.groups import make_groups
from ppomax.engine.parallel.layout import ParallelLayout
from ppomax.engine.rollout.backend import Completion, RolloutRequest, as_rollout, finished_early
from ppomax.engine.rollout.embedded import EmbeddedBackend
from ppomax.engine.rollout.flight import Flight
from ppomax.engine.rollout.generate import generate
from ppomax.kernels.sampling import sample_with_margins

EOS, MAX_LENGTH, NEW_TOKENS = 7, 60, 10
SHAPE = ModelShape(
    vocab_size=97,
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    num_query_groups=2,
    head_dim=16,
    ffn_hidden_size=96,
    max_position_embeddings=64,
    rope_theta=10000.0,
    norm_eps=1e-6,
    tie_embeddings=False,
)
GREEDY = SamplingConfig(temperature=0, top_p=1, repetition_penalty=1)
PAPER = SamplingConfig(temperature=0.8, top_p=0.9, repetition_penalty=1.3)
TOP_K = SamplingConfig(temperature=1.5, top_p=1, top_k=20, repetition_penalty=1, min_new_tokens=6)


class TransformersBackend:
    """A RolloutBackend on a Llama of transformers, without cache: one request, one forward pass per token."""

    def __init__(self):
        config = transformers.LlamaConfig(
            vocab_size=SHAPE.vocab_size,
            hidden_size=SHAPE.hidden_size,
            intermediate_size=SHAPE.ffn_hidden_size,
            num_hidden_layers=SHAPE.num_layers,
            num_attention_heads=SHAPE.num_heads,
            num_key_value_heads=SHAPE.num_query_groups,
            head_dim=SHAPE.head_dim,
            max_position_embeddings=SHAPE.max_position_embeddings,
            rms_norm_eps=SHAPE.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": SHAPE.rope_theta},
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
        self.model = transformers.LlamaForCausalLM(config).eval()
        self.version, self.aborted = 0, set()

    def setup(self): ...

    def load(self, named_tensors, version):
        self.model.load_state_dict(dict(named_tensors))
        self.version = version

    def generate(self, requests):
        completions = [self.complete(request) for request in requests]
        self.aborted.clear()
        return completions

    def abort(self, ids):
        self.aborted.update(ids)

    def sleep(self, level): ...

    def wake(self): ...

    def close(self): ...

    @torch.no_grad()
    def complete(self, request):
        limits = {"vocab_size": SHAPE.vocab_size, "context": MAX_LENGTH, "version": self.version}
        early = finished_early(request, aborted=self.aborted, **limits)
        if early is not None:
            return early
        tokens, logprobs, reason = list(request.prompt), [], "length"
        while reason == "length" and len(logprobs) < request.max_new_tokens and len(tokens) < MAX_LENGTH:
            logits = self.model(torch.tensor([tokens])).logits[:, -1]
            tokens.append(self.draw(logits, tokens[len(request.prompt) :], len(tokens), request))
            logprobs.append(logits.log_softmax(-1)[0, tokens[-1]].item())
            if len(logprobs) >= request.sampling.min_new_tokens:
                response = tokens[len(request.prompt) :]
                if any(response[-len(stop) :] == list(stop) for stop in request.stop_sequences):
                    reason = "stop"
                if tokens[-1] == EOS:
                    reason = "eos"
        return Completion(tuple(tokens[len(request.prompt) :]), tuple(logprobs), reason, self.version)

    @staticmethod
    def draw(logits, response, position, request):
        sampling = request.sampling
        seen, banned = torch.zeros(2, 1, SHAPE.vocab_size, dtype=torch.bool)
        seen[0, response] = True
        banned[0, EOS] = len(response) + 1 < sampling.min_new_tokens
        return sample_with_margins(
            logits,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
            seen=seen,
            banned=banned,
            seeds=torch.tensor([request.seed]),
            positions=torch.tensor([position]),
        ).tokens.item()


def weights(seed):
    """Far larger than those that training starts from: logits differ clearly, so no draw is close to a tie."""
    init = ArchitectureConfig(init_std=0.15)
    return RunConfig(model=ModelConfig(init=init), train=TrainConfig(seed=seed))


@pytest.fixture(scope="module")
def role():
    torch.set_num_threads(1)
    start(60)
    groups = make_groups({"policy": ParallelLayout(1, 1, 1)})["policy"]
    return make_role("policy", SHAPE, random_reader(SHAPE, weights(1)), weights(1), groups, source="random")


@pytest.fixture
def load(role):
    """Gives the policy the weights of a seed, and a backend the policy's."""

    def load(backend, seed):
        load_weights(role.stage, random_reader(SHAPE, weights(seed)), "random")
        backend.load(export_weights(role.chunks, SHAPE, role.groups, torch.float32, everywhere=True), version=seed)

    return load


@pytest.fixture
def embedded(role, load):
    backend = EmbeddedBackend(role, eos_id=EOS, max_length=MAX_LENGTH)
    backend.setup()
    load(backend, 1)
    return backend


@pytest.fixture
def oracle(load):
    backend = TransformersBackend()
    load(backend, 1)
    return backend


@pytest.fixture(params=["embedded", "transformers"])
def backend(request):
    return request.getfixturevalue("embedded" if request.param == "embedded" else "oracle")


def requests_with(*settings):
    """Two ragged prompts per setting, interleaved."""
    generator = torch.Generator().manual_seed(5)
    lengths = (7, 1, 30, 12, 3, 25, 18, 55)[: 2 * max(4, len(settings))]
    prompts = [torch.randint(8, SHAPE.vocab_size, (length,), generator=generator).tolist() for length in lengths]
    return [
        RolloutRequest(10 + i, tuple(prompt), settings[i % len(settings)], 100 + i, NEW_TOKENS)
        for i, prompt in enumerate(prompts)
    ]


def assert_equal(ours, theirs):
    for completion, other in zip(ours, theirs, strict=True):
        assert replace(completion, logprobs=()) == replace(other, logprobs=())
        assert completion.logprobs == pytest.approx(other.logprobs, abs=5e-5)


def reasons(completions):
    return [completion.finish_reason for completion in completions]


def test_embedded_completions_are_those_of_the_oracle(embedded, oracle):
    """Requests of one call may have settings, limits and stop sequences of their own."""
    requests = requests_with(GREEDY, PAPER, TOP_K)
    greedy = oracle.generate(requests)[0].tokens
    requests[0] = replace(requests[0], stop_sequences=((1, 2, 3), greedy[4:6]))
    requests[3] = replace(requests[3], max_new_tokens=3)
    ours = embedded.generate(requests)
    assert_equal(ours, oracle.generate(requests))
    assert ours[0].tokens == greedy[:6]
    assert reasons(ours)[0] == "stop"
    assert len(ours[3].tokens) == 3
    assert len(ours[7].tokens) == 5  # a prompt of 55 in a context of 60


def test_a_response_ends_with_eos(backend):
    almost_uniform = TOP_K.model_copy(update={"temperature": 8.0, "top_k": 0})
    requests = [replace(request, max_new_tokens=40) for request in requests_with(almost_uniform)]
    ended = [c for c in backend.generate(requests) if c.finish_reason == "eos"]
    assert ended
    for completion in ended:
        assert completion.tokens.index(EOS) == len(completion.tokens) - 1
        assert len(completion.tokens) >= TOP_K.min_new_tokens


def test_company_changes_nothing(backend):
    requests = requests_with(GREEDY, PAPER)
    together = backend.generate(requests)
    assert_equal(backend.generate(list(reversed(requests))), list(reversed(together)))
    assert_equal([backend.generate([request])[0] for request in requests], together)


def test_bad_requests_fail_alone(backend):
    good = requests_with(GREEDY)
    bad = [replace(good[0], id=90 + i, prompt=p) for i, p in enumerate([(), (9,) * MAX_LENGTH, (9, 97), (-1,)])]
    bad += [replace(good[0], id=94, seed=2**63), replace(good[0], id=95, seed=-1)]
    completions = backend.generate([good[0], *bad, *good[1:]])
    assert reasons(completions[1:7]) == ["error"] * 6
    words = ("request 90: .* empty", "request 91: .* 60 tokens", "token id 97 .* 97 tokens", "token id -1 ")
    words += ("seed is 9223372036854775808", "seed is -1")
    for completion, message in zip(completions[1:7], words, strict=True):
        assert completion.tokens == ()
        with pytest.raises(DataError, match=message):
            as_rollout(good[:1], [completion], pad_id=0, device=torch.device("cpu"))
    assert_equal([completions[0], *completions[7:]], backend.generate(good))


def test_no_new_tokens_are_an_empty_response(backend):
    requests = [replace(request, max_new_tokens=0) for request in requests_with(GREEDY)]
    assert {(c.tokens, c.finish_reason) for c in backend.generate(requests)} == {((), "length")}


def test_aborted_requests_do_not_run_and_abort_holds_for_one_call(backend):
    requests = requests_with(GREEDY)
    whole = backend.generate(requests)
    backend.abort([11, 13])
    completions = backend.generate(requests)
    assert [b for b, reason in enumerate(reasons(completions)) if reason == "abort"] == [1, 3]
    assert_equal([completions[0], completions[2]], [whole[0], whole[2]])
    assert_equal(backend.generate(requests), whole)


@pytest.mark.parametrize("steps_ahead", [0, 3])
def test_running_requests_can_be_aborted_from_another_thread(embedded, steps_ahead, monkeypatch):
    """They end with what they have; those of the same call that have not started end without tokens."""
    paper = PAPER.model_copy(update={"steps_ahead": steps_ahead, "batch_size": 3})
    requests = [replace(request, max_new_tokens=30) for request in requests_with(paper)]
    requests[6] = replace(requests[6], sampling=TOP_K)  # runs after the others
    whole = embedded.generate(requests)
    launches = []
    launch = Flight.launch

    def aborting(self):
        launches.append(self)
        if len(launches) == 7:
            thread = threading.Thread(target=embedded.abort, args=([10, 12, 15, 16],))
            thread.start()
            thread.join()
        return launch(self)

    monkeypatch.setattr(Flight, "launch", aborting)
    completions = embedded.generate(requests)
    aborted = [b for b, completion in enumerate(completions) if completion.finish_reason == "abort"]
    # Longest prompts first: request 15, with a prompt of 18, is among those that wait.
    assert set(aborted) <= {0, 2, 5, 6}
    assert {2, 6} <= set(aborted)
    for b, (completion, other) in enumerate(zip(completions, whole, strict=True)):
        if b in aborted:
            assert completion.tokens == other.tokens[: len(completion.tokens)]
            assert len(completion.logprobs) == len(completion.tokens) < min(7, len(other.tokens))
        else:
            assert_equal([completion], [other])
    assert len(completions[2].tokens) >= 6 - steps_ahead
    monkeypatch.undo()
    assert_equal(embedded.generate(requests), whole)


def test_the_weights_are_those_of_the_last_load(backend, load):
    requests = requests_with(GREEDY)
    first = backend.generate(requests)
    load(backend, 2)
    second = backend.generate(requests)
    assert [c.tokens for c in first] != [c.tokens for c in second]
    assert [{c.weight_version for c in completions} for completions in (first, second)] == [{1}, {2}]
    load(backend, 1)
    assert_equal(backend.generate(requests), first)


@pytest.mark.parametrize("level", [1, 2])
def test_it_generates_as_before_after_sleep(backend, load, level):
    requests = requests_with(PAPER)
    before = backend.generate(requests)
    backend.sleep(level)
    backend.wake()
    load(backend, 1)
    assert_equal(backend.generate(requests), before)


def test_the_completions_make_the_rollout_of_the_generator(role, embedded):
    requests = requests_with(PAPER)
    rollout = as_rollout(requests, embedded.generate(requests), pad_id=0, device=role.device)
    expected = generate(
        role,
        [request.prompt for request in requests],
        PAPER.model_copy(update={"max_new_tokens": NEW_TOKENS}),
        seeds=torch.tensor([request.seed for request in requests]),
        eos_id=EOS,
        pad_id=0,
        max_length=MAX_LENGTH,
    )
    for name, tensor in vars(rollout).items():
        if name != "margins":
            assert torch.equal(tensor, getattr(expected, name)), name


def test_one_bad_request_among_ten_thousand_fails_alone(embedded):
    request = RolloutRequest(0, (9,), GREEDY.model_copy(update={"batch_size": 2000}), 1, 1)
    requests = [replace(request, id=i, prompt=(8 + i % 80, 9)) for i in range(10_000)]
    requests[4321] = replace(requests[4321], prompt=())
    completions = embedded.generate(requests)
    assert reasons(completions) == ["length"] * 4321 + ["error"] + ["length"] * 5678
    assert completions[0].tokens == completions[80].tokens == completions[8000].tokens


def test_vllm_is_asked_for_only_where_it_is_installed_and_used(monkeypatch):
    config = RunConfig(sampling=SamplingConfig(backend="vllm"))

    def faults(command):
        return [fault for fault in impossible_combinations(config, command) if "sampling.backend" in fault]

    monkeypatch.setattr("ppomax.engine.config_checks.find_spec", lambda name: None)
    assert [len(faults(command)) for command in ("sft", "ppo", "evaluate")] == [0, 1, 1]
    assert r"install ppomax[vllm]" in faults("ppo")[0]
    monkeypatch.setattr("ppomax.engine.config_checks.find_spec", lambda name: object())
    assert faults("ppo") == []
    assert "serves critic, ppo and evaluate" in faults("generate")[0]


def test_a_request_that_the_cache_cannot_hold_fails_alone(embedded):
    """A page of 8 tokens takes 8 x 3 layers x 2 groups x 16 numbers x 2 x 4 bytes = 6 KiB: there is room for two."""
    small = GREEDY.model_copy(update={"page_size": 8, "cache_gib": 2 * 6144 / 2**30})
    prompts = [(5, 6), tuple(range(1, 17)), (7, 8, 9)]
    requests = [RolloutRequest(i, prompt, small, seed=i, max_new_tokens=4) for i, prompt in enumerate(prompts)]
    completions = embedded.generate(requests)
    assert [completion.finish_reason for completion in completions] == ["length", "error", "length"]
    assert "20 tokens needs 3 pages of 8 tokens" in completions[1].message
    whole = embedded.generate([replace(request, sampling=GREEDY) for request in requests])
    assert [completions[i].tokens for i in (0, 2)] == [whole[i].tokens for i in (0, 2)]


def test_vllm_is_refused_where_the_policy_is_not_on_all_ranks() -> None:
    def faults(role: str) -> list[str]:
        config = RunConfig.model_validate({"sampling": {"backend": "vllm"}, "parallel": {role: {"num_ranks": 1}}})
        return [fault for fault in impossible_combinations(config, "ppo") if "must be all ranks" in fault]

    assert len(faults("policy")) == 1
    assert faults("critic") == []
