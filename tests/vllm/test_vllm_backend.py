"""vLLM in the processes of a policy that is spread over two ranks, compared with the embedded engine.

`vllm_worker.py` runs both, in the environment that `make test-vllm` makes; this file compares.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("vllm_worker.py")
LAYOUTS = ("tp2", "pp2", "dp2")
SECONDS = 500

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed here: make test-vllm"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{layout: one {case: (completions of vLLM, those expected)} per rank}."""
    folder = tmp_path_factory.mktemp("vllm")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*launcher, str(WORKER), str(folder)],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return {layout: torch.load(folder / f"{layout}.pt", weights_only=True) for layout in LAYOUTS}


@pytest.fixture(params=LAYOUTS)
def cases(results, request):
    return results[request.param][0]


def assert_equal(pair):
    ours, expected = pair
    for completion, other in zip(ours, expected, strict=True):
        assert completion["tokens"] == other["tokens"]
        assert completion["finish_reason"] == other["finish_reason"]
        assert completion["logprobs"] == pytest.approx(other["logprobs"], abs=5e-5)


def reasons(completions):
    return [completion["finish_reason"] for completion in completions]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_gets_the_same_completions(results, layout):
    assert results[layout][0] == results[layout][1]


@pytest.mark.parametrize("case", ["greedy", "penalised", "stop", "at least", "nothing"])
def test_greedy_completions_are_those_of_the_embedded_engine(cases, case):
    assert_equal(cases[case])


def test_the_cases_end_in_every_way(cases):
    assert {"eos", "length"} == set(reasons(cases["penalised"][0]))
    assert {"stop", "length"} == set(reasons(cases["stop"][0]))
    assert {"length"} == set(reasons(cases["at least"][0]))


def test_the_same_seeds_give_the_same_samples(cases):
    assert cases["sampled"][0] == cases["sampled again"][0]
    assert cases["sampled"][0] != cases["greedy"][0]


def test_logprobs_of_samples_are_those_of_the_trainer_at_temperature_one(cases):
    assert_equal(cases["scored by the trainer"])


def test_bad_requests_fail_alone(cases):
    ours, expected = cases["bad"]
    assert_equal(cases["bad"])
    assert ours[:9] == cases["greedy"][0]
    assert reasons(ours[9:]) == ["error"] * 4 + ["length"]
    assert [completion["message"] for completion in ours] == [completion["message"] for completion in expected]
    assert len(ours[-1]["tokens"]) == 3  # a prompt of 97 in a context of 100


def test_aborted_requests_do_not_run(cases):
    ours, expected = cases["aborted"]
    assert_equal((ours, expected))
    assert [b for b, reason in enumerate(reasons(ours)) if reason == "abort"] == [1, 4]
    assert_equal(cases["after the abort"])


def test_a_running_request_that_is_aborted_keeps_what_it_has(cases):
    ours, expected = cases["aborted while running"]
    cut = {b for b, reason in enumerate(reasons(ours)) if reason == "abort"}
    assert cut == {0, 5}
    for b, (completion, whole) in enumerate(zip(ours, expected, strict=True)):
        length = len(completion["tokens"])
        assert completion["tokens"] == whole["tokens"][:length]
        assert 0 < length < len(whole["tokens"]) if b in cut else length == len(whole["tokens"])


def test_the_weights_are_those_of_the_last_load(cases):
    stale, live = cases["stale"]
    assert stale == cases["greedy"][0]
    assert [c["tokens"] for c in stale] != [c["tokens"] for c in live]
    assert_equal(cases["changed"])
    assert {completion["weight_version"] for completion in cases["changed"][0]} == {2}


@pytest.mark.parametrize("level", [1, 2])
def test_it_generates_as_before_after_sleep(cases, level):
    assert_equal(cases[f"slept {level}"])
    assert {completion["weight_version"] for completion in cases[f"slept {level}"][0]} == {2 + level}
