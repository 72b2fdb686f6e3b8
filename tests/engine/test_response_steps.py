"""Where steps end, and the rows that process models learn from."""

import json
from pathlib import Path
from typing import Any

import pytest

from ppomax.engine.config import DataConfig
from ppomax.engine.data.chat import Template, make_template
from ppomax.engine.data.datasets import load_prompts, load_solutions
from ppomax.engine.data.readers import parse_steps
from ppomax.engine.data.response_steps import step_ends, step_texts
from ppomax.engine.data.tokenizer import load_tokenizer
from ppomax.engine.errors import DataError


@pytest.fixture(scope="module")
def template(tiny: Any) -> Template:
    return make_template(DataConfig(), load_tokenizer(tiny.model("policy")))


def found(template: Template, text: str, *, finished: bool = True, delimiter: str = "\n\n") -> list[tuple[str, str]]:
    """(text up to the end of each step, the step's text)."""
    tokens = template.encode_response(text)
    tokens = tokens if finished else tokens[:-1]
    ends, texts = step_ends(tokens, template, delimiter), step_texts(tokens, template, delimiter)
    return [(template.tokenizer.decode(tokens[: end + 1]), step) for end, step in zip(ends, texts, strict=True)]


def test_a_step_ends_with_its_delimiter_and_the_last_one_with_eos(template: Template) -> None:
    assert found(template, "ab\n\nc d\n\nef") == [("ab\n\n", "ab"), ("ab\n\nc d\n\n", "c d"), ("ab\n\nc d\n\nef", "ef")]
    tokens = template.encode_response("ab\n\nef")
    assert step_ends(tokens, template, "\n\n")[-1] == len(tokens) - 1


def test_an_unfinished_response_has_no_last_step(template: Template) -> None:
    assert found(template, "ab\n\nef", finished=False) == [("ab\n\n", "ab")]
    assert found(template, "ab\n\n", finished=False) == [("ab\n\n", "ab")]
    assert found(template, "ab", finished=False) == []


@pytest.mark.parametrize("text", ["ab\n\n\n\n\n\ncd", "\n\nab\n\n  \n\ncd\n\n", "ab\n\n\ncd\n\n\n\n"])
def test_blank_steps_do_not_count(template: Template, text: str) -> None:
    assert [step for _, step in found(template, text)] == ["ab", "cd"]


def test_the_delimiter_can_be_any_text(template: Template) -> None:
    assert [step for _, step in found(template, "1+2=3; 3+4=7; 8", delimiter=";")] == ["1+2=3", "3+4=7", "8"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "steps": ["a", "b", "c"], "labels": [1, 0, -1]},
        {"prompt": "q", "steps": [{"text": t, "rating": r} for t, r in (("a", 1), ("b", 0), ("c", -1))]},
        {
            "question": {"problem": "q", "ground_truth_answer": "3"},
            "label": {
                "steps": [
                    {
                        "completions": [{"text": "x", "rating": -1}, {"text": "a", "rating": 1}],
                        "chosen_completion": 1,
                        "human_completion": None,
                    },
                    {"completions": [{"text": "b", "rating": 0}], "chosen_completion": 0},
                    {"completions": [{"text": "c", "rating": -1}], "chosen_completion": None, "human_completion": None},
                    {"completions": [{"text": "never", "rating": 1}], "chosen_completion": 0},
                ],
                "finish_reason": "found_error",
            },
        },
    ],
    ids=["labels", "ratings", "PRM800K"],
)
def test_three_spellings_of_the_same_solution(row: dict[str, Any], template: Template, tmp_path: Path) -> None:
    assert parse_steps(row) == (("a", "b", "c"), (1, 0, -1))
    (tmp_path / "steps.jsonl").write_text(json.dumps(row) + "\n")
    data = DataConfig(train=str(tmp_path / "steps.jsonl"))
    (solution,) = load_solutions(data, data.train, template).rows
    assert solution.targets == (1, 0, 0)
    response = solution.tokens[solution.prompt_length :]
    assert list(solution.tokens[: solution.prompt_length]) == template.encode_prompt(solution.turns)
    ends = [end - solution.prompt_length for end in solution.ends]
    assert ends == step_ends(response, template, "\n\n")
    assert ends[-1] == len(response) - 1
    (prompt,) = load_prompts(data, data.train, template, max_prompt_tokens=100).rows
    assert prompt.answer == ("3" if "question" in row else "")


def test_a_human_completion_counts_as_right_and_the_solution_goes_on() -> None:
    steps = [
        {"completions": [{"text": "x", "rating": -1}], "chosen_completion": None, "human_completion": {"text": "a"}},
        {"completions": [{"text": "b", "rating": None}], "chosen_completion": 0, "human_completion": None},
    ]
    assert parse_steps({"label": {"steps": steps}}) == (("a", "b"), (1, None))


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"steps": []}, "steps is a list of 0"),
        ({"steps": ["a"]}, 'no "labels"'),
        ({"steps": ["a"], "labels": [1, 1]}, "expected a list of 1"),
        ({"steps": ["a"], "labels": [2]}, "label of step 1 is '2'"),
        ({"steps": ["a"], "labels": ["+"]}, "label of step 1"),
        ({"steps": ["a", " "], "labels": [1, 1]}, "step 2 is a string, expected text"),
        ({"steps": ["a"], "labels": [None]}, "no step has a label"),
        (
            {"steps": ["a\n\nb"], "labels": [1]},
            "1 steps, but joined by data.step_delimiter '\\\\n\\\\n' they read as 2",
        ),
        ({"label": {"steps": [{"completions": [], "chosen_completion": 3}]}, "question": {}}, "no completion 3"),
        ({"label": {"steps": 3}, "question": {}}, "label.steps is a number"),
    ],
)
def test_a_bad_row_is_named(row: dict[str, Any], fault: str, template: Template, tmp_path: Path) -> None:
    row = {"prompt": "q", **row}
    (tmp_path / "steps.jsonl").write_text(json.dumps(row) + "\n")
    data = DataConfig.model_validate({"train": {"path": str(tmp_path / "steps.jsonl"), "format": "steps"}})
    with pytest.raises(DataError, match=f"line 1: .*{fault}"):
        load_solutions(data, data.train, template)


def test_unlabelled_steps_are_left_out_and_soft_labels_kept(template: Template, tmp_path: Path) -> None:
    row = {"prompt": "q", "steps": ["a", "b", "c"], "labels": [0.25, None, True]}
    (tmp_path / "steps.jsonl").write_text(json.dumps(row) + "\n")
    data = DataConfig(train=str(tmp_path / "steps.jsonl"))
    (solution,) = load_solutions(data, data.train, template).rows
    assert solution.targets == (0.25, 1.0)
    assert len(solution.ends) == 2
