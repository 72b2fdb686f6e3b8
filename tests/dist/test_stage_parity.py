"""Every stage gives the numbers of one process under every layout: losses, gradient norms, rollouts and final weights.

Each run is a stage's real `run(config)`, from Hugging Face folders and data files to the exported folder, on workers of
the pool. The cases are ragged on purpose: a mean of per-rank or per-micro-batch means is wrong in them, and is caught.
"""

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.dist

LOSSES = {"sft": ["loss"], "reward": ["loss"], "critic": ["value_loss"], "ppo": ["policy_objective", "value_loss"]}
STAGES = tuple(LOSSES)
RELATIVE = 1e-5
NEAR_TIE = 1e-5
WEIGHT_SHARE = 0.05
"""Of lr * steps: Adam makes a full step of what little noise a vanishing gradient has."""
PASS_THROUGH_ZERO = dict.fromkeys(
    (
        *("policy_loss", "approx_kl", "kl", "kl_k3", "kl_estimate", "difference_mean", "explained_variance"),
        *("advantage_mean", "advantage_p01", "advantage_p99", "reward_min", "reward_max"),
    ),
    2e-6,
)
"""Absolute tolerances of means, and of 1 - variance / variance, whose terms, of size 1, cancel."""
NOISE = {
    "sampler_mismatch_mean": 1e-5,
    "sampler_mismatch_max": 1e-4,
    "sampler_mismatch_k3": 1e-8,
    "first_step_kl": 1e-8,
}
"""Bounds of what is rounding noise itself."""
EVENT = ("step", "detector", "severity", "action")

MEGATRON = {
    "megatron.core.distributed.distributed_data_parallel.DistributedDataParallel",
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer",
}
SCHEDULES = "megatron.core.pipeline_parallel.schedules."


@dataclass(frozen=True)
class Case:
    """How a stage is spread. tied: the policy shares its embedding with its head. num_layers: of all models."""

    num_ranks: int
    parallel: dict[str, Any] = field(default_factory=dict)
    tokens_per_microbatch: int = 200
    tied: bool = False
    num_layers: int = 4


