"""The launchers start from bash and from torchrun, and their 7B configurations are complete."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ppomax.engine.config import ROLES
from ppomax.engine.config_file import load_config
from ppomax.engine.parallel.layout import check_layout, make_layout

EXAMPLES = Path(__file__).parents[2] / "examples"
STAGES = {"sft": "sft", "reward": "reward", "critic": "critic", "ppo_max": "ppo"}
HERE = ["model.policy=", "model.reward=", "model.critic=", "model.reference=", "model.tokenizer=tokenizer.json"]
TINY = [*HERE, "data.train=rows.jsonl", "data.eval=rows.jsonl", "data.ptx=rows.jsonl", "parallel.tp=1", "parallel.pp=2"]


def config_path(name):
    return str(EXAMPLES / "configs" / f"{name}_llama7b.toml")


@pytest.fixture
def folder(tmp_path):
    """A current folder with the files that TINY names."""
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "tokenizer.json").write_text("{}\n")
    return tmp_path


@pytest.mark.parametrize("name", STAGES)
def test_python_runs_a_launcher_as_torchrun_does(name, folder):
    command = [sys.executable, "-u", EXAMPLES / f"{name}_llama7b.sh", "--dry-run", "--world-size", "2", *TINY]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    resolved = tomllib.loads(done.stdout)
    assert resolved["train"]["output"] == f"runs/{name}_llama7b"
    assert resolved["parallel"]["policy"] == {"tp": 1, "pp": 2}


@pytest.mark.parametrize("name", STAGES)
def test_bash_hands_a_launcher_and_its_arguments_to_torchrun(name, tmp_path):
    torchrun = tmp_path / "torchrun"
    torchrun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    torchrun.chmod(0o755)
    launcher = str(EXAMPLES / f"{name}_llama7b.sh")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "GPUS_PER_NODE": "2"}
    done = subprocess.run(
        ["bash", launcher, "a=b c", "--dry-run"], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["--standalone", "--nproc-per-node=2", launcher, "a=b c", "--dry-run"]


@pytest.mark.parametrize("name", STAGES)
def test_a_7b_config_fills_a_node_of_eight(name):
    config = load_config(config_path(name), [], command=STAGES[name])
    check_layout(config, 8)
    assert make_layout("policy", config.parallel.policy, 8).dp == 1
    assert config.model.dtype == "bf16"


def test_all_four_roles_of_ppo_take_tp_4_and_pp_2():
    parallel = load_config(config_path("ppo_max"), [], command="ppo").parallel
    assert [(getattr(parallel, role).tp, getattr(parallel, role).pp) for role in ROLES] == [(4, 2)] * 4


@pytest.mark.parametrize("name", ["critic", "ppo_max"])
def test_a_7b_config_leaves_nothing_to_the_preset(name):
    by_preset, bare = (
        load_config(config_path(name), [f"ppo.preset={preset}"], command=STAGES[name]) for preset in ("ppo_max", "none")
    )
    assert by_preset.model_copy(update={"ppo": by_preset.ppo.model_copy(update={"preset": "none"})}) == bare


@pytest.mark.parametrize("name", ["critic", "ppo_max"])
def test_a_7b_config_states_the_values_of_ppo_max(name):
    stated = load_config(config_path(name), [], command=STAGES[name])
    overrides = ["train.steps=1", "data.train=x", "model.tokenizer=x"]
    if name == "ppo_max":
        overrides.append("data.ptx=x")
    preset = load_config(None, overrides, command=STAGES[name])
    assert (stated.ppo, stated.optim) == (preset.ppo, preset.optim)
    assert stated.sampling.model_copy(update={"batch_size": preset.sampling.batch_size}) == preset.sampling


def test_the_batch_script_is_valid_bash():
    subprocess.run(["bash", "-n", EXAMPLES / "slurm.sbatch"], check=True)
