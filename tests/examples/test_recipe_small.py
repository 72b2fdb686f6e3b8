"""`ppomax quickstart` and `ppomax recipe` from end to end, with a model and step counts far too small to learn."""

import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from ppomax.engine import cli
from ppomax.engine.errors import ConfigError, DataError
from ppomax.tools.recipe import _write_samples

ROOT = Path(__file__).parents[2]
CONFIGS = "examples/configs/quickstart"
SMALL = [
    *("model.init.num_layers=2", "model.init.hidden_size=32", "model.init.ffn_hidden_size=48"),
    *("train.steps=2", "train.batch_size=4", "reward.max_pairs=4", "ppo.rollout_size=4", "ppo.minibatch_size=2"),
    *("sampling.max_new_tokens=8", "monitor.eval_size=6"),
]
STAGES = ("sft", "reward", "critic", "ppo", "before", "after")
PLOTS = {
    *("reward", "kl", "response_length", "perplexity", "ppo_losses", "sft_loss", "reward_model_loss", "critic_loss"),
    *("scores", "preference_differences"),
}
NUMBERS = {
    *("reward_model_accuracy", "reward_before", "reward_std_before", "reward_after", "kl", "gold_before", "gold_after"),
    *("response_length_before", "response_length_after", "perplexity_before", "perplexity_after"),
    *("export_max_logit_diff", "seconds"),
}


@pytest.fixture(scope="module", autouse=True)
def in_the_clone() -> Iterator[None]:
    """The paths of the quickstart are relative to the root of the repository; one process, one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `ppomax quickstart` leaves."""
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    assert cli.main(["quickstart", "--output", str(folder), *SMALL]) == 0
    return folder


def read_config(output: Path, stage: str) -> dict:
    return tomllib.loads((output / stage / "config.toml").read_text())


def test_the_summary_holds_the_numbers_of_all_stages(output: Path) -> None:
    summary = json.loads((output / "summary.json").read_text())
    assert {key for key, value in summary.items() if isinstance(value, float | int)} == NUMBERS
    assert set(summary["seconds_by_stage"]) == set(STAGES)
    for share in ("reward_model_accuracy", "gold_before", "gold_after"):
        assert 0 <= summary[share] <= 1
    assert summary["reward_std_before"] > 0
    for name in ("before", "after"):
        evaluation = json.loads((output / name / "evaluation.json").read_text())
        assert summary[f"reward_{name}"] == evaluation["reward"]
        rewards = [json.loads(line)["reward"] for line in (output / name / "samples.jsonl").read_text().splitlines()]
        assert len(rewards) == 6
        assert sum(rewards) / 6 == pytest.approx(evaluation["reward"], abs=1e-5)


