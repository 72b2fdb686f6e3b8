"""Resuming a stage goes on as if it had never stopped; damaged and hostile checkpoints are refused before they run."""

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ppomax.engine.config_models import ROLES
from ppomax.engine.errors import CheckpointError

pytestmark = pytest.mark.dist
OnRanks = Callable[..., list[Any]]

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one_process": (1, {}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
    "tp2_pp2": (4, {"tp": 2, "pp": 2}),
    "pp2_tied": (2, {"pp": 2}),  # the policy shares its embedding with its head
    "tp2_tied": (2, {"tp": 2}),
    "pp2_vpp2_tied": (2, {"pp": 2, "vpp": 2}),
    "pp2_uneven_tied": (2, {"pp": 2, "last_stage_layers": 1}),
    "critic_first": (
        2,
        {role: {"num_ranks": 1} if role in ("critic", "reward") else {"first_rank": 1} for role in ROLES},
    ),
}
LR, NUM_STEPS = 1e-3, 12  # three iterations of two epochs of two minibatches
LOSSES = ("policy_objective", "value_loss", "entropy", "ptx_loss", "grad_norm", "reward", "reward_running_std")
PPO = {"train": {"steps": 3}, "checkpoint": {"every": 2}}


def run_stage(stage: str, config: dict[str, Any]) -> None:
    from ppomax.engine.config import RunConfig

    import_module(f"ppomax.engine.train_{stage}").run(RunConfig.model_validate(config))


def error_of_stage(stage: str, config: dict[str, Any]) -> str:
    try:
        run_stage(stage, config)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def load_policy_from(folder: str, config: dict[str, Any], vocab_size: int) -> None:
    """Loads the policy of a checkpoint, without the rest of the stage."""
    from ppomax.engine.checkpoint import load_checkpoint
    from ppomax.engine.checkpoint_verify import verify_checkpoint
    from ppomax.engine.config import RunConfig
    from ppomax.engine.models.roles import load_policy, role_groups
    from ppomax.engine.parallel.device import start

    start(30)
    run_config = RunConfig.model_validate(config)
    policy = load_policy(run_config, role_groups(run_config)["policy"], vocab_size, trained=True)
    load_checkpoint(verify_checkpoint(folder), {"policy": policy})


def adam_after_load(folder: str, config: dict[str, Any], vocab_size: int) -> tuple[list[str], list[Any]]:
    """What loading says of Adam's settings, and those of each parameter group afterwards."""
    from ppomax.engine.checkpoint import load_checkpoint
    from ppomax.engine.checkpoint_verify import verify_checkpoint
    from ppomax.engine.config import RunConfig
    from ppomax.engine.models.roles import load_policy, role_groups
    from ppomax.engine.parallel.device import start

    start(30)
    run_config = RunConfig.model_validate(config)
    policy = load_policy(run_config, role_groups(run_config)["policy"], vocab_size, trained=True)
    _, changes = load_checkpoint(verify_checkpoint(folder), {"policy": policy})
    assert policy.optimizer is not None
    groups = policy.optimizer.param_groups
    return changes, [(tuple(group["betas"]), group["eps"], group["weight_decay"], group["step"]) for group in groups]