CASES = {
    "tp2_pp2": Case(4, {"tp": 2, "pp": 2}),
    "dp2": Case(2),
    "tp2_sequence_parallel": Case(2, {"tp": 2, "sequence_parallel": True}),
    "pp2_tied": Case(2, {"pp": 2}, tied=True),
    "pp2_vpp2": Case(2, {"pp": 2, "vpp": 2}, tokens_per_microbatch=70),
    "small_microbatches": Case(1, tokens_per_microbatch=70),
}
SLOW_CASES = {
    "pp2_dp2_tied": Case(4, {"pp": 2}, tied=True),
    "pp2_uneven_tied": Case(2, {"pp": 2, "first_stage_layers": 1}, tied=True),
    "tp2": Case(2, {"tp": 2}),
    "pp2_vpp2_uneven_tied": Case(2, {"pp": 2, "vpp": 2, "first_stage_layers": 2}, tied=True, num_layers=6),
    "pp2_vpp2_both_uneven": Case(2, {"pp": 2, "vpp": 2, "first_stage_layers": 4, "last_stage_layers": 2}, num_layers=6),
    "pp4_uneven": Case(4, {"pp": 4, "first_stage_layers": 1, "last_stage_layers": 3}, num_layers=8),
    "pp2_vpp2_tied": Case(2, {"pp": 2, "vpp": 2}, tied=True),
    "pp2_vpp2_dp2": Case(4, {"pp": 2, "vpp": 2}),
    "tp2_pp2_vpp2_sequence_parallel_tied": Case(
        4, {"tp": 2, "pp": 2, "vpp": 2, "sequence_parallel": True}, tokens_per_microbatch=70, tied=True
    ),
    "pp2_vpp4_tied": Case(2, {"pp": 2, "vpp": 4}, tied=True, num_layers=8),
    "pp4_vpp2_tied": Case(4, {"pp": 4, "vpp": 2}, tokens_per_microbatch=70, tied=True, num_layers=8),
}
ON_FIRST, ON_SECOND = {"num_ranks": 1}, {"first_rank": 1}
SPLIT = Case(2, {"policy": ON_FIRST, "reference": ON_FIRST, "critic": ON_SECOND, "reward": ON_SECOND})
"""Policy and reference on one rank, critic and reward model on the other."""
SPLIT_CASES = {
    "tp2_and_tp2": Case(
        4,
        {
            "tp": 2,
            "policy": {"num_ranks": 2},
            "reference": {"num_ranks": 2},
            "critic": {"first_rank": 2},
            "reward": {"first_rank": 2},
        },
    ),
    "critic_first": Case(2, {"policy": ON_SECOND, "reference": ON_SECOND, "critic": ON_FIRST, "reward": ON_FIRST}),
}
SLOW_SPLIT_CASES = {
    "dp2_and_pp2": Case(
        4,
        {
            "policy": {"num_ranks": 2},
            "reference": {"num_ranks": 2, "tp": 2},
            "critic": {"first_rank": 2, "pp": 2},
            "reward": {"first_rank": 2},
        },
        tied=True,
    ),
    "overlapping": Case(
        4,
        {
            "policy": {"num_ranks": 3},
            "reference": {"first_rank": 3},
            "critic": {"first_rank": 2, "pp": 2, "vpp": 2},
            "reward": {"tp": 2},
        },
    ),
}
MIXED = Case(
    4,
    {
        "policy": {"tp": 2, "pp": 2},
        "critic": {"tp": 1, "pp": 1},
        "reference": {"tp": 2, "pp": 1},
        "reward": {"tp": 1, "pp": 2, "vpp": 2},
    },
)
FIRST_FOUR, LAST_FOUR = {"num_ranks": 4}, {"first_rank": 4}
EIGHT_RANKS = {
    "tp2_pp2_dp2_sequence_parallel": Case(8, {"tp": 2, "pp": 2, "sequence_parallel": True}),
    "split_offload_all": Case(
        8,
        {
            "offload": "all",
            "policy": {**FIRST_FOUR, "tp": 2, "pp": 2},
            "reference": {**FIRST_FOUR, "tp": 2},
            "critic": {**LAST_FOUR, "pp": 2},
            "reward": {**LAST_FOUR, "tp": 2, "pp": 2},
        },
    ),
    "mixed_offload_all": Case(
        8,
        {
            "offload": "all",
            "sequence_parallel": True,
            "policy": {"tp": 2, "pp": 2},
            "critic": {"tp": 2},
            "reference": {"pp": 4, "vpp": 2},
            "reward": {"tp": 1},
        },
        num_layers=8,
    ),
}


@dataclass(frozen=True)
class Run:
    """What a run wrote, and what its ranks saw. steps: the metrics of each optimizer step. classes: of the
    trained roles' modules and optimizers, and what they inherit from.
    """

    steps: list[dict[str, float]]
    rollouts: list[dict[str, Tensor]]
    classes: set[str]
    schedules: set[str]
    metrics: list[dict[str, Any]]
    weights: dict[str, Tensor]


Runner = Callable[..., Run]


