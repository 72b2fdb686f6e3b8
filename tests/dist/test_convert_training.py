"""Checkpoints of real training runs through `ppomax convert`: exports, resharding, inspection."""

import json
import shlex
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from ppomax.engine import cli
from ppomax.engine.conversion import megatron_to_hf, reshard
from ppomax.engine.errors import CheckpointError
from ppomax.engine.models.distributed_checkpoint import DistributedCheckpoint, has_layers
from ppomax.engine.models.megatron_names import Split
from ppomax.engine.models.stored_model import open_model

pytestmark = pytest.mark.dist
OnRanks = Callable[..., list[Any]]
ROOT = Path(__file__).parents[2]


def run_stage(stage: str, config: dict[str, Any]) -> None:
    from ppomax.engine.config import RunConfig

    import_module(f"ppomax.engine.train_{stage}").run(RunConfig.model_validate(config))


@pytest.fixture(scope="module")
def run(on_ranks: OnRanks, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of two PPO iterations at tp 2 with a tied policy, and a checkpoint of each."""
    output = tmp_path_factory.mktemp("training") / "run"
    config = tiny.config("ppo", output, tied=True, parallel={"tp": 2}, checkpoint={"every": 1})
    on_ranks(2, run_stage, "ppo", config)
    return output


def step(output: Path, number: int) -> Path:
    return output / "checkpoints" / f"step_{number:08d}"


def contents(folder: Path) -> dict[str, Tensor]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def assert_same_folder(found: Path, wanted: Path) -> None:
    """The same files, and every bit of the weights."""
    assert sorted(path.name for path in found.iterdir()) == sorted(path.name for path in wanted.iterdir())
    ours, theirs = contents(found), contents(wanted)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert ours[name].dtype == weight.dtype, name
        assert torch.equal(ours[name], weight), name
    for name in ("config.json", "tokenizer_config.json"):
        assert json.loads((found / name).read_text()) == json.loads((wanted / name).read_text()), name


@pytest.mark.parametrize(("role", "export"), [("policy", "hf"), ("critic", "critic_hf")])
def test_the_last_checkpoint_gives_what_the_run_exported(run: Path, role: str, export: str, tmp_path: Path) -> None:
    megatron_to_hf(str(step(run, 2)), str(tmp_path / "out"), role=role)
    assert_same_folder(tmp_path / "out", run / export)


def test_an_earlier_checkpoint_is_an_earlier_model(run: Path, tmp_path: Path) -> None:
    megatron_to_hf(str(step(run, 1)), str(tmp_path / "out"), role="policy")
    before, after = contents(tmp_path / "out"), contents(run / "hf")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in after)


def test_the_tokenizer_of_an_unfinished_run_is_that_of_its_model(run: Path, tiny: Any, tmp_path: Path) -> None:
    unfinished = tmp_path / "run"
    shutil.copytree(run, unfinished, ignore=shutil.ignore_patterns("hf", "critic_hf"))
    megatron_to_hf(str(step(unfinished, 2)), str(tmp_path / "out"), role="policy")
    assert_same_folder(tmp_path / "out", run / "hf")


def test_a_run_whose_tokenizer_is_gone_exports_without_one(run: Path, tmp_path: Path) -> None:
    for number, text in enumerate(("", "[model]\npolicy = 3\n", "[model]\npolicy = 'nowhere'\n", "=")):
        lost = tmp_path / str(number)
        shutil.copytree(run, lost / "run", ignore=shutil.ignore_patterns("hf", "critic_hf"))
        (lost / "run/config.toml").write_text(text)
        megatron_to_hf(str(step(lost / "run", 2)), str(lost / "out"), role="critic")
        assert not list((lost / "out").glob("tokenizer*"))


def test_a_checkpoint_of_both_heads_gives_the_reward_model_that_its_stage_exports(
    on_ranks: OnRanks, tiny: Any, tmp_path: Path
) -> None:
    overrides: dict[str, Any] = {"train": {"steps": 1}, "checkpoint": {"every": 1}, "model": {"dtype": "bf16"}}
    on_ranks(2, run_stage, "reward", tiny.config("reward", tmp_path / "run", parallel={"tp": 2}, **overrides))
    megatron_to_hf(str(step(tmp_path / "run", 1)), str(tmp_path / "out"))
    assert_same_folder(tmp_path / "out", tmp_path / "run/hf")
    reshard(str(step(tmp_path / "run", 1)), str(tmp_path / "tp4"), split=Split(tp=4, pp=2))
    megatron_to_hf(str(tmp_path / "tp4"), str(tmp_path / "again"), tokenizer=str(tmp_path / "run/hf"))
    assert_same_folder(tmp_path / "again", tmp_path / "run/hf")


def test_resharded_there_and_back_every_chunk_is_as_the_ranks_saved_it(run: Path, tmp_path: Path) -> None:
    reshard(str(step(run, 2)), str(tmp_path / "one"), split=Split())
    reshard(str(tmp_path / "one"), str(tmp_path / "two"), split=Split(tp=2))
    for role in ("policy", "critic"):
        saved, one, two = (
            DistributedCheckpoint(folder / role) for folder in (step(run, 2), tmp_path / "one", tmp_path / "two")
        )
        assert saved.tensors.keys() == one.tensors.keys() == two.tensors.keys()
        for key, tensor in saved.tensors.items():
            boxes = {(chunk.first, chunk.count) for chunk in tensor.chunks}
            assert {(chunk.first, chunk.count) for chunk in two.tensors[key].chunks} == boxes, key
            assert two.tensors[key].size == tensor.size
            for layer in range(tensor.size[0] if has_layers(key) else 1):
                assert torch.equal(two.read(key, layer), saved.read(key, layer)), key
        # 277 tokens are padded to 278 at tp 2.
        assert (one.tensors["embedding.word_embeddings.weight"].size, tensor_size(two)) == ((277, 32), (278, 32))
        assert (tmp_path / "two" / role / "common.pt").read_bytes() == (step(run, 2) / role / "common.pt").read_bytes()
    assert (tmp_path / "two/state.json").read_bytes() == (step(run, 2) / "state.json").read_bytes()


def tensor_size(checkpoint: DistributedCheckpoint) -> tuple[int, ...]:
    return checkpoint.tensors["embedding.word_embeddings.weight"].size


def test_training_goes_on_from_a_resharded_checkpoint_bit_by_bit(
    on_ranks: OnRanks, run: Path, tiny: Any, tmp_path: Path
) -> None:
    reshard(str(step(run, 1)), str(tmp_path / "resharded"), split=Split(pp=2, vpp=2))
    results = []
    for name, checkpoint in (("from_saved", step(run, 1)), ("from_resharded", tmp_path / "resharded")):
        overrides = {"parallel": {"pp": 2, "vpp": 2}, "train": {"resume": str(checkpoint)}}
        on_ranks(2, run_stage, "ppo", tiny.config("ppo", tmp_path / name, tied=True, **overrides))
        record = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        results.append({key: value for key, value in record.items() if key != "seconds"})
    assert results[0] == results[1]
    for export in ("hf", "critic_hf"):
        assert_same_folder(tmp_path / "from_resharded" / export, tmp_path / "from_saved" / export)


def test_inspect_and_verify_take_training_checkpoints(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["convert", "inspect", str(step(run, 2)), "--role", "critic"]) == 0
    printed = capsys.readouterr().out
    assert "role critic of step_00000002 with optimizer" in printed
    assert "head        scalar" in printed
    assert cli.main(["convert", "verify", str(step(run, 2)), str(run / "critic_hf"), "--role", "critic"]) == 0
    assert "largest difference 0 in 39,904 parameters" in capsys.readouterr().out
    assert cli.main(["convert", "verify", str(step(run, 1)), str(step(run, 2)), "--role", "policy"]) == 5
    assert "more than --tolerance 0" in capsys.readouterr().err
    assert cli.main(["convert", "inspect", str(step(run, 2))]) == 0
    printed = capsys.readouterr().out
    assert printed.index("role critic of step_00000002") < printed.index("role policy of step_00000002")
    assert cli.main(["convert", "megatron-to-hf", str(step(run, 2)), str(tmp_path / "out")]) == 5
    assert "choose with --role: critic, policy" in capsys.readouterr().err
    assert cli.main(["convert", "inspect", str(step(run, 2) / "policy")]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 300}, r"has shape \[278, 32\], not \[300, 32\]"),
        ({"num_layers": 5}, "has 4 layers, not 5"),
        ({"num_layers": True}, "num_layers is True, expected a positive number"),
        ({"family": "gpt2"}, "does not describe the model of critic"),
        ({"family": "qwen2"}, "other biases"),
        ({"rope_scaling": None}, "does not describe the model of critic"),
        ({"more": 1}, "does not describe the model of critic"),
        ({"scalar": False}, r"output_layer.weight has shape \[1, 32\]"),
    ],
    ids=str,
)
def test_a_state_file_that_describes_another_model_is_refused(
    run: Path, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(step(run, 1), tmp_path / "step"))
    state = json.loads((copied / "state.json").read_text())
    state["roles"]["critic"] |= change
    (copied / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=message):
        open_model(copied, "critic")


def test_an_incomplete_checkpoint_cannot_be_resharded(run: Path, tmp_path: Path) -> None:
    for file, message in (("critic/common.pt", "common.pt is missing"), ("policy/.metadata", r"\.metadata")):
        copied = Path(shutil.copytree(step(run, 1), tmp_path / "step"))
        (copied / file).unlink()
        with pytest.raises(CheckpointError, match=message):
            reshard(str(copied), str(tmp_path / "out"), split=Split(tp=2))
        shutil.rmtree(copied)
        assert list(tmp_path.iterdir()) == []


def test_the_commands_of_the_readme_run_one_after_the_other(
    run: Path, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny.model("policy", tied=True), "my-model")
    shutil.copytree(run, "runs/ppo")
    section = (ROOT / "README.md").read_text().split("## Bring your own checkpoint")[1].split("\n## ")[0]
    lines = [shlex.split(line, comments=True) for line in section.splitlines() if line.startswith("ppomax convert")]
    assert len({line[2] for line in lines}) == 7
    for line in lines:
        assert cli.main(line[1:]) == 0, line
    assert "largest difference 0 in" in capsys.readouterr().out
    assert_same_folder(tmp_path / "my-policy", run / "hf")
    assert cli.main(["convert", "verify", "my-policy", "my-policy-again", "--tolerance", "1e-7"]) == 0
    assert cli.main(["convert", "verify", "my-model", "my-model-again"]) == 0
    transformers.AutoModelForCausalLM.from_pretrained("my-policy-again")
    transformers.AutoTokenizer.from_pretrained("my-policy-again")
