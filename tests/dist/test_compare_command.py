"""`ppomax compare` under torchrun: two checkpoints answer and a reward model judges, as in one process."""

import contextlib
import io
import json

import pytest

from ppomax.engine import cli

pytestmark = pytest.mark.dist


def run_command(arguments: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of this rank."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = cli.main(arguments)
    return code, out.getvalue(), err.getvalue()


def test_two_ranks_judge_two_checkpoints_as_one_does(on_ranks, tiny, tmp_path):
    models = [tiny.model("policy"), tiny.model("policy", num_layers=2)]
    given = ["compare", "reward", *models, "--reward", tiny.model("reward"), "--prompts", tiny.path("prompts.jsonl")]
    found = []
    for number, layout in ((1, "parallel.tp=1"), (2, "parallel.tp=2")):
        output = tmp_path / str(number)
        results = on_ranks(number, run_command, [*given, "--output", str(output), "sampling.max_new_tokens=8", layout])
        assert [code for code, *_ in results] == [0] * number, results
        assert ["sign test" in out for _, out, _ in results] == [True, False][:number]
        found.append([json.loads(line) for line in (output / "pairs.jsonl").read_text().splitlines()])
    one, two = found
    for row, other in zip(one, two, strict=True):
        for name in ("score_a", "score_b"):
            assert row.pop(name) == pytest.approx(other.pop(name), abs=1e-4)
        assert row == other


def test_a_bad_file_of_responses_ends_every_rank(on_ranks, tiny, tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    files = [str(tmp_path / "a.jsonl")] * 2
    given = ["compare", "reward", *files, "--reward", tiny.model("reward"), "--output", str(tmp_path / "out")]
    results = on_ranks(2, run_command, given)
    assert [code for code, *_ in results] == [4, 4]
    assert all("a.jsonl line 1: the row has no text under 'response'" in err for *_, err in results)