def folders_of_second_saves(config: dict[str, Any], vocab_size: int, folder: str) -> None:
    """Saves policy and critic twice with one Saver, all numbers changed in between, and then once with another."""
    from ppomax.engine.checkpoint_folders import Retention
    from ppomax.engine.checkpoint_saver import Saver
    from ppomax.engine.checkpoint_writers import InlineWriter
    from ppomax.engine.config import RunConfig
    from ppomax.engine.models.roles import load_critic, load_policy, role_groups
    from ppomax.engine.parallel.device import start

    start(60)
    run_config = RunConfig.model_validate(config)
    groups = role_groups(run_config)
    roles = {
        "policy": load_policy(run_config, groups["policy"], vocab_size, trained=True),
        "critic": load_critic(run_config, groups["critic"]),
    }
    savers = [
        Saver(f"{folder}/{name}", InlineWriter(), Retention(5), resumed=None, timeout_seconds=60)
        for name in ("one", "other")
    ]
    savers[0].save(1, roles, {"state": {}})
    for role in roles.values():
        with torch.no_grad(), role.memory.resident("weights", "optimizer"):
            for chunk in role.chunks:
                for parameter in chunk.parameters():
                    parameter += 1.5
            if role.optimizer is not None:
                for tensor in role.optimizer.state_tensors():
                    tensor += 2.5
                role.optimizer.count_step()
    for saver in savers:
        saver.save(2, roles, {"state": {}})
        saver.finish()


def last_record(output: Path) -> dict[str, float]:
    record = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    return {name: value for name, value in record.items() if name != "seconds"}


def weights(output: Path) -> dict[str, Tensor]:
    return {
        f"{file.parent.name} {name}": weight
        for file in sorted(output.glob("*hf/*.safetensors"))
        for name, weight in load_file(file).items()
    }


