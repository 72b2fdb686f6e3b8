"""A run that is killed at a random moment, or gets a signal in any phase, goes on as if nothing had been: the same
records, rollouts, evaluations and weights, bit by bit; under another layout to float noise.

The killed runs have a pool of their own, whose workers are killed with the rank that dies. What torchrun does about it
is in test_signals.py.
"""

import hashlib
import json
import os
import random
import runpy
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ppomax.engine.errors import ConfigError, RunStopped
from ppomax.engine.run_records import lock_folder

pytestmark = pytest.mark.dist
FAILING = Path(__file__).with_name("failing_stage.py")
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
}
STEPS, EVERY = 6, 2
SECONDS = 400
"""For a run of a few seconds: the machine may be busy."""
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "carried": {"over_sampling_size": 9, "partial_rollout": True, "rollout_correction": "truncated"},
}


@dataclass(frozen=True)
class Case:
    """A stage under a layout, killed in training or while a checkpoint is written beside it; then another layout, if
    any, goes on.
    """

    stage: str
    layout: str
    moment: str = "training"
    then: str = ""
    variant: str = ""

    def __str__(self) -> str:
        return "-".join(part for part in (self.stage, self.layout, self.moment, self.then, self.variant) if part)


QUICK = Case("ppo", "tp2")
CASES = [
    QUICK,
    *(Case(stage, layout) for stage in ("sft", "reward", "critic") for layout in ("dp2", "tp2", "pp2")),
    *(Case("ppo", layout) for layout in ("dp2", "pp2")),
    *(Case("ppo", layout, "saving") for layout in ("dp2", "tp2", "pp2")),
    *(Case("ppo", layout, variant="carried") for layout in ("dp2", "tp2", "pp2")),
    Case("ppo", "tp2", then="dp2"),
    Case("ppo", "pp2", then="one"),
]


def run_stage(stage: str, config: dict[str, Any]) -> str:
    """Why it stopped; nothing where it ran to its end."""
    from ppomax.engine.config import RunConfig

    try:
        import_module(f"ppomax.engine.train_{stage}").run(RunConfig.model_validate(config))
    except RunStopped as reason:
        return str(reason)
    return ""


def run_until_killed(stage: str, config: dict[str, Any], victim: int, moment: str, step: int, fraction: float) -> None:
    if int(os.environ["RANK"]) == victim:
        arguments = (Path(config["train"]["output"]), moment, step, fraction)
        threading.Thread(target=kill_this, args=arguments, daemon=True).start()
    run_stage(stage, config)


def kill_this(output: Path, moment: str, step: int, fraction: float) -> None:
    """Kills this process when a checkpoint is published and a step is done (moment "saving": and the next checkpoint
    is being written), after a fraction of the time that the step took.
    """
    folder = output / "checkpoints"
    while not any(folder.glob("step_*")):
        time.sleep(0.002)
    while steps_of(output)[-1:] < [step]:
        time.sleep(0.002)
    if moment == "saving":
        while not any(folder.glob(".step_*.partial/*/*.distcp")):
            time.sleep(0.0005)
        time.sleep(0.02 * fraction)
    else:
        time.sleep(fraction * records_of_steps(output)[-1]["seconds"])
    os.kill(os.getpid(), signal.SIGKILL)


