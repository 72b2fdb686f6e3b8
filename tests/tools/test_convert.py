"""`ppomax convert` as a person meets it: output, exit codes, and what is left after a failure."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ppomax.engine import cli
from ppomax.engine.errors import CheckpointError, ConfigError
from ppomax.engine.models import checkpoint_writer, hf_writer
from ppomax.engine.models.hf_config import config_json
from ppomax.engine.models.hf_names import weight_sizes
from ppomax.engine.models.shape import ModelShape, RopeScaling
from ppomax.tools import convert as tool

SHAPE = ModelShape(
    vocab_size=250,
    hidden_size=8,
    num_layers=2,
    num_heads=4,
    num_query_groups=2,
    head_dim=2,
    ffn_hidden_size=12,
    max_position_embeddings=64,
    rope_theta=500000.0,
    norm_eps=1e-6,
    tie_embeddings=True,
    qkv_bias=True,
    family="qwen2",
    rope_scaling=RopeScaling("linear", 4.0),
)


def write_folder(folder: Path, shape: ModelShape) -> None:
    config = config_json(shape, dtype="bfloat16", bos_id=1, eos_id=2, pad_id=0)
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: torch.zeros(size, dtype=torch.bfloat16) for name, size in weight_sizes(shape).items()}
    save_file(weights, folder / "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "hf").mkdir()
    write_folder(tmp_path / "hf", SHAPE)
    return tmp_path / "hf"


def convert(*arguments: object) -> int:
    return cli.main(["convert", *map(str, arguments)])


LINES = [
    "family      qwen2",
    "head        vocabulary, tied to the embedding",
    # 250 * 8 + 8 + 2 * (192 attention + 16 bias + 288 feed-forward + 16 norms)
    "parameters  3,032",
    "tensors     26 bfloat16",
    "vocabulary  250",
    "layers      2, hidden 8, feed-forward 12",
    "attention   4 query heads, 2 key / value heads, head_dim 2, q, k, v biases",
    "context     64 tokens, rope_theta 500000, scaling linear by 4",
]


def test_inspect_prints_the_same_of_either_format(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert("inspect", folder) == 0
    assert capsys.readouterr().out.splitlines() == ["format      Hugging Face", *LINES]
    assert convert("hf-to-megatron", folder, tmp_path / "megatron", "--tp", 2) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'megatron'}: qwen2, 3,032 parameters\n"
    assert convert("inspect", tmp_path / "megatron") == 0
    # Per layer 2 norms, and at tp 2 two chunks of qkv, bias, projection and down projection, four of gate and up.
    expected = "format      Megatron distributed checkpoint, 31 chunks"
    assert capsys.readouterr().out.splitlines() == [expected, *LINES]


def test_a_missing_tokenizer_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("hf-to-megatron", folder, tmp_path / "megatron") == 0
    assert convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back") == 0
    assert "no tokenizer was found" in capsys.readouterr().out


def test_inspect_lists_tensors_on_demand(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("inspect", folder, "--tensors") == 0
    printed = capsys.readouterr().out
    assert "model.layers.1.self_attn.k_proj.bias            bfloat16  [4]\n" in printed
    assert sum("bfloat16  [" in line for line in printed.splitlines()) == 26


def test_inspect_names_the_head_of_a_reward_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path, replace(SHAPE, scalar=True, tie_embeddings=False))
    assert convert("inspect", tmp_path) == 0
    assert "head        scalar" in capsys.readouterr().out


def test_verify_reports_every_layer_and_fails_beyond_the_tolerance(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = 0.25
    save_file(weights, other / "model.safetensors")
    assert convert("verify", folder, other) == CheckpointError.exit_code
    printed = capsys.readouterr()
    assert [line.split() for line in printed.out.splitlines()] == [
        ["embedding", "0", "model.embed_tokens.weight"],
        ["layer", "0", "0", "model.layers.0.input_layernorm.weight"],
        ["layer", "1", "0.25", "model.layers.1.mlp.up_proj.weight"],
        ["final", "norm", "0", "model.norm.weight"],
    ]
    assert "differ by 0.25 in model.layers.1.mlp.up_proj.weight, more than --tolerance 0" in printed.err
    assert convert("verify", folder, other, "--tolerance", 0.25) == 0
    assert "largest difference 0.25 in 3,032 parameters" in capsys.readouterr().out


def test_diffs_are_made_and_merged(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = Path(shutil.copytree(folder, tmp_path / "tuned"))
    weights = load_file(tuned / "model.safetensors")
    save_file({name: torch.full_like(weight, 0.5) for name, weight in weights.items()}, tuned / "model.safetensors")
    assert convert("make-diff", folder, tuned, tmp_path / "diff") == 0
    assert "raw + diff gives back the tuned model exactly" in capsys.readouterr().out
    assert convert("merge-diff", folder, tmp_path / "diff", tmp_path / "merged") == 0
    assert convert("verify", tuned, tmp_path / "merged") == 0
    assert convert("merge-diff", folder, tmp_path / "diff", tmp_path / "fp32", "--dtype", "fp32") == 0
    assert load_file(tmp_path / "fp32/model.safetensors")["model.norm.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["hf-to-megatron", "a"], "the following arguments are required: DST"),
        (["hf-to-megatron", "a", "b", "--tp", "0"], "--tp 0: expected 1 or more"),
        (["hf-to-megatron", "a", "b", "--dtype", "int4"], "invalid choice: 'int4'"),
        (["megatron-to-hf", "a", "b", "--max-file-gb", "0"], "--max-file-gb 0: expected"),
        (["verify", "a", "b", "--role", "policy"], "neither a nor b is a training checkpoint"),
        (["verify", "a", "b", "--tolerance", "nan"], "--tolerance nan: expected"),
    ],
)
def test_a_wrong_command_line_is_a_config_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(*arguments) == ConfigError.exit_code
    assert message in capsys.readouterr().err


def bad_sources(root: Path, folder: Path) -> dict[str, tuple[Path, str]]:
    """Folders that cannot be converted, and what the message says."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(folder, root / name))

    missing = root / "missing"
    cut = copy("cut")
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[:-1])
    pickled = copy("pickled")
    torch.save({"weight": torch.zeros(3)}, pickled / "model.safetensors")
    old = copy("old")
    (old / "model.safetensors").rename(old / "pytorch_model.bin")
    family = copy("family")
    (family / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    vocabulary = copy("vocabulary")
    config = json.loads((vocabulary / "config.json").read_text())
    (vocabulary / "config.json").write_text(json.dumps(config | {"vocab_size": 251}))
    quantised = copy("quantised")
    weights = {name: torch.zeros(size, dtype=torch.int8) for name, size in weight_sizes(SHAPE).items()}
    save_file(weights, quantised / "model.safetensors")
    return {
        "missing": (missing, "cannot read"),
        "cut": (cut, "is not a whole safetensors file"),
        "a pickle called safetensors": (pickled, "or a renamed pickle"),
        "a pickle": (old, "which run code when they are loaded"),
        "wrong family": (family, "model_type 'mixtral' is not supported"),
        "wrong vocabulary": (vocabulary, "has shape [250, 8], not [251, 8]"),
        "quantised": (quantised, "choose a model that is not quantised"),
    }


def test_what_cannot_be_converted_ends_with_a_message_and_leaves_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad").mkdir()
    for name, (source, message) in bad_sources(tmp_path / "bad", folder).items():
        assert convert("hf-to-megatron", source, tmp_path / "out") == CheckpointError.exit_code, name
        printed = capsys.readouterr()
        assert message in printed.err, name
        assert "Traceback" not in printed.err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "hf"], name


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
def test_a_conversion_that_stops_in_the_middle_leaves_nothing(
    fault: BaseException,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert convert("hf-to-megatron", folder, tmp_path / "megatron") == 0

    def stop(*arguments: object, **keywords: object) -> None:
        raise fault

    monkeypatch.setattr(checkpoint_writer.CheckpointWriter, "finish", stop)
    monkeypatch.setattr(hf_writer, "write_side_files", stop)
    for arguments in (("hf-to-megatron", folder), ("megatron-to-hf", tmp_path / "megatron")):
        code = convert(*arguments, tmp_path / "out")
        assert code == (CheckpointError.exit_code if isinstance(fault, OSError) else cli.INTERRUPTED)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


FULL = """
import resource, sys
from ppomax.engine import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
sys.exit(cli.main(["convert", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("command", ["hf-to-megatron", "megatron-to-hf"])
def test_a_disk_that_is_full_is_said(command: str, folder: Path, tmp_path: Path) -> None:
    write_folder(folder, replace(SHAPE, vocab_size=4000))
    assert convert("hf-to-megatron", folder, tmp_path / "megatron") == 0
    source = folder if command == "hf-to-megatron" else tmp_path / "megatron"
    arguments = [sys.executable, "-c", FULL, command, str(source), str(tmp_path / "out")]
    done = subprocess.run(arguments, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == CheckpointError.exit_code, done.stderr
    assert "check the free space" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


KILLED = """
import sys, time
from ppomax.engine import cli, conversion
from ppomax.engine.models import hf_writer
def hang(*arguments, **keywords):
    print("almost done", flush=True)
    time.sleep(60)
conversion.write_side_files = hf_writer.write_side_files = hang
cli.main(["convert", *sys.argv[1:]])
"""


@pytest.mark.parametrize("command", ["hf-to-megatron", "megatron-to-hf"])
def test_what_a_killed_conversion_leaves_is_no_model(command: str, folder: Path, tmp_path: Path) -> None:
    assert convert("hf-to-megatron", folder, tmp_path / "megatron") == 0
    source = folder if command == "hf-to-megatron" else tmp_path / "megatron"
    arguments = [sys.executable, "-c", KILLED, command, str(source), str(tmp_path / "out")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "almost done\n"
        process.kill()
    assert not (tmp_path / "out").exists()
    (left,) = (path for path in tmp_path.iterdir() if path.name not in ("hf", "megatron"))
    assert convert("inspect", left) == CheckpointError.exit_code
    assert convert(command, source, tmp_path / "out") == 0


def test_importing_the_converter_needs_no_megatron() -> None:
    code = "import sys, ppomax.tools.convert; print([x for x in ('megatron', 'transformers') if x in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


@pytest.mark.parametrize("fault", ["heads", "template"])
def test_absurd_heads_and_odd_tokenizers_are_refused(tiny, tmp_path, fault):
    source = tmp_path / "source"
    shutil.copytree(tiny.model("policy"), source)
    if fault == "heads":
        content = json.loads((source / "config.json").read_text())
        content |= {"num_attention_heads": 10**9, "num_key_value_heads": 10**9, "head_dim": 2}
        (source / "config.json").write_text(json.dumps(content))
    else:
        (source / "chat_template.jinja").write_bytes(b"\xff\xfe")
        (source / "tokenizer_config.json").write_text('{"eos_token": ["x"], "added_tokens_decoder": [1]}')
    assert convert("hf-to-megatron", source, tmp_path / "out") == CheckpointError.exit_code
    assert not (tmp_path / "out").exists()


def test_sigterm_leaves_nothing_half_written(tmp_path, monkeypatch):
    """As Slurm and Kubernetes end a job; the handler of before is there again afterwards."""
    previous = signal.getsignal(signal.SIGTERM)

    def ended(*arguments, **settings):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal ends it before")

    monkeypatch.setattr(tool, "reshard", ended)
    with pytest.raises(SystemExit) as ending:
        tool.main(["reshard", "any", str(tmp_path / "out"), "--tp", "1"])
    assert ending.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is previous