@pytest.fixture(scope="module")
def straight(on_ranks: OnRanks, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Output folder of three PPO iterations in one go under a layout, with a checkpoint after the second."""
    done: dict[str, Path] = {}

    def run(layout: str) -> Path:
        if layout not in done:
            num_ranks, parallel = LAYOUTS[layout]
            done[layout] = tmp_path_factory.mktemp(layout) / "straight"
            config = tiny.config("ppo", done[layout], tied="tied" in layout, parallel=parallel, **PPO)
            on_ranks(num_ranks, run_stage, "ppo", config)
        return done[layout]

    return run


@pytest.fixture
def resume(on_ranks: OnRanks, tiny: Any, tmp_path: Path) -> Callable[[Path, str], Path]:
    """Runs what is left after a checkpoint under a layout; returns the output folder."""

    def run(checkpoint: Path, layout: str) -> Path:
        num_ranks, parallel = LAYOUTS[layout]
        output = tmp_path / "resumed"
        overrides = {**PPO, "train": {"steps": 3, "resume": str(checkpoint)}}
        config = tiny.config("ppo", output, tied="tied" in layout, parallel=parallel, **overrides)
        on_ranks(num_ranks, run_stage, "ppo", config)
        return output

    return run


def step_2(output: Path) -> Path:
    return output / "checkpoints" / "step_00000002"


@pytest.mark.parametrize(
    "layout",
    [
        "tp2",
        "dp2",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("critic_first", "pp2_tied", "pp2_vpp2_tied")),
    ],
)
def test_a_resumed_ppo_run_is_bitwise_the_run_without_a_stop(straight, resume, layout: str) -> None:
    expected = straight(layout)
    found = resume(step_2(expected), layout)
    assert last_record(found) == last_record(expected)
    assert last_record(found)["step"] == 3
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ("tp2", "pp2"),
        ("dp2", "tp2_pp2"),
        *(
            pytest.param(*layouts, marks=pytest.mark.slow)
            for layouts in (
                ("critic_first", "tp2_pp2"),
                ("tp2", "dp2"),
                ("dp2", "one_process"),
                ("pp2_tied", "tp2_tied"),
                ("pp2_vpp2_tied", "tp2_tied"),
                ("pp2_tied", "pp2_vpp2_tied"),
                ("pp2_tied", "pp2_uneven_tied"),
                ("tp2", "critic_first"),
            )
        ),
    ],
)
def test_another_layout_can_go_on_from_a_checkpoint(straight, resume, saved: str, loaded: str) -> None:
    expected = straight(saved)
    found = resume(step_2(expected), loaded)
    ours, theirs = last_record(found), last_record(expected)
    for name in LOSSES:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    trained = weights(found)
    for name, weight in weights(expected).items():
        torch.testing.assert_close(trained[name], weight, rtol=0, atol=0.05 * LR * NUM_STEPS)
        assert (trained[name] - weight).norm() <= 1e-5 * weight.norm()


@pytest.mark.parametrize(
    "stage", ["sft", *(pytest.param(name, marks=pytest.mark.slow) for name in ("reward", "critic"))]
)
def test_other_stages_resume_bitwise_from_their_newest_checkpoint(
    on_ranks: OnRanks, tiny: Any, tmp_path: Path, stage: str
) -> None:
    output = tmp_path / "run"
    overrides: dict[str, Any] = {"train": {"steps": 3}, "data": {"eval": ()}, "checkpoint": {"every": 2}}
    on_ranks(1, run_stage, stage, tiny.config(stage, output, **overrides))
    straight = last_record(output), weights(output)
    overrides["checkpoint"], overrides["train"] = {}, {"steps": 3, "resume": "auto"}
    on_ranks(1, run_stage, stage, tiny.config(stage, output, **overrides))
    assert [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert last_record(output) == straight[0]
    assert all(torch.equal(weight, straight[1][name]) for name, weight in weights(output).items())


@pytest.mark.parametrize(
    ("layout", "offload"),
    [
        ("dp2", "all"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("one_process", "none"),
                ("tp2_pp2", "optimizer"),
                ("pp2_tied", "all"),
                ("critic_first", "none"),
            )
        ),
    ],
)
def test_later_saves_hold_what_a_first_save_would(
    on_ranks: OnRanks, tiny: Any, tmp_path: Path, layout: str, offload: str
) -> None:
    """They go by the plan of the first."""
    num_ranks, parallel = LAYOUTS[layout]
    config = tiny.config("ppo", tmp_path / "run", tied="tied" in layout, parallel={**parallel, "offload": offload})
    on_ranks(num_ranks, folders_of_second_saves, config, 277, str(tmp_path))
    first, one, other = (tmp_path / name for name in ("one/step_00000001", "one/step_00000002", "other/step_00000002"))
    files = sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    # Pickles of equal content differ in which objects they share, and the manifest has their checksums.
    for file in files:
        if file.name == ".metadata":
            ours, theirs = (pickle.loads((path / file).read_bytes()) for path in (one, other))
            assert ours.storage_data == theirs.storage_data
            assert ours.state_dict_metadata == theirs.state_dict_metadata
        elif file.name == "common.pt":
            ours, theirs = (torch.load(path / file, weights_only=True) for path in (one, other))
            assert ours == theirs
        elif file.name != "manifest.json":
            assert (one / file).read_bytes() == (other / file).read_bytes(), file
    data = [file for file in files if file.suffix == ".distcp"]
    assert len(data) >= 2
    assert all((first / file).read_bytes() != (one / file).read_bytes() for file in data)
    steps = [
        torch.load(path / "policy/common.pt", weights_only=True)["optimizer"]["optimizer"] for path in (first, one)
    ]
    assert [{group["step"] for group in step["param_groups"]} for step in steps] == [{0}, {1}]


def test_a_checkpoint_holds_no_pickled_objects(straight) -> None:
    """torch loads such entries without its guard: they could run code."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    for path in step_2(straight("tp2")).glob("*/.metadata"):
        entries = pickle.loads(path.read_bytes()).state_dict_metadata
        assert entries
        assert not any(isinstance(entry, BytesStorageMetadata) for entry in entries.values())


@pytest.fixture
def copied(straight, tmp_path: Path) -> Path:
    return Path(shutil.copytree(step_2(straight("tp2")), tmp_path / "step_00000002"))


def seal(checkpoint: Path) -> None:
    """Makes checksums right again, as somebody would who puts code into a checkpoint."""
    from ppomax.engine.checkpoint_manifest import files_below, record_of, write_manifest

    write_manifest(checkpoint, {name: record_of(checkpoint / name) for name in files_below(checkpoint)})


def load(on_ranks: OnRanks, tiny: Any, tmp_path: Path, checkpoint: Path) -> None:
    on_ranks(1, load_policy_from, str(checkpoint), tiny.config("sft", tmp_path / "run"), 277)


def test_a_whole_checkpoint_loads(on_ranks: OnRanks, tiny: Any, tmp_path: Path, copied: Path) -> None:
    load(on_ranks, tiny, tmp_path, copied)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("megatron.core.dist_checkpointing.serialization", "os.system"),
        ("torch.distributed.checkpoint.filesystem", "os.system"),
        ("torch.distributed.checkpoint.metadata", "os"),
    ],
)
def test_metadata_that_names_anything_else_is_refused(
    on_ranks: OnRanks, tiny: Any, tmp_path: Path, copied: Path, module: str, name: str
) -> None:
    command = f"touch {tmp_path / 'ran'}"
    # Protocol 4: names may have dots.
    code = b"\x80\x04" + b"".join(pickle.dumps(text, 4)[2:-1] for text in (module, name)) + b"\x93"
    code += pickle.dumps(command, 4)[2:-1] + b"\x85R."
    (copied / "policy" / ".metadata").write_bytes(code)
    seal(copied)
    with pytest.raises(CheckpointError, match=rf"policy.\.metadata: refused: it names {module}.{name}"):
        load(on_ranks, tiny, tmp_path, copied)
    assert not (tmp_path / "ran").exists()


