"""Imports point downward: the table of layers in docs/design.md holds for every file."""

import ast
import fnmatch
import graphlib
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("engine", "kernels", "tools")
    for path in ROOT.glob(f"{folder}/**/*.py")
)


def expand_braces(pattern):
    """["a/b.py", "a/c.py"] from "a/{b,c}.py"."""
    head, brace, tail = pattern.partition("{")
    if not brace:
        return [pattern]
    choices, _, rest = tail.partition("}")
    return [head + choice + rest for choice in choices.split(",")]


def layer_patterns():
    """{pattern of a path from the root: layer} from docs/design.md, exact names before patterns with a star."""
    patterns = {}
    for layer, cell in re.findall(r"^\| (\d+) \| (.*) \|$", (ROOT / "docs/design.md").read_text(), flags=re.MULTILINE):
        for name in itertools.chain.from_iterable(map(expand_braces, re.findall(r"`([^`]*\.py)`", cell))):
            rooted = name if name.startswith(("kernels/", "tools/", "engine/")) else f"engine/{name}"
            patterns[rooted] = int(layer)
    return dict(sorted(patterns.items(), key=lambda item: "*" in item[0]))


PATTERNS = layer_patterns()


def layer_of(path):
    return next((layer for pattern, layer in PATTERNS.items() if fnmatch.fnmatch(path, pattern)), None)


def imported_modules(path):
    """Dotted names that a file imports, wherever in the file the import stands."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (names if node.module in {"ppomax", *map(package_of, FILES)} else [node.module])


def package_of(path):
    return "ppomax." + str(Path(path).parent).replace("/", ".")


def imported_files(path):
    return [
        name.removeprefix("ppomax.").replace(".", "/") + ".py"
        for name in imported_modules(path)
        if name.startswith("ppomax.")
    ]


@pytest.mark.parametrize("path", FILES)
def test_every_file_has_a_layer_and_imports_only_lower_ones(path):
    own = layer_of(path)
    assert own is not None, f"{path} is missing from the table of layers in docs/design.md"
    folder = path.partition("/")[0]
    for imported in imported_files(path):
        if folder in ("kernels", "tools") and imported.startswith(f"{folder}/"):
            continue
        layer = layer_of(imported)
        assert layer is not None, f"{path} imports {imported}, which is missing from the table"
        assert layer < own, f"{path} (layer {own}) imports {imported} (layer {layer})"


def test_no_file_imports_itself_through_others():
    graph = {path: [imported for imported in imported_files(path) if imported in FILES] for path in FILES}
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_kernels_import_nothing_of_the_engine():
    crossing = [
        (path, name)
        for path in FILES
        for name in imported_modules(path)
        if path.startswith("kernels/") and name.startswith(("ppomax.engine", "ppomax.tools", "megatron"))
    ]
    assert crossing == []


def test_triton_is_imported_only_by_triton_files():
    importers = [path for path in FILES if any(name.split(".")[0] == "triton" for name in imported_modules(path))]
    assert [path for path in importers if not path.endswith("_triton.py")] == []


def test_ppo_sees_no_tp_or_pp():
    hidden = {"engine/parallel/groups.py", "engine/parallel/layout.py"}
    assert [path for path in FILES if path.startswith("engine/ppo/") and hidden & set(imported_files(path))] == []


def test_only_the_command_line_imports_tools():
    assert [
        path
        for path in FILES
        if path.startswith("engine/") and any(name.startswith("tools/") for name in imported_files(path))
    ] == ["engine/cli.py"]


def test_the_import_reader_sees_every_way_of_importing():
    assert "engine/train_ppo.py" in imported_files("engine/stage.py")
    assert "engine/config.py" in imported_files("engine/config_file.py")


def test_the_table_names_no_file_that_is_gone():
    assert [pattern for pattern in PATTERNS if "*" not in pattern and pattern not in FILES] == []
