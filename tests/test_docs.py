"""What the documentation names exists: functions, tests, fields, files and command lines."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from ppomax.engine import cli
from ppomax.engine.config_checks import MODELS_READ
from ppomax.engine.config_file import load_config
from ppomax.engine.config_help import fields, sections
from ppomax.engine.config_models import ROLES, RoleLayout
from ppomax.engine.errors import ENDED_BY_SIGTERM
from ppomax.engine.parallel.layout import check_layout
from ppomax.engine.presets import PPO_MAX

ROOT = Path(__file__).parents[1]
README, PAPER = ROOT / "README.md", ROOT / "docs" / "paper.md"
EVERY = [README, PAPER, *sorted(ROOT.glob("docs/*.md")), ROOT / "examples" / "README.md", ROOT / "CONTRIBUTING.md"]
DOCUMENTS = pytest.mark.parametrize("path", list(dict.fromkeys(EVERY)), ids=lambda path: str(path.relative_to(ROOT)))


def names_of(path: Path) -> set[str]:
    """Functions, classes and their methods (Class.method) at the top of a Python file."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, kinds):
            names.add(node.name)
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, kinds)}
    return names


def code_spans(path: Path) -> list[str]:
    """What stands between single backticks outside of code blocks."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


def command_lines(path: Path) -> list[list[str]]:
    """Words of the command lines in code blocks, comments left out."""
    blocks = re.findall(r"^```\n(.*?)^```$", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def table(path: Path, heading: str) -> list[list[str]]:
    """Cells of the rows of the first table behind a heading, without its two lines of head."""
    behind = f"\n{path.read_text()}".split(f"\n{heading}\n", 1)[1]
    lines = re.findall(r"(?:^\|.*\n)+", behind, flags=re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@DOCUMENTS
def test_every_function_and_test_that_is_named_exists(path: Path) -> None:
    named = [match.groups() for span in code_spans(path) if (match := re.fullmatch(r"([\w./]+\.py):([\w.]+)", span))]
    assert named or path != PAPER
    missing = [f"{file}:{name}" for file, name in named if name not in names_of(ROOT / file)]
    assert missing == []


@DOCUMENTS
def test_every_field_that_is_named_exists(path: Path) -> None:
    known = {name for name, _ in sections()} | {key for key, _ in fields()}
    known |= {f"parallel.{size}" for size in RoleLayout.model_fields}
    known |= {f"parallel.{role}.{size}" for role in ROLES for size in RoleLayout.model_fields}
    prefix = "|".join(name for name, _ in sections() if "." not in name)
    named = [match[1] for span in code_spans(path) if (match := re.match(rf"((?:{prefix})\.[a-z_.]+)", span))]
    missing = [name for name in named if name not in known and not name.endswith((".toml", ".py", ".md"))]
    assert missing == []


@DOCUMENTS
def test_every_file_that_is_linked_exists(path: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("heading", ["## Equations", "## The twelve details of Fig. 5", "## Settings of the stages"])
def test_every_row_of_the_paper_table_names_function_test_and_field(heading: str) -> None:
    for row in table(PAPER, heading):
        *_, functions, tests, keys = row
        assert re.search(r"`(engine|kernels)/", functions), row
        assert "`tests/" in tests, row
        assert "`" in keys, row


def test_every_metric_of_the_paper_document_is_written_by_the_engine() -> None:
    sources = "".join(path.read_text() for path in ROOT.glob("engine/**/*.py"))
    names = [name for row in table(PAPER, "## Metrics") for name in re.findall(r"`(\w+)`", row[0])]
    assert len(names) > 20
    assert [name for name in names if f'"{name}"' not in sources] == []


def test_the_documents_list_the_twelve_details_and_star_those_of_ppo_max() -> None:
    for rows in (table(README, "## What PPO-max is here"), table(PAPER, "## The twelve details of Fig. 5")):
        assert [int(row[0].rstrip(" *")) for row in rows] == list(range(1, 13))
        assert [int(row[0].rstrip(" *")) for row in rows if "*" in row[0]] == [1, 5, 7, 8, 10, 11, 12]


@pytest.mark.parametrize(
    ("detail", "key"),
    [(1, "ppo.kl_coef"), (5, "ppo.reward_clip"), (7, "ppo.value_clip"), (10, "ppo.lam"), (11, "ppo.policy_clip")],
)
def test_the_readme_gives_the_values_of_the_preset(detail: int, key: str) -> None:
    assert f"{PPO_MAX[key]:g}" in table(README, "## What PPO-max is here")[detail - 1][3]


@pytest.mark.parametrize(
    ("path", "heading"),
    [(README, "## Exit codes"), (ROOT / "docs/exit_codes.md", "# Exit codes")],
    ids=["README", "docs"],
)
def test_the_table_of_exit_codes_is_that_of_the_errors(path: Path, heading: str) -> None:
    rows = table(path, heading)
    errors = [error.exit_code for error in cli.ERRORS]
    assert [int(code) for code, *_ in rows] == [0, 1, *errors, cli.INTERRUPTED, ENDED_BY_SIGTERM]
    assert [name for _, name, *_ in rows[2:-2]] == [f"`{error.__name__}`" for error in cli.ERRORS]
    if path == README:
        assert [meaning for *_, meaning in rows[2:-2]] == [(error.__doc__ or "").strip() for error in cli.ERRORS]


def stage_lines() -> list[list[str]]:
    """Command lines of README.md that start a stage with a configuration of the repository."""
    words = [line for line in command_lines(README) if any(word.startswith("examples/configs/") for word in line)]
    return [line for line in words if any(command in line for command in cli.STAGES)]


def test_the_readme_shows_every_stage_in_one_process_and_under_torchrun() -> None:
    for starter in ("ppomax", "torchrun"):
        lines = [line for line in stage_lines() if line[0] == starter]
        assert [word for line in lines for word in line if word in cli.STAGES] == [*cli.STAGES]


@pytest.mark.parametrize("line", stage_lines(), ids=lambda line: " ".join(line[:6]))
def test_a_command_line_of_the_readme_resolves(line: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command = next(word for word in line if word in cli.STAGES)
    file, *overrides = line[line.index(command) + 1 :]
    config = load_config(file, overrides, command=command)
    check_layout(config, int(line[line.index("--nproc-per-node") + 1]) if line[0] == "torchrun" else 1)
    assert bool(config.model.policy) == (command != "sft")
    assert bool(config.model.reward) == ("reward" in MODELS_READ[command])


@pytest.mark.parametrize(
    "line", [line for line in command_lines(README) if line[0] == "ppomax"], ids=lambda line: " ".join(line[:3])
)
def test_a_command_of_the_readme_exists(line: list[str]) -> None:
    assert line[1] in {**cli.STAGES, **cli.TOOLS}
    assert all(Path(ROOT / word).exists() for word in line if word.startswith("examples/"))


def test_the_recipe_of_the_readme_reads_what_its_preparation_writes() -> None:
    (prepare,) = (line for line in command_lines(README) if line[1] == "prepare-data")
    (recipe,) = (line for line in command_lines(README) if line[1] == "recipe")
    for path in (ROOT / recipe[2]).glob("*.toml"):
        files = re.findall(r'^(?:train|eval|ptx|tokenizer) = "(.*)"', path.read_text(), flags=re.MULTILINE)
        assert files
        assert {str(Path(file).parent) for file in files} == {prepare[-1]}
