"""PPO with more responses under way than it takes: what is taken, dropped and carried is the same for every layout, and
a resumed run goes on with what was carried.
"""

import json
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.dist

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one_process": (1, {}),
    "dp2": (2, {}),
    "dp4": (4, {}),
    "tp2_pp2": (4, {"policy": {"tp": 2, "pp": 2}, "critic": {"pp": 2}, "reward": {"tp": 2}, "reference": {"tp": 1}}),
}
MODES = {
    "drop": {"over_sampling_size": 11},
    "carry": {"over_sampling_size": 11, "partial_rollout": True, "rollout_correction": "truncated"},
    # Fewer responses than replicas.
    "few": {"rollout_size": 1, "minibatch_size": 1, "over_sampling_size": 2, "partial_rollout": True},
}
NUM_STEPS, ROLLOUT_SIZE = 3, 6
COUNTS = ("response_age_mean", "response_age_max", "carried_tokens", "tokens_drawn_max", "responses_carried")
LOSSES = ("reward", "kl", "value_loss", "policy_objective", "sampler_mismatch_mean")


def run_ppo(config: dict[str, Any]) -> list[dict[str, Any]]:
    """On a worker: the stage; what it was given to learn from in every iteration."""
    from ppomax.engine.config import RunConfig

    stage = import_module("ppomax.engine.train_ppo")
    original, rollouts = stage.make_experience, []

    def make_experience(rollout: Any, *args: Any, **kwargs: Any) -> Any:
        experience, scaler = original(rollout, *args, **kwargs)
        rows = zip(rollout.tokens.tolist(), rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), strict=True)
        rollouts.append(
            {
                "prompts": [tokens[:start] for tokens, start, _ in rows],
                "responses": [
                    row[mask].tolist() for row, mask in zip(rollout.tokens[:, 1:], rollout.response_mask, strict=True)
                ],
                "off": (experience.logprobs - rollout.sampling_logprobs).abs().max(1).values.tolist(),
            }
        )
        return experience, scaler

    with patch.object(stage, "make_experience", make_experience):
        stage.run(RunConfig.model_validate(config))
    return rollouts


