"""`ppomax generate` on four ranks writes what it writes in one process, once, and says it once."""

import contextlib
import io
import json
from pathlib import Path

import pytest

from ppomax.engine import cli

ARGUMENTS = ("sampling.max_new_tokens=16", "sampling.temperature=1.2", "--samples", "2", "--stop", "e")

pytestmark = pytest.mark.dist


def run_command(arguments: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of this rank."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = cli.main(arguments)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def prompts(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("command") / "prompts.jsonl"
    lines = Path(tiny.path("prompts.jsonl")).read_text().splitlines()[:7]
    lines[2] = "{"
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(
    "layout", [("tp=2", "pp=2"), ("tp=2", "sequence_parallel=true"), ("pp=4",), ("tp=1",)], ids=" ".join
)
def test_four_ranks_write_the_rows_of_one_process(on_ranks, tiny, prompts, layout):
    def arguments(output: Path, *more: str) -> list[str]:
        return ["generate", tiny.model("policy"), "--prompts", str(prompts), "--output", str(output), *ARGUMENTS, *more]

    one, four = prompts.with_name("one.jsonl"), prompts.with_name("_".join(layout) + ".jsonl")
    if not one.exists():
        assert on_ranks(1, run_command, arguments(one))[0][0] == 0
    results = on_ranks(4, run_command, arguments(four, *(f"parallel.{size}" for size in layout)))
    assert [code for code, *_ in results] == [0] * 4
    assert ["tokens/s" in err for *_, err in results] == [True, False, False, False]
    expected, rows = ([json.loads(line) for line in path.read_text().splitlines()] for path in (one, four))
    assert "error" in rows[4]
    assert {row.get("finish") for row in rows} >= {"stop", "eos"}
    for row, other in zip(rows, expected, strict=True):
        for number in ("mean_logprob", "score"):
            assert row.pop(number, 0) == pytest.approx(other.pop(number, 0), abs=1e-4)
        assert row == other


def test_a_file_that_cannot_be_written_ends_every_rank(on_ranks, tiny, prompts):
    output = prompts.with_name("absent") / "out.jsonl"
    given = ["generate", tiny.model("policy"), "--prompts", str(prompts), "--output", str(output), "parallel.tp=2"]
    results = on_ranks(2, run_command, [*given, *ARGUMENTS])
    assert [code for code, *_ in results] == [2, 7]
    assert "out.jsonl cannot be written" in results[0][2]