def test_metadata_that_declares_pickled_objects_is_refused(
    on_ranks: OnRanks, tiny: Any, tmp_path: Path, copied: Path
) -> None:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    path = copied / "policy" / ".metadata"
    content = pickle.loads(path.read_bytes())
    content.state_dict_metadata[next(iter(content.state_dict_metadata))] = BytesStorageMetadata()
    path.write_bytes(pickle.dumps(content))
    seal(copied)
    with pytest.raises(CheckpointError, match="refused"):
        load(on_ranks, tiny, tmp_path, copied)


def test_a_hostile_common_file_is_refused(on_ranks: OnRanks, tiny: Any, tmp_path: Path, copied: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"x": Payload()}, copied / "policy" / "common.pt")
    seal(copied)
    with pytest.raises(CheckpointError, match="policy"):
        load(on_ranks, tiny, tmp_path, copied)
    assert not (tmp_path / "ran").exists()


def verify_damaged(folder: str, seed: int, number: int) -> list[str]:
    """Damages files of a checkpoint one after another, and repairs them; returns the damages that went unseen."""
    from ppomax.engine.checkpoint_verify import verify_checkpoint
    from ppomax.engine.parallel.device import start

    start(30)
    draw, checkpoint = random.Random(seed), Path(folder)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    contents = {path: path.read_bytes() for path in files}
    unseen = []
    for turn in range(number):
        path = files[turn % len(files)]  # every file in turn
        content = contents[path]
        where, length = draw.randrange(len(content)), draw.randint(1, 64)
        damages = {
            "flip": content[:where] + bytes([content[where] ^ (1 << draw.randrange(8))]) + content[where + 1 :],
            "cut": content[:where],
            "appended": content + bytes(length),
            "inserted": content[:where] + draw.randbytes(length) + content[where:],
            "zeros": content[:where] + bytes(length) + content[where + length :],
            "of another file": contents[files[(turn + 1) % len(files)]],
            "missing": None,
        }
        name = draw.choice(sorted(damages))
        damaged = damages[name]
        if damaged == content:
            continue
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        try:
            verify_checkpoint(checkpoint)
            unseen.append(f"{path} {name} at {where}")
        except CheckpointError as error:
            if path.name not in str(error) or str(checkpoint) not in str(error):
                unseen.append(f"{path} {name} at {where}: {error}")
        path.write_bytes(content)
    verify_checkpoint(checkpoint)
    return unseen


