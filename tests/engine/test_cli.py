"""The command `ppomax` as a person meets it: output, messages and exit codes."""

import json
import shutil
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

from ppomax.engine import cli
from ppomax.engine.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    DoesNotFitError,
    PeerFailedError,
)

TOKENIZER = Path(__file__).parents[2] / "examples/data/quickstart/tokenizer.model"


@pytest.fixture
def complete(tmp_path, monkeypatch):
    """Arguments of a stage with everything it needs; the tests run in an empty folder as one process."""
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    row = {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    shutil.copy(TOKENIZER, tmp_path / "tokenizer.model")
    return ["data.train=rows.jsonl", "model.tokenizer=tokenizer.model", "train.steps=3"]


@pytest.fixture
def stage(monkeypatch):
    """Replaces train_sft by a stage that does what the test says."""

    def install(run):
        module = types.ModuleType("ppomax.engine.train_sft")
        monkeypatch.setattr(module, "run", run, raising=False)
        monkeypatch.setitem(sys.modules, "ppomax.engine.train_sft", module)

    return install


def test_importing_the_command_line_is_light():
    heavy = "('torch', 'megatron', 'transformers', 'numpy', 'matplotlib')"
    code = f"import sys, ppomax.engine.cli; print([name for name in {heavy} if name in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_a_stage_gets_the_resolved_config(complete, stage):
    seen = []
    stage(seen.append)
    assert cli.main(["sft", *complete, "train.seed=7"]) == 0
    assert seen[0].train.seed == 7


def test_dry_run_prints_the_resolved_config_and_runs_nothing(complete, stage, capsys):
    stage(lambda config: pytest.fail("a dry run started the stage"))
    assert cli.main(["sft", "--dry-run", *complete, "parallel.tp=2", "--world-size", "4"]) == 0
    assert tomllib.loads(capsys.readouterr().out)["parallel"]["reward"]["tp"] == 2


def test_dry_run_reads_the_data(complete, tmp_path, capsys):
    assert cli.main(["sft", "--dry-run", *complete]) == 0
    assert "# data.train: 1 rows, 0 rows skipped" in capsys.readouterr().out
    (tmp_path / "rows.jsonl").write_text('{"messages": [}')
    assert cli.main(["sft", "--dry-run", *complete]) == DataError.exit_code
    assert "rows.jsonl line 1" in capsys.readouterr().err


def test_dry_run_checks_the_layout_against_torchrun(complete, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert cli.main(["sft", "--dry-run", *complete, "parallel.tp=3"]) == ConfigError.exit_code
    assert "tp 3 * pp 1 = 3 does not divide the 4 ranks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("data.train=absent.jsonl", DataError.exit_code, "data.train: 'absent.jsonl': no such file"),
        ("model.policy=absent", CheckpointError.exit_code, "model.policy = 'absent': no such folder"),
        ("model.tokenizer=absent", CheckpointError.exit_code, "model.tokenizer = 'absent'"),
        ("train.resume=absent", CheckpointError.exit_code, "train.resume = 'absent'"),
    ],
)
def test_what_is_not_there_is_found_before_the_stage_starts(complete, capsys, override, code, message):
    assert cli.main(["sft", *complete, override]) == code
    assert message in capsys.readouterr().err


def test_a_stage_does_not_ask_for_models_and_data_that_it_does_not_read(complete, stage):
    stage(lambda config: None)
    assert cli.main(["sft", *complete, "model.reward=absent", "data.ptx=absent"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pppo"], "did you mean ppo?"),
        (["ppo", "a.toml", "b.toml"], "expected one configuration file"),
        (["ppo", "--dryrun"], "unrecognized arguments: --dryrun"),
        (["ppo", "--dry-run", "--world-size", "two"], "invalid int value"),
        (["sft", "--dry-run", "--world-size", "0", "data.train=a", "model.tokenizer=b"], "expected a number of ranks"),
        (["sft", "--world-size", "2", "data.train=a", "model.tokenizer=b"], "--world-size is for --dry-run"),
        (["ppo", "absent.toml"], "absent.toml: no such configuration file"),
        (["help", "ppoo"], "did you mean ppo"),
    ],
)
def test_a_wrong_command_line_is_one_message_with_code_2(complete, capsys, arguments, message):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "error", [ConfigError, DoesNotFitError, DataError, CheckpointError, DivergedError, PeerFailedError]
)
def test_each_error_of_a_stage_has_its_exit_code_and_no_traceback(complete, stage, capsys, error):
    def run(config):
        raise error("what went wrong")

    stage(run)
    assert cli.main(["sft", *complete]) == error.exit_code
    assert capsys.readouterr().err == f"ppomax: {error.__name__}: what went wrong\n"


def test_help_prints_one_row_per_exit_code(capsys):
    assert cli.main(["help", "exit-codes"]) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert rows == ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "130", "143"]


def test_the_documented_exit_codes_are_those_of_the_errors():
    table = (Path(__file__).parents[2] / "docs/exit_codes.md").read_text()
    for error in cli.ERRORS:
        assert f"| {error.exit_code} | `{error.__name__}` |" in table


def test_an_unexpected_error_shows_its_traceback_with_code_1(complete, stage, capsys):
    def run(config):
        raise ZeroDivisionError("ours")

    stage(run)
    assert cli.main(["sft", *complete]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_config_error_is_printed_by_the_first_rank_only_and_ends_every_rank(complete, monkeypatch, capsys):
    monkeypatch.setattr(cli, "SECONDS_FOR_THE_FIRST_RANK", 0.0)
    monkeypatch.setattr(cli, "_is_joined", lambda: False)  # whatever ran in this process before
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert cli.main(["pppo"]) == 2
        said.append(capsys.readouterr().err)
    assert said == ["[rank 0] ppomax: ConfigError: 'pppo': no such command; did you mean ppo?\n", ""]


def test_other_errors_are_printed_by_the_rank_that_met_them(complete, stage, monkeypatch, capsys):
    def run(config):
        raise DivergedError("step 3: loss is nan\nlast checkpoint: none")

    stage(run)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert cli.main(["sft", *complete]) == 6
    assert capsys.readouterr().err == (
        "[rank 1] ppomax: DivergedError: step 3: loss is nan\n[rank 1] last checkpoint: none\n"
    )


def test_help_and_version_name_what_there_is(capsys):
    assert cli.main(["help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*cli.STAGES, *cli.TOOLS))
    assert cli.main(["version"]) == 0
    assert "megatron-core 0.16" in capsys.readouterr().out


def test_the_module_starts_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "ppomax.engine.cli", "pppo"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "did you mean ppo?" in done.stderr
