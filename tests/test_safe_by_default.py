"""Nothing in the package runs code from outside, and nothing that a run leaves behind holds the environment."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ppomax.engine.config import RunConfig
from ppomax.engine.metrics import RunLog, versions

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("engine", "kernels", "tools") for path in (ROOT / folder).rglob("*.py"))
LOADERS = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open", "joblib.load",
    "dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "os.system", "os.popen", "eval", "exec", "compile", "__import__", "pandas.read_pickle",
    "runpy.run_path",
}  # fmt: skip
"""Calls that run what a file or a text says."""


def name_of(node: ast.expr) -> str:
    """ "torch.load" of the expression torch.load."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def faults(source: str) -> Iterator[str]:
    """Calls and arguments in a source that run code from outside."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "marshal", "dill", "cloudpickle", "joblib"):
            yield f"{node.lineno}: from {node.module} import ...: import the module, so that its use is seen"
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        constants = {key: value.value for key, value in given.items() if isinstance(value, ast.Constant)}
        if name in LOADERS:
            yield f"{node.lineno}: {name}"
        if name == "torch.load" and constants.get("weights_only") is not True:
            yield f"{node.lineno}: torch.load without weights_only=True"
        for key, fine in (("trust_remote_code", False), ("shell", False), ("allow_pickle", False)):
            if key in given and constants.get(key, "?") is not fine:
                yield f"{node.lineno}: {name}({key}=...)"
        if name.split(".")[-1] in ("bind", "HTTPServer", "ThreadingHTTPServer", "TCPServer") and node.args:
            address = ast.unparse(node.args[0])
            if any(everywhere in address for everywhere in ("0.0.0.0", "'::'", "''", '""')):
                yield f"{node.lineno}: {name} listens on every interface"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_runs_code_from_outside(path: Path) -> None:
    assert list(faults(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(file)",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=asked)",
        "subprocess.run(text, shell=True)",
        "numpy.load(path, allow_pickle=True)",
        "eval(text)",
        "server.bind(('0.0.0.0', 1))",
        "ThreadingHTTPServer(('', 80), Handler)",
    ],
)
def test_the_reader_sees_each_of_them(source: str) -> None:
    assert len(list(faults(source))) == 1


def test_what_is_safe_is_left_alone() -> None:
    assert list(faults("torch.load(p, weights_only=True)\nmodel.eval()\nx.load_state_dict(y)\npickle.dump(a, f)")) == []


SECRET = "s3cr3t-value"


def test_a_run_folder_holds_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    config = RunConfig.model_validate({"train": {"output": str(tmp_path / "run")}})
    RunLog(config, "sft", is_writer=True, resumed=False)
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.name for path in written} >= {"config.toml", "versions.json"}
    assert not any(SECRET in path.read_text() for path in written)


def test_credentials_in_an_address_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["ppomax", "ppo", f"data.train=https://me:{SECRET}@host/rows.jsonl"])
    assert versions()["command"] == "ppo data.train=https://***@host/rows.jsonl"
    assert SECRET not in json.dumps(versions())


def test_a_run_folder_is_never_written_over(tmp_path: Path) -> None:
    config = RunConfig.model_validate({"train": {"output": str(tmp_path)}})
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(Exception, match="already holds a run"):
        RunLog(config, "sft", is_writer=True, resumed=False)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
