"""What is installed is what lies in the tree."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("engine", "kernels", "tools")


def setup_folders():
    """The literal FOLDERS of setup.py, read without running it."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FOLDERS":
            return ast.literal_eval(node.value)
    raise AssertionError("setup.py has no FOLDERS")


def tracked_files():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: only tracked files are checked")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_setup_lists_every_folder_that_holds_python():
    holding = {
        path.parent.relative_to(ROOT).as_posix() for folder in SOURCES for path in ROOT.glob(f"{folder}/**/*.py")
    }
    assert set(setup_folders()) == holding


def test_no_init_file_shadows_another_package():
    assert [str(path) for folder in SOURCES for path in ROOT.glob(f"{folder}/**/__init__.py")] == []


def test_no_file_names_a_path_of_one_machine():
    machine_path = re.compile(r"/(work|root|tmp|home)/[a-z]")
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.name}: {line}" for line in text.splitlines() if machine_path.search(line)]
    assert found == []


def test_shell_scripts_are_executable():
    scripts = [path for path in tracked_files() if path.suffix == ".sh" or path == ROOT / ".ci/run"]
    assert [path.name for path in scripts if not path.stat().st_mode & 0o100] == []
