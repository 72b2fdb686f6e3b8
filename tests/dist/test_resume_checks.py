"""A resume has the frozen models that the run had, says what the configuration changed, and finds exports beside it."""

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ppomax.engine.errors import CheckpointError

pytestmark = pytest.mark.dist
OnRanks = Callable[..., list[Any]]


def run_stage(stage: str, config: dict[str, Any]) -> None:
    from ppomax.engine.config import RunConfig

    import_module(f"ppomax.engine.train_{stage}").run(RunConfig.model_validate(config))


def identity_of(folder: str) -> Any:
    from ppomax.engine.models.identity import identify
    from ppomax.engine.parallel.device import start

    start(30)
    found = identify(folder)
    return found.sha256, found.shape


def notes_of(checkpoint: str, config: dict[str, Any]) -> list[str]:
    from ppomax.engine.checkpoint_verify import verify_checkpoint
    from ppomax.engine.config import RunConfig
    from ppomax.engine.parallel.device import start
    from ppomax.engine.resume_checks import check_resume, frozen_models

    start(30)
    run_config = RunConfig.model_validate(config)
    return check_resume(verify_checkpoint(checkpoint), run_config, frozen_models(run_config, "ppo"))


@pytest.fixture(scope="module")
def finished(on_ranks: OnRanks, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of two iterations with a checkpoint, and Hugging Face folders in it, after each."""
    output = tmp_path_factory.mktemp("finished") / "run"
    on_ranks(1, run_stage, "ppo", tiny.config("ppo", output, checkpoint={"every": 1, "hf": True}))
    return output


def step(output: Path, number: int) -> Path:
    return output / "checkpoints" / f"step_{number:08d}"


def moved(folder: str, target: Path) -> str:
    """The same model in another folder, spread over two files."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, target / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(target)


def altered(folder: str, target: Path) -> str:
    """A model of which one bit of one weight is another."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    weights["model.norm.weight"].view(torch.int32)[3] ^= 1
    save_file(weights, target / "model.safetensors")
    return str(target)


def test_a_resume_with_moved_models_and_no_named_reference_keeps_the_first_policy_as_reference(
    on_ranks: OnRanks, tiny: Any, tmp_path: Path, finished: Path
) -> None:
    output = tmp_path / "run"
    model = {name: moved(tiny.model(name), tmp_path / name) for name in ("policy", "reward")}
    train = {"resume": str(step(finished, 1))}
    on_ranks(1, run_stage, "ppo", tiny.config("ppo", output, model=model, train=train))
    ours, theirs = (json.loads((x / "metrics.jsonl").read_text().splitlines()[-1]) for x in (output, finished))
    assert ours["step"] == 2
    assert ours["kl"] > 0
    assert ours | {"seconds": 0} == theirs | {"seconds": 0}


def test_the_trained_policy_is_refused_as_the_reference(
    on_ranks: OnRanks, tiny: Any, tmp_path: Path, finished: Path
) -> None:
    trained = str(step(finished, 1) / "hf" / "policy")
    config = tiny.config("ppo", tmp_path / "run", model={"policy": trained}, train={"resume": str(step(finished, 1))})
    with pytest.raises(CheckpointError, match=r"model\.reference is empty and .* is not the reference") as e:
        on_ranks(1, run_stage, "ppo", config)
    assert f"set model.reference to the folder that it had ({tiny.model('policy')!r} then" in str(e.value)
    assert not (tmp_path / "run").exists()
    # With the reference that it had, the policy's folder does not matter: its weights are the checkpoint's.
    config["model"]["reference"] = tiny.model("policy")
    (notes,) = on_ranks(1, notes_of, str(step(finished, 1)), config)
    assert [note.split(" is ")[0] for note in notes] == [
        f"changed since step_00000001: {name}"
        for name in ("checkpoint.every", "checkpoint.hf", "model.policy", "model.reference")
    ]


def test_another_reward_model_is_refused_on_every_rank_count(
    on_ranks: OnRanks, tiny: Any, tmp_path: Path, finished: Path
) -> None:
    reward = altered(tiny.model("reward"), tmp_path / "reward")
    config = tiny.config("ppo", tmp_path / "run", model={"reward": reward})
    for num_ranks in (1, 3):
        with pytest.raises(CheckpointError, match=r"model.reward = .* its weights have SHA-256 \w+, expected \w+; set"):
            on_ranks(num_ranks, notes_of, str(step(finished, 1)), config)


def test_another_shape_of_the_same_weights_is_refused(
    on_ranks: OnRanks, tiny: Any, tmp_path: Path, finished: Path
) -> None:
    folder = Path(shutil.copytree(tiny.model("reward"), tmp_path / "reward"))
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"rms_norm_eps": 1e-5}))
    config = tiny.config("ppo", tmp_path / "run", model={"reward": str(folder)})
    with pytest.raises(CheckpointError, match=r"its norm_eps is 1e-05, expected 1e-06"):
        on_ranks(1, notes_of, str(step(finished, 1)), config)


def test_the_identity_does_not_depend_on_ranks_and_files(on_ranks: OnRanks, tiny: Any, tmp_path: Path) -> None:
    folders = tiny.model("policy"), moved(tiny.model("policy"), tmp_path / "moved")
    found = [one for ranks in (1, 2, 4) for folder in folders for one in on_ranks(ranks, identity_of, folder)]
    assert all(one == found[0] for one in found)
    assert on_ranks(1, identity_of, altered(folders[0], tmp_path / "altered"))[0][0] != found[0][0]


def test_a_resume_tells_each_field_that_has_changed(
    on_ranks: OnRanks, tiny: Any, tmp_path: Path, finished: Path
) -> None:
    same = {"checkpoint": {"every": 1, "hf": True}}
    config = tiny.config("ppo", tmp_path / "other", **same)
    assert on_ranks(1, notes_of, str(step(finished, 1)), config) == [[]]
    config = tiny.config("ppo", tmp_path / "other", optim={"lr": 5e-4}, ppo={"kl_coef": 0.2}, **same)
    assert on_ranks(1, notes_of, str(step(finished, 1)), config) == [
        [
            "changed since step_00000001: optim.lr is 0.0005, was 0.001",
            "changed since step_00000001: ppo.kl_coef is 0.2, was 0.1",
        ]
    ]


def test_the_hugging_face_folders_of_the_last_checkpoint_are_those_of_the_run(finished: Path) -> None:
    from ppomax.engine.checkpoint_manifest import read_manifest

    for role, exported in (("policy", "hf"), ("critic", "critic_hf")):
        beside = step(finished, 2) / "hf" / role
        names = sorted(path.name for path in beside.iterdir())
        assert names == sorted(path.name for path in (finished / exported).iterdir())
        assert all((beside / name).read_bytes() == (finished / exported / name).read_bytes() for name in names)
        assert f"hf/{role}/model.safetensors" in read_manifest(step(finished, 2))