@pytest.fixture(scope="module")
def run(on_ranks: Callable[..., list[Any]], tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """run(stage, case, mutation="", **overrides); a run without overrides happens once."""
    done: dict[Any, Run] = {}

    def run_case(stage: str, case: Case, *, mutation: str = "", **overrides: dict[str, Any]) -> Run:
        key = (stage, repr(case), mutation, repr(overrides))
        if key not in done:
            output = tmp_path_factory.mktemp(stage) / "run"
            train = {"tokens_per_microbatch": case.tokens_per_microbatch, **overrides.pop("train", {})}
            config = tiny.config(
                stage,
                output,
                tied=case.tied,
                num_layers=case.num_layers,
                parallel=case.parallel,
                train=train,
                **overrides,
            )
            timeout = 120 if case.num_ranks <= 4 else 400
            first, *others = on_ranks(case.num_ranks, traced_run, stage, config, mutation, timeout=timeout)
            for other in others:
                assert other["steps"] == first["steps"], "ranks have different metrics"
            lines = (output / "metrics.jsonl").read_text().splitlines()
            files = sorted(output.glob("*hf/*.safetensors"))
            weights = {f"{file.parent.name} {name}": x for file in files for name, x in load_file(file).items()}
            done[key] = Run(**first, metrics=[json.loads(line) for line in lines], weights=weights)
        return done[key]

    return run_case


def traced_run(stage: str, config: dict[str, Any], mutation: str) -> dict[str, Any]:
    """On a worker: the stage, while what it calls is recorded."""
    from ppomax.engine.config import RunConfig

    modules = {name: import_module(f"ppomax.engine.{name}") for name in ("train_sft", "train_reward", "ppo.update")}
    trace: dict[str, Any] = {"steps": [], "rollouts": [], "classes": set(), "schedules": set()}

    def step(original: Callable) -> Callable:
        def apply_gradients(trained: Any, *args: Any) -> dict[str, float]:
            stats = original(trained, *args)
            trace["steps"].append(stats)
            for role, _ in trained:
                trace["classes"] |= {full_name(base) for x in (*role.modules, role.optimizer) for base in type(x).mro()}
            return stats

        return apply_gradients

    def experienced(original: Callable) -> Callable:
        def make_experience(rollout: Any, *args: Any, **kwargs: Any) -> Any:
            trace["rollouts"].append(vars(rollout))
            return original(rollout, *args, **kwargs)

        return make_experience

    def scheduled(original: Callable) -> Callable:
        def get_forward_backward_func(**kwargs: Any) -> Callable:
            schedule = original(**kwargs)
            trace["schedules"].add(full_name(schedule))
            return schedule

        return get_forward_backward_func

    with contextlib.ExitStack() as patches:

        def wrap(module: ModuleType, name: str, wrapper: Callable) -> None:
            patches.enter_context(patch.object(module, name, wrapper(getattr(module, name))))

        for module in modules.values():
            wrap(module, "apply_gradients", step)
        for name in ("train_critic", "train_ppo"):
            wrap(import_module(f"ppomax.engine.{name}"), "make_experience", experienced)
        wrap(import_module("ppomax.engine.parallel.pipeline"), "get_forward_backward_func", scheduled)
        if mutation:
            for module in (import_module("ppomax.engine.steps"), modules["train_reward"], modules["ppo.update"]):
                wrap(module, "run_forward_backward", lambda original: mean_of_means(original, mutation))
            # The losses form their gradients before the fault, and would refuse to be scaled.
            wrap(import_module("ppomax.engine.models.heads"), "_training", without("main_grad"))
            for name in ("linear_policy_loss", "value_head_loss"):
                wrap(import_module(f"ppomax.kernels.{name}"), "with_gradients", ignoring("upstream_is_one"))
        import_module(f"ppomax.engine.train_{stage}").run(RunConfig.model_validate(config))
    return trace


def without(key: str) -> Callable:
    return lambda original: lambda *args: {**original(*args), key: None}


def ignoring(option: str) -> Callable:
    return lambda original: lambda *args, **options: original(*args, **{**options, option: False})


def full_name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def mean_of_means(original: Callable, unit: str) -> Callable:
    """The classic fault: each rank, or each micro-batch, takes the mean over its own tokens; the means are averaged."""

    def run_forward_backward(chunks: Any, groups: Any, packs: Any, loss: Callable, num_metrics: int) -> Tensor:
        mine = sum(pack.rows.numel() for pack in packs)
        total = torch.tensor(float(mine))
        dist.all_reduce(total, group=groups.megatron.dp)

        def faulty(hidden: Tensor, pack: Any) -> tuple[Tensor, Tensor]:
            value, metrics = loss(hidden, pack)
            own = mine if unit == "rank" else len(packs) * pack.rows.numel()
            factor = float(total) / (groups.layout.dp * max(1, own))
            return value * factor, metrics * factor

        return original(chunks, groups, packs, faulty, num_metrics)

    return run_forward_backward


def one_process(case: Case) -> Case:
    return Case(1, tied=case.tied, num_layers=case.num_layers)


def assert_same_run(found: Run, expected: Run, *, lr: float = 1e-3) -> dict[str, float]:
    """Compares two runs; returns the largest differences. A tie in sampling ends the comparison at its rollout."""
    num_steps = len(expected.steps)
    num_same = num_same_rollouts(found.rollouts, expected.rollouts)
    complete = num_same == len(expected.rollouts)
    if not complete:
        num_steps = num_steps * num_same // len(expected.rollouts)
    assert len(found.steps) == len(expected.steps)
    worst = {"loss": 0.0, "grad_norm": 0.0}
    records = [*zip(found.steps[:num_steps], expected.steps[:num_steps], strict=True)]
    if complete:
        records += zip(found.metrics, expected.metrics, strict=True)
    for number, (ours, theirs) in enumerate(records):
        assert ours.keys() == theirs.keys()
        if theirs.get("kind") == "event":  # its texts and numbers are those of the records before it
            assert [ours[name] for name in EVENT] == [theirs[name] for name in EVENT]
            continue
        for name in theirs.keys() - {"seconds", "kind", "reward_histogram"}:
            where = f"record {number}, {name}: {ours[name]} instead of {theirs[name]}"
            if name in NOISE:
                assert max(abs(ours[name]), abs(theirs[name])) < NOISE[name], where
                continue
            difference = abs(ours[name] - theirs[name])
            assert difference <= RELATIVE * abs(theirs[name]) + PASS_THROUGH_ZERO.get(name, 0), where
            kind = "grad_norm" if name.startswith("grad_norm") else "loss"
            if difference and name not in PASS_THROUGH_ZERO:
                worst[kind] = max(worst[kind], difference / abs(theirs[name]))
    if complete:
        worst |= compare_weights(found.weights, expected.weights, lr * num_steps)
    return worst


def num_same_rollouts(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> int:
    """Rollouts before the first one that parts at a near tie, which is printed; any other difference fails."""
    assert len(found) == len(expected)
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        width = min(ours["tokens"].shape[1], theirs["tokens"].shape[1])
        same = ours["tokens"][:, :width] == theirs["tokens"][:, :width]
        if same.all() and ours["tokens"].shape == theirs["tokens"].shape:
            continue
        for b in (~same.all(1)).nonzero().flatten().tolist():
            column = int((~same[b]).nonzero()[0]) - 1
            margin = float(theirs["margins"][b, column])
            print(f"rollout {number}, prompt {b} parts in column {column}: margin {margin:.1e}")
            assert margin <= NEAR_TIE
        return number
    return len(expected)


def compare_weights(found: dict[str, Tensor], expected: dict[str, Tensor], scale: float) -> dict[str, float]:
    assert found.keys() == expected.keys()
    worst = {"weights_absolute": 0.0, "weights_norm": 0.0}
    for name, theirs in expected.items():
        difference = (found[name] - theirs).double()
        absolute = float(difference.abs().max()) / scale
        relative = float(difference.norm() / theirs.double().norm())
        assert absolute <= WEIGHT_SHARE, f"{name} is off by {absolute} * lr * steps"
        assert relative <= RELATIVE, f"{name} is off by {relative} of its norm"
        worst = {
            "weights_absolute": max(worst["weights_absolute"], absolute),
            "weights_norm": max(worst["weights_norm"], relative),
        }
    return worst


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", CASES)
def test_a_stage_gives_the_numbers_of_one_process(run: Runner, stage: str, name: str) -> None:
    case = CASES[name]
    found, expected = run(stage, case), run(stage, one_process(case))
    assert len(expected.steps) >= 3
    print(stage, name, {kind: f"{value:.1e}" for kind, value in assert_same_run(found, expected).items()})


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", SLOW_CASES)
def test_more_layouts_give_the_numbers_of_one_process(run: Runner, stage: str, name: str) -> None:
    case = SLOW_CASES[name]
    found, expected = run(stage, case), run(stage, one_process(case))
    print(stage, name, {kind: f"{value:.1e}" for kind, value in assert_same_run(found, expected).items()})


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", CASES)
def test_the_classes_at_work_are_megatrons(run: Runner, stage: str, name: str) -> None:
    found = run(stage, CASES[name])
    parallel = CASES[name].parallel
    schedule = "forward_backward_no_pipelining"
    if parallel.get("pp", 1) > 1:
        interleaved = parallel.get("vpp", 1) > 1
        schedule = f"forward_backward_pipelining_{'with' if interleaved else 'without'}_interleaving"
    assert found.classes >= MEGATRON
    assert found.schedules == {SCHEDULES + schedule}


EARLY = {"overlap_scoring": 2}


def test_roles_may_have_different_layouts(run: Runner) -> None:
    print(assert_same_run(run("ppo", MIXED), run("ppo", one_process(MIXED))))


@pytest.mark.parametrize("name", SPLIT_CASES)
def test_roles_on_ranks_of_their_own_give_the_numbers_of_one_process(run: Runner, name: str) -> None:
    case = SPLIT_CASES[name]
    print(name, assert_same_run(run("ppo", case), run("ppo", one_process(case))))


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_SPLIT_CASES)
def test_more_placements_give_the_numbers_of_one_process(run: Runner, name: str) -> None:
    case = SLOW_SPLIT_CASES[name]
    print(name, assert_same_run(run("ppo", case), run("ppo", one_process(case))))


@pytest.mark.slow
@pytest.mark.parametrize("name", EIGHT_RANKS)
def test_eight_ranks_give_the_numbers_of_one_process(run: Runner, name: str) -> None:
    case = EIGHT_RANKS[name]
    print(name, assert_same_run(run("ppo", case), run("ppo", one_process(case))))


SPLIT_VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "full_kl": {"ppo": {"kl_estimator": "full"}, "optim": {"joint_grad_clip": False}},
    "target_kl": {"ppo": {"target_kl": 2e-3, "epochs": 3, "old_logprobs": "rollout"}},
    "entropy_target": {"ppo": {"entropy_target": 5.0, "over_sampling_size": 18}},
}


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=() if name == "full_kl" else pytest.mark.slow) for name in SPLIT_VARIANTS]
)
def test_variants_of_ppo_work_with_roles_on_ranks_of_their_own(run: Runner, tiny: Any, variant: str) -> None:
    held_out = {"data": {"eval": tiny.path("prompts.jsonl")}, "monitor": {"eval_size": 3}}
    overrides = SPLIT_VARIANTS[variant] | held_out
    found, expected = (run("ppo", case, **overrides) for case in (SPLIT, one_process(SPLIT)))
    print(variant, assert_same_run(found, expected))
    assert "evaluation" in {record["kind"] for record in found.metrics}
    if variant == "target_kl":
        assert min(record.get("optimizer_steps", 6) for record in found.metrics) < 6