Runner = Callable[..., tuple[Path, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def run(on_ranks: Callable[..., list[Any]], tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """run(mode, layout): output folder and what was learned from; each combination runs once."""
    done: dict[tuple[str, str, str], tuple[Path, list[dict[str, Any]]]] = {}

    def run_case(mode: str, layout: str, resume: str = "never") -> tuple[Path, list[dict[str, Any]]]:
        if (mode, layout, resume) not in done:
            output = tmp_path_factory.mktemp(mode) / "run"
            num_ranks, parallel = LAYOUTS[layout]
            config = tiny.config(
                "ppo",
                output,
                parallel=parallel,
                ppo={"rollout_size": ROLLOUT_SIZE, "minibatch_size": 3, "epochs": 1, **MODES[mode]},
                train={"steps": NUM_STEPS, "resume": resume},
                checkpoint={"every": 1, "keep": NUM_STEPS},
            )
            first, *others = on_ranks(num_ranks, run_ppo, config)
            assert all(other == first for other in others)
            done[mode, layout, resume] = output, first
        return done[mode, layout, resume]

    return run_case


def records(output: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def state_after(output: Path, step: int) -> dict[str, Any]:
    return json.loads((output / f"checkpoints/step_{step:08d}/state.json").read_text())["state"]


@pytest.mark.parametrize(
    ("mode", "layout"),
    [
        ("drop", "dp2"),
        pytest.param("carry", "dp2", marks=pytest.mark.slow),
        ("carry", "tp2_pp2"),
        pytest.param("few", "dp4", marks=pytest.mark.slow),
    ],
)
def test_what_is_taken_and_left_is_the_same_for_every_layout(run: Runner, mode: str, layout: str) -> None:
    (output, rollouts), (expected_output, expected) = run(mode, layout), run(mode, "one_process")
    for ours, theirs in zip(rollouts, expected, strict=True):
        assert ours["prompts"] == theirs["prompts"]
        assert ours["responses"] == theirs["responses"]
    for ours, theirs in zip(records(output), records(expected_output), strict=True):
        assert [ours[name] for name in COUNTS] == [theirs[name] for name in COUNTS]
        assert [ours[name] for name in LOSSES] == pytest.approx([theirs[name] for name in LOSSES], rel=1e-4, abs=1e-5)
    for step in range(1, NUM_STEPS + 1):
        ours, theirs = (state_after(folder, step)["carried"] for folder in (output, expected_output))
        for one, other in zip(ours, theirs, strict=True):
            assert one["begun"].pop("logprobs") == pytest.approx(other["begun"].pop("logprobs"), abs=1e-4)
            assert one == other


def prompts_of_the_stream(tiny: Any, num: int) -> Counter[tuple[int, ...]]:
    from ppomax.engine.config import DataConfig
    from ppomax.engine.data.chat import Turn, make_template
    from ppomax.engine.data.order import Order
    from ppomax.engine.data.tokenizer import load_tokenizer

    template = make_template(DataConfig(), load_tokenizer(tiny.model("policy")))
    texts = [json.loads(line)["prompt"] for line in Path(tiny.path("prompts.jsonl")).read_text().splitlines()]
    rows = Order([len(texts)], [1.0], seed=24).rows(0, num)
    return Counter(tuple(template.encode_prompt([Turn("human", texts[row])])) for _, row in rows)


@pytest.mark.parametrize("mode", ["drop", "carry"])
def test_every_prompt_is_learned_from_once_or_carried_or_counted_as_dropped(run: Runner, tiny: Any, mode: str) -> None:
    output, rollouts = run(mode, "one_process")
    state = state_after(output, NUM_STEPS)
    num_dropped = sum(record["responses_dropped"] for record in records(output))
    num_left = {"drop": 5 * NUM_STEPS, "carry": 5}[mode]
    assert state["prompt_position"] == NUM_STEPS * ROLLOUT_SIZE + num_left
    assert (num_dropped, len(state["carried"])) == {"drop": (num_left, 0), "carry": (0, num_left)}[mode]
    seen = Counter(tuple(prompt) for rollout in rollouts for prompt in rollout["prompts"])
    seen += Counter(tuple(one["prompt"]) for one in state["carried"])
    stream = prompts_of_the_stream(tiny, state["prompt_position"])
    assert seen <= stream
    assert seen.total() == stream.total() - num_dropped


def test_only_what_was_carried_differs_from_the_weights_of_the_iteration(run: Runner) -> None:
    for mode in ("drop", "carry"):
        output, rollouts = run(mode, "one_process")
        off = [difference for rollout in rollouts for difference in rollout["off"]]
        metrics = records(output)
        if mode == "drop":
            assert max(off) < 1e-4
            assert {record["response_age_max"] for record in metrics} == {0}
        else:
            num_carried = sum(difference > 1e-3 for difference in off)
            assert 0 < num_carried < len(off) / 2
            assert max(record["carried_tokens"] for record in metrics) > 0
            assert metrics[0]["sampler_mismatch_max"] < 1e-4 < max(r["sampler_mismatch_max"] for r in metrics)


@pytest.mark.parametrize("layout", [pytest.param("one_process", marks=pytest.mark.slow), "dp2"])
def test_a_resumed_run_goes_on_bitwise_with_what_was_carried(run: Runner, layout: str) -> None:
    expected, rollouts = run("carry", layout)
    assert state_after(expected, 2)["carried"]
    assert any(one["begun"]["tokens"] for one in state_after(expected, 2)["carried"])
    found, resumed = run("carry", layout, str(expected / "checkpoints/step_00000002"))
    assert resumed == rollouts[2:]
    assert records(found) == records(expected)[2:]
    ends = state_after(found, NUM_STEPS), state_after(expected, NUM_STEPS)
    for end in ends:
        for mark in ("healthy_step", "candidate_step"):  # the monitor goes back to checkpoints of its own run alone
            del end["monitor"][mark]
    assert ends[0] == ends[1]
    for folder in ("hf", "critic_hf"):
        ours, theirs = (load_file(output / folder / "model.safetensors") for output in (found, expected))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_carried_responses_are_not_forgotten_without_a_word(run: Runner, on_ranks: Any, tiny: Any, tmp_path) -> None:
    from ppomax.engine.errors import ConfigError

    checkpoint = run("carry", "one_process")[0] / "checkpoints/step_00000002"
    config = tiny.config(
        "ppo",
        tmp_path / "run",
        ppo={"rollout_size": ROLLOUT_SIZE, "minibatch_size": 3},
        train={"steps": NUM_STEPS, "resume": str(checkpoint)},
    )
    with pytest.raises(ConfigError, match=r"holds 5 unfinished responses, which only ppo\.partial_rollout"):
        on_ranks(1, run_ppo, config)
