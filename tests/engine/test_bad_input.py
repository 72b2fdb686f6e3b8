"""Bad input as a person meets it: `ppomax STAGE ...` ends with its exit code and a message, and no run is lost.

Each case runs the real stage in this process on the tiny models. What a message of one part says in detail is tested
with that part; missing files and wrong command lines are in test_cli.py.
"""

import json
import math
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ppomax.engine import cli
from ppomax.engine.config_help import toml_value
from ppomax.engine.errors import CheckpointError, ConfigError, DataError, DivergedError, DoesNotFitError

DATA = {"sft": "dialogues", "reward": "pairs", "ppo": "prompts"}
Stage = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def arguments(tiny: Any, tmp_path: Path) -> Stage:
    """arguments(stage, "section.field=value", ...): the command line of a tiny run that works, then these overrides."""

    def build(stage: str, *overrides: str) -> list[str]:
        sections = tiny.config(stage, tmp_path / "run")
        given = [f"{name}.{key}={toml_value(x)}" for name, section in sections.items() for key, x in section.items()]
        return [stage, *given, "ppo.preset=none", *overrides]

    return build


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


@pytest.mark.parametrize(
    ("overrides", "code", "parts"),
    [
        pytest.param(
            ["ppo.kl_coeff=0.1"],
            ConfigError.exit_code,
            ["ppo.kl_coeff = 0.1 (command line): unknown key", "did you mean ppo.kl_coef?"],
            id="unknown key",
        ),
        pytest.param(
            ["parallel.tp=2"],
            ConfigError.exit_code,
            [
                "policy, critic, reference, reward",
                "tp 2 * pp 1 = 2 does not divide the 1 rank",
                "start a multiple of 2",
            ],
            id="wrong layout product",
        ),
        pytest.param(
            ["data.max_length=1000"],
            DoesNotFitError.exit_code,
            ["data.max_length 1000 does not fit the context of model.policy", "set data.max_length to at most 160"],
            id="context of the model",
        ),
        pytest.param(
            ["ppo.rollout_size=10", "ppo.minibatch_size=4"],
            ConfigError.exit_code,
            ["ppo.rollout_size 10 is not a multiple of ppo.minibatch_size 4"],
            id="minibatch",
        ),
        pytest.param(
            ["model.reward="],
            ConfigError.exit_code,
            ["model.reward is empty; set it to the Hugging Face folder"],
            id="no model",
        ),
        pytest.param(
            ["model.policy={reward}"],
            CheckpointError.exit_code,
            ["model.policy = ", "is a reward model or critic", "give the folder of a language model"],
            id="reward model as policy",
        ),
    ],
)
def test_a_wrong_configuration_is_named(
    arguments: Stage, tiny: Any, capsys: pytest.CaptureFixture[str], overrides: list[str], code: int, parts: list[str]
) -> None:
    overrides = [override.format(reward=tiny.model("reward")) for override in overrides]
    assert cli.main(arguments("ppo", *overrides)) == code
    message = capsys.readouterr().err
    assert [part for part in parts if part not in message] == []
    assert "Traceback" not in message


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_tokenizer_of_another_model_is_a_config_error(
    arguments: Stage, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    foreign = Path(__file__).parents[2] / "examples/data/quickstart/tokenizer.model"
    assert cli.main(arguments(stage, f"model.tokenizer={foreign}", "data.on_bad_row=skip")) == ConfigError.exit_code
    message = capsys.readouterr().err
    assert "is outside the vocabulary of the" in message
    assert "277 tokens: it belongs to another tokenizer" in message


@pytest.mark.parametrize("attention", ["flash_attn", "varlen"])
def test_attention_that_cannot_run_here_is_a_config_error(
    arguments: Stage, capsys: pytest.CaptureFixture[str], attention: str
) -> None:
    # The tiny models are fp32, which neither takes on any device.
    assert cli.main(arguments("sft", f"model.attention={attention}")) == ConfigError.exit_code
    assert f"model.attention '{attention}' cannot run here" in capsys.readouterr().err


def test_heads_that_cannot_be_rotated_are_a_config_error(
    arguments: Stage, tiny: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = f"model.tokenizer={tiny.model('policy')}"
    assert cli.main(arguments("sft", "model.policy=", tokenizer, "model.init.head_dim=7")) == ConfigError.exit_code
    assert "heads of 7 dimensions: rotary embeddings need an even number" in capsys.readouterr().err


BAD_ROWS = [
    pytest.param("ppo", '{"prompt": "a', "line 3: malformed JSON", id="malformed JSON"),
    pytest.param("ppo", {"prompt": " "}, "line 3: turn 1 of 1 (human) is empty", id="empty prompt"),
    pytest.param("ppo", {"prompt": "z" * 300}, "longer than the 148 that fit", id="prompt longer than the context"),
    pytest.param(
        "sft",
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]},
        "line 3: turn 2 of 2 (assistant) is empty",
        id="empty response",
    ),
    pytest.param(
        "reward",
        {"chosen": "\n\nHuman: a\n\nAssistant: ", "rejected": "\n\nHuman: a\n\nAssistant: b"},
        "line 3: chosen: turn 2 of 2 (assistant) is empty",
        id="empty chosen response",
    ),
]


@pytest.fixture
def rows(tiny: Any, tmp_path: Path) -> Callable[[str, object], Path]:
    """A data file of the stage in which row 3 is bad."""

    def write(stage: str, row: object) -> Path:
        lines = Path(tiny.path(f"{DATA[stage]}.jsonl")).read_text().splitlines()
        lines[2] = row if isinstance(row, str) else json.dumps(row)
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