def test_no_damage_of_any_file_goes_unseen(on_ranks: OnRanks, copied: Path) -> None:
    assert on_ranks(1, verify_damaged, str(copied), 0, 400) == [[]]


def error_of_load(folder: str) -> str:
    from ppomax.engine.checkpoint_verify import find_checkpoint
    from ppomax.engine.parallel.device import start

    start(30)
    try:
        found = find_checkpoint(folder, "")
    except CheckpointError as error:
        return str(error)
    return str(found.checkpoint)


def test_every_rank_names_the_damaged_files_and_older_checkpoints(on_ranks: OnRanks, copied: Path) -> None:
    shutil.copytree(copied, copied.with_name("step_00000001"))
    path = copied / "critic" / "__1_0.distcp"
    size = path.stat().st_size
    path.unlink()
    state = copied / "state.json"
    state.write_bytes(state.read_bytes().replace(b'"step": 2', b'"step": 3'))
    errors = on_ranks(4, error_of_load, str(copied))
    assert len(set(errors)) == 1
    assert f"checkpoint {copied} is damaged" in errors[0]
    assert f"{path}: expected {size} bytes, found no such file" in errors[0]
    assert f"{state}: expected SHA-256 " in errors[0]
    assert errors[0].endswith("older ones are step_00000001")


def test_the_configurations_adam_settings_count_and_changes_are_told(
    on_ranks: OnRanks, tiny: Any, tmp_path: Path, copied: Path
) -> None:
    same = tiny.config("sft", tmp_path / "run")
    ((changes, groups),) = on_ranks(1, adam_after_load, str(copied), same, 277)
    assert changes == []
    assert {group[:3] for group in groups} == {((0.9, 0.95), 1e-6, 0.0)}
    other = tiny.config("sft", tmp_path / "run", optim={"betas": [0.8, 0.99], "eps": 1e-7, "weight_decay": 0.1})
    ((changes, changed),) = on_ranks(1, adam_after_load, str(copied), other, 277)
    assert {group[:3] for group in changed} == {((0.8, 0.99), 1e-7, 0.1)}
    assert [group[3] for group in changed] == [group[3] for group in groups]
    assert "policy: Adam's betas is [0.8, 0.99] from now on; the checkpoint was trained with [0.9, 0.95]" in changes
    assert len(changes) == 3


def test_a_checkpoint_of_another_shape_is_refused(on_ranks: OnRanks, tiny: Any, tmp_path: Path, copied: Path) -> None:
    model = {"policy": "", "tokenizer": tiny.model("policy"), "init": {"hidden_size": 32, "ffn_hidden_size": 48}}
    with pytest.raises(CheckpointError, match="does not fit this model: vocab_size is 277, not 300"):
        on_ranks(1, load_policy_from, str(copied), tiny.config("sft", tmp_path / "run", model=model), 300)


def test_a_checkpoint_of_another_stage_is_refused(on_ranks: OnRanks, tiny: Any, tmp_path: Path, straight) -> None:
    overrides = {"train": {"resume": str(step_2(straight("tp2")))}}
    with pytest.raises(CheckpointError, match="reward missing"):
        on_ranks(1, run_stage, "reward", tiny.config("reward", tmp_path / "run", **overrides))


def test_every_rank_of_a_diverging_run_names_step_and_last_good_checkpoint(
    on_ranks: OnRanks, tiny: Any, tmp_path: Path, straight
) -> None:
    checkpoint = step_2(straight("tp2"))
    overrides = {"optim": {"lr": 1e30}, "train": {"steps": 3, "resume": str(checkpoint), "max_skipped_steps": 0}}
    config = tiny.config("ppo", tmp_path / "run", parallel={"tp": 2, "pp": 2}, **overrides)
    errors = on_ranks(4, error_of_stage, "ppo", config)
    assert len(set(errors)) == 1
    assert errors[0].startswith("DivergedError: optimizer step 10: ")
    assert f"Last good checkpoint: {checkpoint}." in errors[0]