def records_of_steps(output: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The whole lines of a file of records, without events and evaluations."""
    path = output / name
    lines = [json.loads(line) for line in (path.read_text().split("\n")[:-1] if path.exists() else [])]
    return [line for line in lines if line["kind"] not in ("event", "evaluation")]


def steps_of(output: Path, name: str = "metrics.jsonl") -> list[int]:
    return [line["step"] for line in records_of_steps(output, name)]


def run_with_signal(config: dict[str, Any], phase: str, signum: int, victim: int) -> str:
    """PPO in which one rank gets a signal when it reaches a phase for the first time after a checkpoint."""
    module, name = runpy.run_path(str(FAILING))["PLACES"][phase]
    owner = import_module(f"ppomax.engine.{module}")
    *parents, name = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original, is_due = getattr(owner, name), int(os.environ["RANK"]) == victim

    def signalled(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_due
        if is_due and (Path(config["train"]["output"]) / "checkpoints" / "latest").exists():
            is_due = False
            os.kill(os.getpid(), signum)
        return original(*args, **kwargs)

    setattr(owner, name, signalled)
    try:
        return run_stage("ppo", config)
    finally:
        setattr(owner, name, original)


def wait_until_free(output: Path) -> None:
    """The system takes a moment to end a process that is killed."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return lock_folder(output).close()
        except ConfigError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture
def killable(pool: Any) -> Iterator[Callable[..., None]]:
    """Runs a job in which a rank is killed, and kills the others."""
    own = pool()

    def run(num_ranks: int, function: Callable[..., Any], *args: Any) -> None:
        with pytest.raises(RuntimeError, match=r"rank \d died"):
            own.run(num_ranks, function, *args, timeout=SECONDS)
        (config,) = (x for x in args if isinstance(x, dict))
        wait_until_free(Path(config["train"]["output"]))

    yield run
    own.close()


def config_of(tiny: Any, output: Path, stage: str, layout: str, variant: str = "", **overrides: Any) -> dict[str, Any]:
    """A short run with all that a resume has to carry: evaluations, ptx, adaptive KL. It saves nothing."""
    sections: dict[str, dict[str, Any]] = {
        "parallel": LAYOUTS[layout][1],
        "train": {"steps": STEPS, "resume": "auto"},
        "monitor": {"eval_every": 2, "eval_size": 4, "rollouts_every": 1},
    }
    if stage in ("critic", "ppo"):
        sections["ppo"] = {"rollout_size": 6, "minibatch_size": 3, "epochs": 1, **VARIANTS[variant]}
    if stage == "ppo":
        sections["ppo"] |= {"kl_controller": "adaptive", "kl_target": 0.01, "kl_horizon": 30}
        sections["data"] = {"eval": tiny.path("prompts.jsonl")}
    for name, values in overrides.items():
        sections[name] = sections.get(name, {}) | values
    return tiny.config(stage, output, num_layers=2, **sections)


@pytest.fixture(scope="module")
def straight(on_ranks: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Output folder of a run in one go."""
    done: dict[tuple[str, ...], Path] = {}

    def run(stage: str, layout: str, variant: str = "") -> Path:
        key = (stage, layout, variant)
        if key not in done:
            done[key] = tmp_path_factory.mktemp("straight") / "run"
            on_ranks(LAYOUTS[layout][0], run_stage, stage, config_of(tiny, done[key], *key), timeout=SECONDS)
        return done[key]

    return run


def result(output: Path) -> dict[str, Any]:
    """All that a run leaves which does not depend on the machine's speed: records (losses, gradient norms), tokens of
    rollouts, evaluations, sums of weights.
    """
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    texts = [*output.glob("rollouts/step_*.jsonl"), *output.glob("samples_*.jsonl")]
    files = sorted(output.glob("*hf/*.safetensors"))
    assert files
    return {
        "records": [{name: x for name, x in line.items() if "seconds" not in name} for line in lines],
        "texts": {path.name: path.read_text() for path in texts},
        "weights": {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
    }


def published(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").glob("step_*"))


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=str(c), marks=() if c == QUICK else pytest.mark.slow) for c in CASES]
)
def test_a_run_killed_at_a_random_moment_goes_on_exactly(
    on_ranks: Any, killable: Any, straight: Any, tiny: Any, tmp_path: Path, case: Case
) -> None:
    expected, output = straight(case.stage, case.layout, case.variant), tmp_path / "run"
    num_ranks = LAYOUTS[case.layout][0]
    victim, step, fraction = random.randrange(num_ranks), random.randint(EVERY, STEPS - 2), random.random()
    print(f"kills rank {victim} after step {step} and {fraction:.3f} of its time")
    config = config_of(tiny, output, case.stage, case.layout, case.variant, checkpoint={"every": EVERY})
    killable(num_ranks, run_until_killed, case.stage, config, victim, case.moment, step, fraction)
    assert published(output)
    assert not list(output.glob("*hf"))
    if case.moment == "saving":
        assert list((output / "checkpoints").glob(".step_*.partial"))
    print("published", published(output), "steps", steps_of(output))

    layout = case.then or case.layout
    config = config_of(tiny, output, case.stage, layout, case.variant)
    assert set(on_ranks(LAYOUTS[layout][0], run_stage, case.stage, config, timeout=SECONDS)) == {""}
    again = steps_of(output, "metrics.superseded.jsonl")
    assert all(x > int(published(output)[-1][5:]) for x in again), "it did not go on from the newest checkpoint"
    ours, theirs = result(output), result(expected)
    if not case.then:
        assert ours == theirs
        return
    assert [x["step"] for x in ours["records"]] == [x["step"] for x in theirs["records"]]
    for ours_of_step, theirs_of_step in zip(ours["records"], theirs["records"], strict=True):
        for name in ("policy_objective", "value_loss", "ptx_loss", "grad_norm", "reward", "kl_coef"):
            if name in theirs_of_step:
                assert ours_of_step[name] == pytest.approx(theirs_of_step[name], rel=1e-5, abs=1e-7), name
    for path in expected.glob("*hf/*.safetensors"):
        trained = load_file(output / path.relative_to(expected))
        for name, weight in load_file(path).items():
            assert (trained[name] - weight).norm() <= 1e-5 * weight.norm(), name


PHASES = ("rollout", "scoring", "policy_update", "critic_update", "copy", "write", "pointer")
"""The last three are of the next checkpoint."""
AT_ONCE: dict[str, dict[str, Any]] = {
    "checkpoint": {"every": 1, "keep": 99, "asynchronous": False},
    "train": {"steps": 12},
    "data": {"eval": ()},
}
"""Every step has its checkpoint before the next one begins: what is the last good one is known."""


@pytest.fixture(scope="module")
def of_phases(on_ranks: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("straight") / "run"
    config = config_of(tiny, output, "ppo", "tp2", **AT_ONCE | {"checkpoint": {}})
    on_ranks(2, run_stage, "ppo", config, timeout=SECONDS)
    return result(output)


def victim_in(phase: str) -> int:
    """A rank that gets there."""
    return 0 if phase == "pointer" else random.randrange(2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_rank_killed_in_any_phase_costs_one_step(
    on_ranks: Any, killable: Any, of_phases: dict[str, Any], tiny: Any, tmp_path: Path
) -> None:
    """One run, that goes on after each time from its last good checkpoint."""
    output = tmp_path / "run"
    config = config_of(tiny, output, "ppo", "tp2", **AT_ONCE)
    for phase in PHASES:
        killable(2, run_with_signal, config, phase, int(signal.SIGKILL), victim_in(phase))
        # Only the last one comes to a second checkpoint, and not to `latest`.
        last = 2 if phase == "pointer" else 1
        assert published(output) == [f"step_{step:08d}" for step in range(1, last + 1)], phase
        assert (output / "checkpoints" / "latest").read_text() == "step_00000001\n", phase
        assert 1 not in steps_of(output, "metrics.superseded.jsonl"), phase
    assert on_ranks(2, run_stage, "ppo", config, timeout=SECONDS) == ["", ""]
    assert result(output) == of_phases
    # None was set aside: it went on from the last good one.
    assert published(output) == [f"step_{step:08d}" for step in range(1, 13)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sigterm_in_any_phase_of_one_rank_loses_nothing(
    on_ranks: Any, of_phases: dict[str, Any], tiny: Any, tmp_path: Path
) -> None:
    output, step = tmp_path / "run", 1
    config = config_of(tiny, output, "ppo", "tp2", **AT_ONCE)
    for phase in PHASES:
        reasons = on_ranks(2, run_with_signal, config, phase, int(signal.SIGTERM), victim_in(phase), timeout=SECONDS)
        # In a save the ranks have already asked each other: the next step is the last one.
        step += 2 if phase in ("copy", "write", "pointer") else 1
        folder = output / "checkpoints" / f"step_{step:08d}"
        assert reasons[0] == reasons[1]
        assert reasons[0].startswith(f"stopped after step {step}, as SIGTERM asked: wrote {folder};"), phase
        assert published(output)[-1] == folder.name
        for name in ("metrics.jsonl", "timing.jsonl"):
            assert steps_of(output, name) == list(range(1, step + 1)), (name, phase)
    assert on_ranks(2, run_stage, "ppo", config, timeout=SECONDS) == ["", ""]
    assert result(output) == of_phases
    assert not (output / "metrics.superseded.jsonl").exists()