def test_partial_rollouts_reach_the_ranks_that_do_not_sample(run: Runner) -> None:
    ppo = {"partial_rollout": True, "over_sampling_size": 18, "rollout_correction": "truncated"}
    found, expected = (run("ppo", case, ppo=ppo, train={"steps": 3}) for case in (SPLIT, one_process(SPLIT)))
    assert max(record["carried_tokens"] for record in expected.metrics) > 0
    assert found.steps == expected.steps  # each role is whole on its rank: the same bits


def test_a_critic_on_ranks_of_its_own_is_pretrained_as_in_one_process(run: Runner) -> None:
    print(assert_same_run(run("critic", SPLIT), run("critic", one_process(SPLIT))))


def test_only_the_ranks_of_a_role_hold_it(on_ranks: Callable[..., list[Any]], tiny: Any, tmp_path: Path) -> None:
    held = on_ranks(2, parameters_held, tiny.config("ppo", tmp_path / "run", parallel=SPLIT.parallel))
    assert [sorted(name for name, count in ours.items() if count) for ours in held] == [
        ["policy", "reference"],
        ["critic", "reward"],
    ]


def parameters_held(config: dict[str, Any]) -> dict[str, int]:
    """On a worker: the number of parameters of each role."""
    from ppomax.engine.config import RunConfig
    from ppomax.engine.session import open_session
    from ppomax.engine.train_ppo import load_models

    run_config = RunConfig.model_validate(config)
    with open_session(run_config, "ppo", tokenizer_source=run_config.model.policy) as session:
        models = {name: role for name, role in vars(load_models(session)).items() if role is not None}
    return {name: sum(x.numel() for chunk in role.chunks for x in chunk.parameters()) for name, role in models.items()}


VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "full_kl": {"ppo": {"kl_estimator": "full"}, "optim": {"joint_grad_clip": False}},
    "entropy_target": {"ppo": {"entropy_target": 5.0, "dual_clip": 1.5, "mask_no_eos": True, "advantage_clip": 0.8}},
    "importance_sampling": {"ppo": {"importance_sampling": True, "objective": "penalty", "old_logprobs": "rollout"}},
    "recompute": {"model": {"recompute": "full"}},
    "recompute_selective": {"model": {"recompute": "selective"}},
}
SLOW_VARIANTS = {"recompute_selective", "entropy_target", "importance_sampling"}


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=pytest.mark.slow if name in SLOW_VARIANTS else ()) for name in VARIANTS]
)
def test_variants_of_ppo_give_the_numbers_of_one_process(run: Runner, variant: str) -> None:
    overrides = VARIANTS[variant]
    found, expected = (run("ppo", case, **overrides) for case in (CASES["tp2_pp2"], one_process(CASES["tp2_pp2"])))
    print(variant, assert_same_run(found, expected))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(1), marks=pytest.mark.slow, id="one_process"),
        pytest.param(CASES["dp2"], marks=pytest.mark.slow, id="dp2"),
        pytest.param(MIXED, id="mixed"),
    ],
)
def test_scoring_while_others_are_sampled_gives_the_numbers_of_scoring_afterwards(run: Runner, case: Case) -> None:
    found, expected = run("ppo", case, ppo=EARLY), run("ppo", case)
    assert min(record["scored_early"] for record in found.metrics) > 0.2
    same = [{name: x for name, x in record.items() if name != "scored_early"} for record in found.metrics]
    print(assert_same_run(replace(found, metrics=same), expected))


def test_the_ppo_case_clips_and_is_ragged(run: Runner) -> None:
    expected = run("ppo", Case(1))
    assert max(stats["clip_fraction"] for stats in expected.steps) > 0.1
    assert max(stats["value_clip_fraction"] for stats in expected.steps) > 0.1
    assert min(stats["grad_norm"] for stats in expected.steps) > 1.0  # the gradient is clipped
    for rollout in expected.rollouts:
        lengths = rollout["response_mask"].sum(1)
        assert lengths.min() < lengths.max() / 2
        assert 0 < rollout["finished"].sum() < len(lengths)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("unit", "name"), [("rank", "dp2"), ("micro-batch", "small_microbatches")])
def test_a_mean_of_means_is_caught(run: Runner, stage: str, unit: str, name: str) -> None:
    expected, faulty = run(stage, Case(1)), run(stage, CASES[name], mutation=unit)
    for loss in LOSSES[stage]:
        wrong_by = abs(faulty.steps[0][loss] / expected.steps[0][loss] - 1)
        print(f"{stage}: {loss} as a mean of {unit} means is wrong by {wrong_by:.3f}")
        assert wrong_by > 1e-2
    with pytest.raises(AssertionError):
        assert_same_run(faulty, expected)
