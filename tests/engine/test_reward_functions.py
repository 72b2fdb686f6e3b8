"""Reward functions: answers, patterns, lengths, the user's own; and what is no reward."""

import math
import re
from pathlib import Path
from typing import Any

import pytest

from ppomax.engine.config_ppo import RewardSource
from ppomax.engine.data.chat import Turn
from ppomax.engine.errors import ConfigError, RewardError
from ppomax.engine.rewards.answers import final_answer, same_answer
from ppomax.engine.rewards.functions import Response, call, length_rewards, make_function, math_rewards

STEPS = RewardSource(kind="function", path="a:b", per_step=True)
WHOLE = RewardSource(kind="function", path="a:b")


def response(text: str = "", answer: str = "", num_tokens: int = 5, steps: tuple[str, ...] = ()) -> Response:
    return Response((Turn("human", "?"),), text, answer, num_tokens, True, steps)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"We get 7, so \boxed{12}. Then 3.", "12"),
        (r"\boxed{1} or \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{unclosed, 4", "4"),
        ("6 * 7 = 42\n#### 42", "42"),
        ("The answer is 1,234.50. Bye", "1,234.50. Bye"),
        ("The final answer is: 5.\n", "5"),
        ("first 3, then -4.5", "-4.5"),
        ("3-2=1", "1"),
        ("x2 and y3", ""),
        ("no number", ""),
    ],
)
def test_the_final_answer_of_a_text(text: str, answer: str) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("0.75", r"\frac{3}{4}"),
        (r"\dfrac34", "3/4"),
        ("1,000", "1000.0"),
        ("$5", "5"),
        (r"-\frac{1}{2}", "-0.5"),
        (r"x^2 + 1", "x^2+1"),
        (r"\text{(B)}", "(b)"),
        ("7.", "+7"),
        ("0.1", "1/10"),
        (r"90^\circ", "90"),
    ],
)
def test_equal_answers(found: str, expected: str) -> None:
    assert same_answer(found, expected)
    assert same_answer(expected, found)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("", ""),
        ("", "0"),
        ("1", "2"),
        ("1/0", "1"),
        ("0.3333", "1/3"),
        ("x", "y"),
        ("1" * 5000, "1"),
        ("1e999999", "1"),
    ],
)
def test_unequal_answers(found: str, expected: str) -> None:
    assert not same_answer(found, expected)


def test_hostile_texts_take_no_time() -> None:
    for text in ("\\boxed{" * 3000, "1," * 20000, "answer is" * 5000, "\\frac{" * 5000, "9" * 50000, "1/" * 20000):
        same_answer(final_answer(text), "1")


def test_math_compares_with_the_answer_of_the_row() -> None:
    assert math_rewards([response("It is 4.", "4"), response("It is 5.", "4"), response("", "4")]) == [1, 0, 0]


def test_length_counts_the_tokens_outside_of_its_bounds() -> None:
    texts = [response(num_tokens=n) for n in (1, 3, 5, 9)]
    assert length_rewards(texts, shortest=3, longest=5) == [-2, 0, 0, -4]
    assert length_rewards(texts, shortest=3, longest=math.inf) == [-2, 0, 0, 0]


def test_regex_counts_a_response_or_each_step() -> None:
    given = response("a=1\n\nb", steps=("a=1", "b"))
    source = RewardSource(kind="regex", pattern="=.*b")
    assert call(make_function(source), source, [given]) == [[1.0]]
    source = RewardSource(kind="regex", pattern="=", per_step=True)
    assert call(make_function(source), source, [given, response()]) == [[1.0, 0.0], []]


def test_a_users_function_is_imported_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_reward_module.py").write_text("def f(rs):\n    return [len(r.text) for r in rs]\nx = 3\n")
    (tmp_path / "my_broken_module.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    source = RewardSource(kind="function", path="my_reward_module:f")
    assert call(make_function(source), source, [response("abc"), response("")]) == [[3.0], [0.0]]
    for path, fault in [
        ("my_reward_module:g", "has no attribute 'g'"),
        ("my_reward_module:x", "is no function"),
        ("my_broken_module:f", "ZeroDivisionError"),
        ("no_such_module:f", "No module named"),
    ]:
        with pytest.raises(ConfigError, match=f"'function' of ppo.rewards.*{fault}"):
            make_function(RewardSource(kind="function", path=path))


@pytest.mark.parametrize(
    ("returned", "fault"),
    [
        (None, "returned NoneType, expected 2 values"),
        (1.0, "returned float"),
        ("12", "returned str"),
        ({0: 1.0, 1: 2.0}, "returned dict"),
        ([1.0], "returned 1 values, expected 2 values, one per response"),
        ([1.0, math.nan], "response 1: 'nan' is no finite number"),
        ([math.inf, 0.0], "response 0: 'inf'"),
        ([1e39, 0.0], "response 0: '1e\\+39'"),
        ([1.0, "1"], "response 1: '1' is no"),
        ([1.0, None], "response 1: 'None'"),
    ],
)
def test_what_is_no_reward_ends_the_run_with_its_place(returned: Any, fault: str) -> None:
    with pytest.raises(RewardError, match=fault):
        call(lambda responses: returned, WHOLE, [response(), response()])


@pytest.mark.parametrize(
    ("returned", "fault"),
    [
        ([1.0, 2.0], "response 0: it returned float, expected 2 values, one per step"),
        ([[1.0], []], "response 0: it returned 1 values"),
        ([[1.0, math.nan], []], "response 0, step 1: 'nan'"),
    ],
)
def test_what_is_no_reward_of_steps_too(returned: Any, fault: str) -> None:
    with pytest.raises(RewardError, match=fault):
        call(lambda responses: returned, STEPS, [response(steps=("a", "b")), response()])


def test_an_exception_of_the_function_is_named() -> None:
    def failing(responses: Any) -> Any:
        raise KeyError("gold")

    with pytest.raises(RewardError, match=re.escape("the reward 'function' of ppo.rewards failed: KeyError: 'gold'")):
        call(failing, WHOLE, [response()])


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"kind": "regex"}, "needs pattern"),
        ({"kind": "regex", "pattern": "("}, "no regular expression"),
        ({"kind": "math", "pattern": "x"}, "sets pattern, which math does not have"),
        ({"kind": "math", "per_step": True}, "sets per_step"),
        ({"kind": "length"}, "needs min_tokens or max_tokens"),
        ({"kind": "length", "min_tokens": 9, "max_tokens": 3}, "larger than max_tokens"),
        ({"kind": "function", "path": "x.py"}, "expected module:function"),
        ({"kind": "http"}, "needs url"),
        ({"kind": "http", "url": "ftp://x"}, "expected http://HOST"),
        ({"kind": "http", "url": "http://me:secret@x/"}, "holds a password"),
    ],
)
def test_a_row_that_does_not_fit_its_kind_is_refused(row: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        RewardSource(**row)
