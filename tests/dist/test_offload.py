"""Offloading changes where the memory of idle roles is, and no number: whole stages, bit by bit, and what is on the
device in each phase.
"""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.dist
OnRanks = Callable[..., list[Any]]
Phases = dict[str, set[str]]

LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "one_process": (1, {}, "fp32"),
    "dp2_bf16": (2, {}, "bf16"),
    "tp2_pp2": (4, {"tp": 2, "pp": 2}, "fp32"),
}
MIXED = {"policy": {"tp": 2, "pp": 2}, "reference": {"tp": 2}, "reward": {"pp": 2, "vpp": 2}}


def run_stage(stage: str, config: dict[str, Any]) -> Phases:
    """On a worker: the stage, and which kinds of memory each role has on the device at each kind of work."""
    from ppomax.engine.config import RunConfig

    roles: list[Any] = []
    phases: Phases = {}

    def found(phase: str) -> None:
        here = {f"{role.name} {kind}" for role in roles for kind, size in device_bytes(role).items() if size > 0}
        assert phases.setdefault(phase, here) == here, f"{phase}: {here}, but earlier {phases[phase]}"

    def made(original: Callable) -> Callable:
        def make_role(*args: Any, **kwargs: Any) -> Any:
            roles.append(original(*args, **kwargs))
            return roles[-1]

        return make_role

    def computing(original: Callable, what: str) -> Callable:
        def run(modules: Any, *args: Any, **kwargs: Any) -> Any:
            found(f"{what} {next(role.name for role in roles if role.modules is modules)}")
            return original(modules, *args, **kwargs)

        return run

    def sampling(original: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> None:
            found("rollout")
            original(*args, **kwargs)

        return run

    def stepping(original: Callable) -> Callable:
        def launch_step(optimizer: Any, *args: Any) -> None:
            found(f"step {next(role.name for role in roles if role.optimizer is optimizer)}")
            original(optimizer, *args)

        return launch_step

    def module(name: str) -> Any:
        return import_module(f"ppomax.engine.{name}")

    update, scoring, optimizer = module("ppo.update"), module("ppo.scoring"), module("optim").FlatAdamW
    with (
        patch.object(module("models.roles"), "make_role", made(module("models.roles").make_role)),
        patch.object(scoring, "run_forward", computing(scoring.run_forward, "forward")),
        patch.object(update, "run_forward_backward", computing(update.run_forward_backward, "backward")),
        patch.object(module("rollout.generate"), "_run", sampling(module("rollout.generate")._run)),
        patch.object(optimizer, "launch_step", stepping(optimizer.launch_step)),
    ):
        module(f"train_{stage}").run(RunConfig.model_validate(config))
    return phases


def device_bytes(role: Any) -> dict[str, int]:
    """Of what Megatron, the layers and the optimizer see of a role, counted without the help of its RoleMemory."""
    tensors: dict[str, list[Tensor]] = {
        "weights": [parameter for chunk in role.chunks for parameter in chunk.parameters()],
        "gradients": [],
        "optimizer": [],
    }
    if role.optimizer is not None:
        tensors["gradients"] = [parameter.main_grad for parameter in tensors["weights"]]
        tensors["optimizer"] = [x for state in role.optimizer.optimizer.state.values() for x in state.values()]
        if role.stage.config.bf16:
            tensors["optimizer"] += list(role.optimizer.optimizer.state)  # main weights
    return {kind: sum(x.untyped_storage().nbytes() for x in found) for kind, found in tensors.items()}


def results(output: Path) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    files = sorted(output.glob("*hf/*.safetensors"))
    weights = {f"{file.parent.name} {name}": x for file in files for name, x in load_file(file).items()}
    return [{name: x for name, x in record.items() if name != "seconds"} for record in records], weights


def assert_bitwise(found: Path, expected: Path, *, last: int = 0) -> None:
    """last: compares so many records at the end; 0: all."""
    (ours, weights), (theirs, expected_weights) = results(found), results(expected)
    assert ours[-last:] == theirs[-last:]
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], x) for name, x in expected_weights.items())


Run = Callable[..., tuple[Path, Phases]]


