"""The launchers start from bash and from torchrun, and their 7B configurations are complete."""

import json
import os
import re
import socket
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file

from ppomax.engine.config_file import load_config
from ppomax.engine.config_models import ROLES, ArchitectureConfig
from ppomax.engine.data.tokenizer import load_tokenizer
from ppomax.engine.errors import CheckpointError
from ppomax.engine.models.hf_config import config_json
from ppomax.engine.models.hf_reader import RandomReader
from ppomax.engine.models.shape import shape_from_init
from ppomax.engine.parallel.layout import check_layout, make_layout

EXAMPLES = Path(__file__).parents[2] / "examples"
STAGES = {"sft": "sft", "reward": "reward", "critic": "critic", "ppo_max": "ppo"}
TOKENIZER = EXAMPLES / "data/quickstart/tokenizer.model"
# A pair is read as such by the reward model, as a dialogue by SFT and ptx, as a prompt by critic and PPO.
ROW = {"chosen": "\n\nHuman: Hi.\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi.\n\nAssistant: No."}
DATA = ["data.train=rows.jsonl", "data.eval=rows.jsonl", "data.ptx=rows.jsonl"]


def config_path(name):
    return str(EXAMPLES / "configs" / f"{name}_llama7b.toml")


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
    overrides = ["train.steps=1", "data.train=x", "model.policy=x", "model.reward=x"]
    if name == "ppo_max":
        overrides.append("data.ptx=x")
    preset = load_config(None, overrides, command=STAGES[name])
    assert (stated.ppo, stated.optim) == (preset.ppo, preset.optim)
    assert stated.sampling.model_copy(update={"batch_size": preset.sampling.batch_size}) == preset.sampling


def test_the_batch_script_is_valid_bash():
    subprocess.run(["bash", "-n", EXAMPLES / "slurm.sbatch"], check=True)


@pytest.mark.parametrize("name", STAGES)
def test_without_its_models_an_unmodified_launcher_names_each_of_them(name, tmp_path):
    command = [sys.executable, "-u", EXAMPLES / f"{name}_llama7b.sh", "--dry-run", "--world-size", "8"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == CheckpointError.exit_code
    config = load_config(config_path(name), [], command=STAGES[name])
    missing = [config.model.policy, config.model.tokenizer, *(source.path for source in config.data.train)]
    assert [path for path in missing if f"{path!r}: no such" not in done.stderr] == []
    assert "Traceback" not in done.stderr


def command_lines():
    """The commands of examples/README.md, as typed: its code blocks, a line ending in a backslash goes on."""
    blocks = re.findall(r"^```\n(.*?)^```$", (EXAMPLES / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in re.split(r"(?<!\\)\n", block) if line]


def sizes(config, role):
    """tp, pp and vpp of a role in a written configuration."""
    return tuple(config["parallel"][role][size] for size in ("tp", "pp", "vpp"))


@pytest.mark.parametrize("launcher", ["torchrun --nproc-per-node 8", "bash", "python"])
def test_the_readme_shows_every_way_to_start(launcher):
    assert any(f"{launcher} examples/" in line for line in command_lines())


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A current folder like a clone after `make quickstart`: examples/ and models, here of random weights."""
    root = tmp_path_factory.mktemp("clone")
    (root / "examples").symlink_to(EXAMPLES)
    tokenizer = load_tokenizer(TOKENIZER)
    init = ArchitectureConfig(hidden_size=32, num_layers=2, num_heads=4, num_query_groups=2, ffn_hidden_size=48)
    language_model = shape_from_init(init, tokenizer.vocab_size)
    for name in ("sft", "reward", "critic"):
        folder = root / "runs/quickstart" / name / "hf"
        folder.mkdir(parents=True)
        shape = replace(language_model, scalar=name != "sft")
        reader = RandomReader(shape, seed=1, std=0.1)
        save_file({key: reader.read(key).contiguous() for key in reader.sizes}, folder / "model.safetensors")
        ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
        (folder / "config.json").write_text(json.dumps(config_json(shape, dtype="float32", **ids)))
        tokenizer.save(folder)
    return root


@pytest.mark.parametrize("name", STAGES)
def test_python_runs_a_launcher_as_torchrun_does(name, clone, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    folders = {"policy": "sft", "reward": "reward", "critic": "critic", "reference": "sft"}
    models = [f"model.{role}={clone / 'runs/quickstart' / folder / 'hf'}" for role, folder in folders.items()]
    arguments = [*models, f"model.tokenizer={TOKENIZER}", *DATA, "parallel.tp=1", "parallel.pp=2"]
    command = [sys.executable, "-u", EXAMPLES / f"{name}_llama7b.sh", "--dry-run", "--world-size", "2", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    resolved = tomllib.loads(done.stdout)
    assert resolved["train"]["output"] == f"runs/{name}_llama7b"
    assert sizes(resolved, "policy") == (1, 2, 1)


@pytest.mark.dist
@pytest.mark.parametrize("starter", ["torchrun", "bash"])
def test_the_cpu_line_of_the_readme_runs_as_typed(clone, starter):
    (line,) = (line for line in command_lines() if f"train.output=runs/tiny_{starter}" in line)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # torchrun's default port may be taken by another job of this machine.
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PET_MASTER_PORT": str(port),
    }
    done = subprocess.run(["bash", "-c", line], cwd=clone, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run = clone / f"runs/tiny_{starter}"
    config = tomllib.loads((run / "config.toml").read_text())
    assert [sizes(config, role) for role in ROLES] == [(2, 1, 1)] * 4
    assert config["parallel"]["sequence_parallel"]
    records = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in records] == ["evaluation", "ppo", "evaluation"]
    assert records[1]["optimizer_steps"] == 2
    assert {path.name for path in run.iterdir()} >= {"hf", "critic_hf", "samples_000000.jsonl", "samples_000001.jsonl"}