def test_the_exported_policy_computes_the_same_in_transformers(output: Path) -> None:
    assert json.loads((output / "summary.json").read_text())["export_max_logit_diff"] < 1e-4
    model = transformers.AutoModelForCausalLM.from_pretrained(output / "ppo/hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(output / "ppo/hf")
    ids = tokenizer("Human:Hello.", return_tensors="pt")["input_ids"]
    assert model(ids).logits.isfinite().all()
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_every_plot_is_a_picture(output: Path) -> None:
    files = list((output / "plots").iterdir())
    assert {path.stem for path in files} == PLOTS
    assert {path.read_bytes()[:8] for path in files} == {b"\x89PNG\r\n\x1a\n"}


def test_each_stage_starts_from_the_folders_of_those_before(output: Path) -> None:
    hf = {stage: str(output / stage / "hf") for stage in STAGES}
    models = {stage: read_config(output, stage)["model"] for stage in STAGES}
    assert models["sft"]["policy"] == ""
    assert models["reward"]["policy"] == hf["sft"]
    assert (models["critic"]["policy"], models["critic"]["reward"]) == (hf["sft"], hf["reward"])
    ppo = models["ppo"]
    assert (ppo["policy"], ppo["reward"], ppo["critic"]) == (hf["sft"], hf["reward"], hf["critic"])
    for name, policy in (("before", hf["sft"]), ("after", hf["ppo"])):
        assert [models[name][role] for role in ("policy", "reward", "reference")] == [policy, hf["reward"], hf["sft"]]


def test_overrides_reach_every_stage(output: Path) -> None:
    assert {read_config(output, stage)["train"]["steps"] for stage in STAGES} == {2}
    assert {read_config(output, stage)["monitor"]["eval_size"] for stage in STAGES} == {6}


def test_the_samples_show_prompts_before_and_after(output: Path) -> None:
    text = (output / "samples.md").read_text()
    assert text.count("## Prompt") == 6
    assert text.count("before (reward") == text.count("after (reward") == 6


def test_nothing_in_a_sample_is_markup(tmp_path: Path) -> None:
    hostile = "# Title\n\n<script>alert(1)</script>\r\n```\n| a | b |\u2028- [x](y)\t**z**"
    row = {"prompt": [{"role": "human", "text": hostile}], "response": hostile, "reward": 1.0, "finished": True}
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "samples.jsonl").write_text(json.dumps(row) + "\n")
    _write_samples(tmp_path)
    lines = (tmp_path / "samples.md").read_text().splitlines()
    holding = [number for number, line in enumerate(lines) if "script" in line]
    assert len(holding) == 3
    for number in holding:  # a code block: four spaces after a blank line
        assert lines[number].startswith("    ")
        assert lines[number - 1] == ""
    assert all("Title" not in line and "```" not in line for n, line in enumerate(lines) if n not in holding)


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("ppo.lam=2", ConfigError.exit_code, "ppo.lam = 2"),
        ("data.ptx=absent.jsonl", DataError.exit_code, "data.ptx: 'absent.jsonl': no such file"),
        ("parallel.tp=2", ConfigError.exit_code, "does not divide the 1 rank"),
        ("model.policy=elsewhere", ConfigError.exit_code, "the recipe sets the folders of its stages itself"),
    ],
)
def test_a_fault_of_any_stage_is_found_before_the_earlier_run_is_replaced(
    output: Path, capsys: pytest.CaptureFixture[str], override: str, code: int, message: str
) -> None:
    before = sorted(output.rglob("*"))
    assert cli.main(["quickstart", "--output", str(output), *SMALL, override]) == code
    assert message in capsys.readouterr().err
    assert sorted(output.rglob("*")) == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert cli.main(["recipe", CONFIGS, str(tmp_path), *SMALL]) == ConfigError.exit_code
    assert f"{tmp_path} is not empty and no earlier recipe wrote it" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_without_the_five_files_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipe", str(tmp_path), str(tmp_path / "out")]) == ConfigError.exit_code
    assert f"{tmp_path / 'sft.toml'} is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_reward_model_without_held_out_pairs_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = tmp_path / "configs"
    shutil.copytree(CONFIGS, configs)
    text = (configs / "reward.toml").read_text()
    (configs / "reward.toml").write_text(re.sub(r"^eval(_every)? = .*$", "", text, flags=re.MULTILINE))
    assert cli.main(["recipe", str(configs), str(tmp_path / "out")]) == ConfigError.exit_code
    assert "reward.toml: data.eval is empty" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_quickstart_says_where_it_must_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["quickstart"]) == ConfigError.exit_code
    assert "from the root of a clone" in capsys.readouterr().err


def test_a_second_run_replaces_the_first(output: Path) -> None:
    """Last of the file: it takes the folder that the other tests read."""
    (output / "sft/left_over").write_text("of the first run")
    assert cli.main(["recipe", CONFIGS, str(output), *SMALL]) == 0
    assert not (output / "sft/left_over").exists()
    files = {"plots", "recipe.json", "report.html", "samples.md", "summary.json"}
    assert {path.name for path in output.iterdir()} == {*STAGES, *files}
    summary = json.loads((output / "summary.json").read_text())
    assert not {"gold_before", "gold_after"} & set(summary)  # only the quickstart knows the rule of its data
