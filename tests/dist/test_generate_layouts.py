"""Four ranks generate what one process does: `generate_layouts_worker.py` runs the layouts, this file compares."""

import runpy
from pathlib import Path

import pytest
import torch

from ppomax.engine.ppo.types import Rollout

WORKER = Path(__file__).with_name("generate_layouts_worker.py")
CASES = (
    "grouped tp2",
    "grouped pp2",
    "grouped tp2_pp2",
    "grouped pp2_vpp2",
    "grouped pp2_vpp2_graphs",
    "grouped dp4",
    "grouped tp2_sequence_parallel",
    "tied pp4",
    "tied tp2_pp2_sequence_parallel",
    "tied tp2_pp2_vpp2_sequence_parallel",
    "one_group tp2",
)
SETTINGS = ("paper", "greedy", "one_prompt")
NEAR_TIE = 1e-5

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def results(on_ranks, tmp_path_factory: pytest.TempPathFactory):
    """{case: one {setting: Rollout} per rank}."""
    path = tmp_path_factory.mktemp("generate") / "rollouts.pt"
    on_ranks(4, run_worker, str(path))
    with torch.serialization.safe_globals([Rollout]):
        return torch.load(path, weights_only=True)


def run_worker(path: str) -> None:
    runpy.run_path(str(WORKER))["main"](path)


def response(rollout, b):
    return slice(int(rollout.prompt_lengths[b]) - 1, int(rollout.lengths[b]) - 1)


def first_difference(rollout, expected, b):
    """The column where the responses to prompt b part, or None."""
    ours, theirs = (x.tokens[b, 1:][response(x, b)].tolist() for x in (rollout, expected))
    pairs = enumerate(zip(ours, theirs, strict=False), start=response(rollout, b).start)
    parted = next((column for column, (token, other) in pairs if token != other), None)
    assert parted is not None or len(ours) == len(theirs)
    return parted


@pytest.mark.parametrize("case", CASES)
def test_responses_are_those_of_one_process(results, case):
    for setting in SETTINGS:
        rollout, expected = (results[name][0][setting] for name in (case, case.split()[0] + " one_process"))
        for b in range(len(rollout.lengths)):
            column = first_difference(rollout, expected, b)
            if column is None:
                assert rollout.finished[b] == expected.finished[b]
                ours, theirs = (x.sampling_logprobs[b, response(x, b)] for x in (rollout, expected))
                torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)
            else:
                margin = expected.margins[b, column].item()
                print(f"{case}, {setting}: prompt {b} parts in column {column}, margin {margin:.1e}")
                assert margin < NEAR_TIE


@pytest.mark.parametrize("case", CASES)
def test_every_rank_gets_bitwise_the_same_rollout(results, case):
    first, *others = results[case]
    for setting in SETTINGS:
        for other in others:
            for name, tensor in vars(first[setting]).items():
                assert torch.equal(tensor, getattr(other[setting], name)), name


def test_the_cases_have_responses_with_and_without_eos(results):
    finished = results["grouped one_process"][0]["paper"].finished
    assert 0 < finished.sum() < finished.numel()
