"""The built wheel holds every module, and each can be imported where the source tree is out of sight."""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("engine", "kernels", "tools")

IMPORT_ALL = """
import importlib, sys
site, dependencies, *modules = sys.argv[1:]
sys.path[:0] = [site]
sys.path.append(dependencies)
for name in modules:
    assert importlib.import_module(name).__file__.startswith(site), name
print(len(modules))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that neither old build files nor a running job are touched."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*FOLDERS, "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, source]
    subprocess.run(command, check=True)
    return next(out.glob("ppomax-*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_every_module(wheel):
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith((".py", ".c", ".h", ".js", ".css"))}
    sources = [*python_files(), *(ROOT / "kernels").glob("cpu_*"), *(ROOT / "tools/report_assets").iterdir()]
    assert inside == {f"ppomax/{path.relative_to(ROOT).as_posix()}" for path in sources}


@pytest.mark.slow
def test_every_module_of_the_wheel_can_be_imported_from_another_folder(wheel, tmp_path):
    """`python -S` leaves out the .pth files, and with them the editable install of the source tree."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    names = [".".join(("ppomax", *path.relative_to(ROOT).with_suffix("").parts)) for path in python_files()]
    if importlib.util.find_spec("triton") is None:
        names = [name for name in names if not name.endswith("_triton")]
    command = [sys.executable, "-S", "-c", IMPORT_ALL, tmp_path / "site", sysconfig.get_path("purelib"), *names]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) == len(names)


def python_files():
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