@pytest.fixture(scope="module")
def run(on_ranks: OnRanks, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run(stage, layout, offload, **overrides) -> output folder and phases, once."""
    done: dict[Any, tuple[Path, Phases]] = {}

    def run_once(stage: str, layout: str, offload: str, **overrides: Any) -> tuple[Path, Phases]:
        key = (stage, layout, offload, repr(overrides))
        if key not in done:
            num_ranks, parallel, dtype = LAYOUTS[layout]
            output = tmp_path_factory.mktemp("offload") / "run"
            model = {"dtype": dtype} | overrides.pop("model", {})
            config = tiny.config(stage, output, parallel={**parallel, "offload": offload}, **overrides)
            config["model"] |= model
            first, *others = on_ranks(num_ranks, run_stage, stage, config)
            assert all(other == first for other in others)
            done[key] = (output, first)
        return done[key]

    return run_once


TRAINED = {"policy weights", "policy gradients", "critic weights", "critic gradients"}
FROZEN = {"reference weights", "reward weights"}
STATE = {"policy optimizer", "critic optimizer"}
PHASES: dict[str, Phases] = {
    "all": {
        "rollout": {"policy weights"},
        "forward reward": {"reward weights", "reference weights"},
        "forward reference": {"reference weights", "critic weights"},
        "forward critic": {"critic weights", "policy weights"},
        "forward policy": {"policy weights"},
        "backward policy": TRAINED,
        "backward critic": {*TRAINED, "policy optimizer"},
        "step policy": TRAINED | STATE,
        "step critic": {*TRAINED, "critic optimizer"},
    },
    "optimizer": {
        **dict.fromkeys(("rollout", "forward reward", "forward reference"), TRAINED | FROZEN),
        **dict.fromkeys(("forward critic", "forward policy", "backward policy"), TRAINED | FROZEN),
        "backward critic": {*TRAINED, *FROZEN, "policy optimizer"},
        "step policy": TRAINED | FROZEN | STATE,
        "step critic": {*TRAINED, *FROZEN, "critic optimizer"},
    },
}


@pytest.mark.parametrize(("layout", "offload"), [("one_process", "optimizer"), *((name, "all") for name in LAYOUTS)])
def test_ppo_is_bitwise_the_same_and_idle_roles_leave_the_device(run: Run, layout: str, offload: str) -> None:
    checkpoint = {"every": 0 if layout == "tp2_pp2" else 1}  # those of four ranks take long: test-all has them
    found, phases = run("ppo", layout, offload, checkpoint=checkpoint)
    assert phases == PHASES[offload]
    assert_bitwise(found, run("ppo", layout, "none", checkpoint=checkpoint)[0])


@pytest.mark.parametrize("layout", ["dp2_bf16", pytest.param("tp2_pp2", marks=pytest.mark.slow)])
def test_a_checkpoint_is_resumed_bitwise_whatever_was_on_the_host(run: Run, layout: str) -> None:
    expected, _ = run("ppo", layout, "none", checkpoint={"every": 1})
    saved, _ = run("ppo", layout, "all", checkpoint={"every": 1})
    first = saved / "checkpoints" / "step_00000001"
    found, _ = run("ppo", layout, "all", train={"resume": str(first)})
    assert_bitwise(found, expected, last=1)


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=pytest.mark.slow) for stage in ("sft", "reward", "critic")]
)
def test_other_stages_are_bitwise_the_same(run: Run, stage: str) -> None:
    found, phases = run(stage, "dp2_bf16", "all", checkpoint={"every": 1})
    assert_bitwise(found, run(stage, "dp2_bf16", "none", checkpoint={"every": 1})[0])
    if stage == "critic":  # the policy is frozen, and the reference too
        assert phases["rollout"] == {"policy weights"}
        assert phases["backward critic"] == {"critic weights", "critic gradients"}


VARIANTS: dict[str, dict[str, Any]] = {
    "full_kl": {"ppo": {"kl_estimator": "full", "entropy_target": 5.0}, "optim": {"joint_grad_clip": False}},
    "overlap_scoring": {"ppo": {"overlap_scoring": 2}},
    "evaluation": {"monitor": {"eval_every": 1, "eval_size": 5}},
    "over_sampling": {"ppo": {"over_sampling_size": 14, "partial_rollout": True}},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_ppo_are_bitwise_the_same(on_ranks: OnRanks, tiny: Any, tmp_path: Path, variant: str) -> None:
    for offload in ("none", "all"):
        config = tiny.config("ppo", tmp_path / offload, parallel={"offload": offload}, **VARIANTS[variant])
        if variant == "evaluation":
            config["data"]["eval"] = tiny.path("prompts.jsonl")
        on_ranks(1, run_variant, config)
    assert_bitwise(tmp_path / "all", tmp_path / "none")


@pytest.mark.slow
def test_roles_of_different_layouts_and_modes_are_bitwise_the_same(
    on_ranks: OnRanks, tiny: Any, tmp_path: Path
) -> None:
    modes = {"policy": "optimizer", "critic": "all", "reward": "all", "reference": "none"}
    for name, offload in (("none", {}), ("all", modes)):
        parallel = {role: {**MIXED.get(role, {}), "offload": offload.get(role, "none")} for role in modes}
        on_ranks(4, run_variant, tiny.config("ppo", tmp_path / name, parallel=parallel))
    assert_bitwise(tmp_path / "all", tmp_path / "none")


def run_variant(config: dict[str, Any]) -> None:
    from ppomax.engine.config import RunConfig

    import_module("ppomax.engine.train_ppo").run(RunConfig.model_validate(config))
