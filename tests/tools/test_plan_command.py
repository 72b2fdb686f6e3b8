"""`ppomax plan` and the plan of every run, as a person meets them: output, files and exit codes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ppomax.engine import cli
from ppomax.engine.config import RunConfig
from ppomax.engine.errors import CheckpointError, ConfigError, DoesNotFitError
from ppomax.engine.plan import run as plan_run
from ppomax.engine.plan.plan import make_plan

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "examples/configs/ppo_max_llama7b.toml")
NODE = ["--gpus", "8", "--gpu", "h100"]
ON_ONE = ["parallel.tp=1", "parallel.pp=1", "--gpus", "1", "--gpu", "a100-80g"]


def said(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_a_plan_that_fits_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", CONFIG, *NODE]) == 0
    out, _ = said(capsys)
    assert "842,403,840" in out  # the largest share of the policy
    assert re.search(r"Fits: \d+\.\d of 74\.5 GiB", out)
    assert all(phase in out for phase in ("rollout", "scoring", "update", "checkpoint", "load"))


def test_one_that_does_not_fit_ends_with_3_and_says_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", CONFIG, *ON_ONE]) == DoesNotFitError.exit_code
    out, err = said(capsys)
    assert "Fits" not in out
    assert "rank 0 needs" in err
    line = err.split("Any of these makes it fit:\n")[1].splitlines()[0]
    arguments, _, gpus = line.partition(":")[0].partition(" on ")
    assert cli.main(["plan", CONFIG, *arguments.split(), "--gpus", gpus.split()[0], "--gpu", "a100-80g"]) == 0


def test_a_search_prints_arguments_that_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", CONFIG, *NODE, "--search"]) == 0
    table = said(capsys)[0].split("Layouts that fit")[1]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if "│" in line]
    best = rows[0][2].split()
    for row in rows[1:]:
        if row[0]:
            break
        best += row[2].split()
    assert cli.main(["plan", CONFIG, *NODE, *best]) == 0
    assert f"An iteration: {rows[0][0]} s" in said(capsys)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "8", "--gpu", "h10"], "did you mean h100"),
        (["--gpus", "0", "--gpu", "h100"], "expected a number of GPUs"),
        ([*NODE, "--model", "llama-7"], "did you mean llama-7b"),
        (["--gpus", "12", "--gpu", "h100"], "tp 4 * pp 2 = 8 does not divide the 12 ranks"),
        ([*NODE, "parallel.tp=3"], "does not divide the 8 ranks"),
        ([*NODE, "model.init.ffn_hidden_size=11010"], "parallel.policy: ffn_hidden_size 11010 of the model is not"),
        ([*NODE, "sampling.max_new_token=3"], "did you mean sampling.max_new_tokens"),
        ([*NODE, "--response", "0"], "expected a number of tokens"),
        (["absent.toml", *NODE], "absent.toml"),
    ],
)
def test_a_wrong_command_line_ends_with_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(["plan", CONFIG, *arguments]) == ConfigError.exit_code
    assert message in said(capsys)[1]


def test_folders_are_read_where_they_are(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.model("policy")
    words = [f"model.policy={folder}", f"model.reward={tiny.model('reward')}", f"model.critic={tiny.model('critic')}"]
    assert cli.main(["plan", *words, "--gpus", "2", "--gpu", "l40s"]) == 0
    assert folder in said(capsys)[0].replace("\n", "")
    (Path(tiny.root) / "broken").mkdir()
    (Path(tiny.root) / "broken" / "config.json").write_text('{"model_type": "gpt2"}')
    broken = f"model.policy={tiny.path('broken')}"
    assert cli.main(["plan", *words, broken, "--gpus", "2", "--gpu", "l40s"]) == CheckpointError.exit_code


@pytest.mark.parametrize("stage", ["sft", "reward", "critic", "evaluate"])
def test_every_stage_can_be_planned_by_the_name_of_a_model(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "llama-7b", "model.dtype=bf16", "parallel.tp=8", "model.recompute=full"]
    assert cli.main(["plan", "--stage", stage, *words, "--gpus", "16", "--gpu", "h200"]) == 0
    assert "Fits" in said(capsys)[0]


@pytest.fixture
def sft(tiny: Any, tmp_path: Path) -> RunConfig:
    return RunConfig.model_validate(tiny.config("sft", tmp_path / "run"))


def test_a_run_prints_its_plan_and_compares_it_at_its_end(sft: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    from ppomax.engine.train_sft import run

    run(sft)
    out = said(capsys)[0]
    first, last = out.index("plan policy: tp 1 pp 1 dp 1, per rank weights"), out.index("plan: rank 0 took the most")
    assert first < out.index("sft 1/3") < last
    record = json.loads((Path(sft.train.output) / "plan.json").read_text())
    plan = make_plan(sft, "sft", 1, device="cpu")
    (rank,) = record["ranks"]
    assert rank["peak"] == plan.worst.total
    assert rank["measured"] > 0
    assert rank["phases"]["update"]["weights"] == plan.ranks[0].roles[0].resident.weights
    assert record["measured"] == "growth of the process's peak resident memory"


def test_a_run_that_cannot_fit_its_gpu_ends_before_it_starts(
    sft: RunConfig, tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch.distributed as dist

    from ppomax.engine.train_sft import run

    monkeypatch.setattr(plan_run, "_gpu_memory", lambda: 100_000)
    with pytest.raises(DoesNotFitError, match="rank 0 needs"):
        run(sft)
    assert not dist.is_initialized()
    assert not Path(sft.train.output).exists()
    words = [f"model.policy={sft.model.policy}", f"data.train={tiny.path('dialogues.jsonl')}", "data.max_length=160"]
    words += ["sampling.max_new_tokens=12", f"train.output={sft.train.output}"]
    for extra in ([], ["--dry-run"]):
        assert cli.main(["sft", *words, *extra]) == DoesNotFitError.exit_code
        assert "parallel.check_memory=false" in said(capsys)[1]
    assert cli.main(["sft", *words, "--dry-run", "parallel.check_memory=false"]) == 0
    assert "# plan total: rank 0 has the most" in said(capsys)[0]


def test_running_out_of_memory_all_the_same_is_a_message_with_the_plan(
    sft: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from ppomax.engine import train_sft

    def run_out(*_: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(train_sft, "language_model_gradients", run_out)
    with pytest.raises(DoesNotFitError, match="Tried to allocate 2 GiB") as raised:
        train_sft.run(sft)
    assert "plan total: rank 0 has the most" in str(raised.value)
    assert not torch.distributed.is_initialized()