@pytest.mark.parametrize(("stage", "row", "fault"), BAD_ROWS)
def test_a_bad_row_ends_the_run_and_the_mended_file_runs_in_the_same_folder(
    arguments: Stage,
    rows: Callable[[str, object], Path],
    tiny: Any,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    row: object,
    fault: str,
) -> None:
    path = rows(stage, row)
    command = arguments(stage, f"data.train={path}", "train.steps=1")
    assert cli.main(command) == DataError.exit_code
    message = capsys.readouterr().err
    assert f"{path} line 3: " in message
    assert fault in message
    assert "mend the row, or set data.on_bad_row=skip" in message
    shutil.copy(tiny.path(f"{DATA[stage]}.jsonl"), path)
    assert cli.main(command) == 0


def test_skipped_rows_are_counted_and_listed(
    arguments: Stage, rows: Callable[[str, object], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = rows("ppo", {"prompt": "z" * 300})
    assert cli.main(arguments("ppo", f"data.train={path}", "data.on_bad_row=skip", "train.steps=1")) == 0
    said = capsys.readouterr().out
    assert "data.train: 39 rows, 1 rows skipped" in said
    assert f"{path} line 3: " in said


def test_a_finished_run_is_not_overwritten(
    arguments: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments("sft", "train.steps=1")) == 0
    before = contents(tmp_path / "run")
    assert "hf/model.safetensors" in before
    for resume, advice in (("never", "or set train.resume=auto"), ("auto", "holds a run without a checkpoint")):
        assert cli.main(arguments("sft", "train.steps=1", f"train.resume={resume}")) == ConfigError.exit_code
        assert advice in capsys.readouterr().err
    assert contents(tmp_path / "run") == before


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], None]:
    """losses({3: nan}): the third loss that SFT computes from now on is reported as nan."""

    def report(wrong: dict[int, float]) -> None:
        from ppomax.engine import train_sft
        from ppomax.engine.steps import language_model_gradients

        calls: Iterator[int] = iter(range(1, 1000))

        def compute(*args: Any) -> float:
            return wrong.get(next(calls), language_model_gradients(*args))

        monkeypatch.setattr(train_sft, "language_model_gradients", compute)

    return report


@pytest.mark.slow
def test_a_loss_that_is_nan_names_step_and_last_good_checkpoint_which_goes_on(
    arguments: Stage,
    losses: Callable[[dict[int, float]], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    command = arguments("sft", "train.steps=5", "checkpoint.every=1", "train.resume=auto", "train.max_skipped_steps=0")
    losses({4: math.nan})
    assert cli.main(command) == DivergedError.exit_code
    message = capsys.readouterr().err
    assert "optimizer step 4: loss is nan (1 in a row, train.max_skipped_steps = 0)" in message
    assert f"Last good checkpoint: {run / 'checkpoints/step_00000003'}" in message
    assert "Lower the learning rate" in message
    assert not (run / "hf").exists()
    kept = contents(run / "checkpoints")
    assert {path.split("/")[0] for path in kept} == {"latest", "step_00000002", "step_00000003"}
    losses({})
    assert cli.main(command) == 0
    assert [record["step"] for record in records(run, "sft")] == [1, 2, 3, 4, 5]
    assert (run / "hf").is_dir()


def test_a_few_steps_may_be_skipped_and_the_count_starts_again(
    arguments: Stage, losses: Callable[[dict[int, float]], None], tmp_path: Path
) -> None:
    losses({2: math.nan, 4: math.inf})
    assert cli.main(arguments("sft", "train.steps=5", "train.max_skipped_steps=1")) == 0
    assert [record["skipped_steps"] for record in records(tmp_path / "run", "sft")] == [0, 1, 0, 1, 0]


def test_more_skipped_steps_in_a_row_than_allowed_end_the_run(
    arguments: Stage, losses: Callable[[dict[int, float]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    losses({2: math.nan, 3: math.inf})
    assert cli.main(arguments("sft", "train.steps=5", "train.max_skipped_steps=1")) == DivergedError.exit_code
    assert "optimizer step 3: loss is inf (2 in a row, train.max_skipped_steps = 1)" in capsys.readouterr().err


def test_a_reward_model_that_gives_nan_ends_ppo_before_any_weight_changes(
    arguments: Stage, tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "reward"
    shutil.copytree(tiny.model("reward"), broken)
    weights = load_file(broken / "model.safetensors")
    weights["score.weight"][:] = math.nan
    save_file(weights, broken / "model.safetensors")
    assert cli.main(arguments("ppo", f"model.reward={broken}", "train.max_skipped_steps=0")) == DivergedError.exit_code
    message = capsys.readouterr().err
    assert "optimizer step 1: the rollout before it has a score of the reward model that is not finite" in message
    assert "no weight was changed by it. Last good checkpoint: none" in message
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        ".lock",
        "config.toml",
        "metrics.jsonl",
        "plan.json",
        "versions.json",
    ]


def test_the_config_of_a_failed_run_is_the_one_that_was_asked_for(
    arguments: Stage, losses: Callable[[dict[int, float]], None], tmp_path: Path
) -> None:
    losses({1: math.nan})
    assert cli.main(arguments("sft", "train.seed=11", "train.max_skipped_steps=0")) == DivergedError.exit_code
    assert tomllib.loads((tmp_path / "run/config.toml").read_text())["train"]["seed"] == 11
