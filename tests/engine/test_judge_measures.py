"""Calibration of a reward model, multiple-choice questions, rewards per category: no models."""

import json
import math

import pytest
import torch

from ppomax.engine.errors import ConfigError, DataError
from ppomax.engine.evaluate import reward_intervals
from ppomax.engine.judge.calibration import calibration, describe_margins, histogram, length_bias
from ppomax.engine.judge.multiple_choice import (
    choose,
    encode_question,
    read_categories,
    read_questions,
    summarise_answers,
)


def simulated(scale: float, number: int = 20_000) -> torch.Tensor:
    """Margins of a model that overstates the log-odds of its pairs by `scale`."""
    generator = torch.Generator().manual_seed(0)
    odds = torch.randn(number, generator=generator, dtype=torch.float64) * 2
    is_right = torch.rand(number, generator=generator, dtype=torch.float64) < odds.abs().sigmoid()
    return scale * torch.where(is_right, odds.abs(), -odds.abs())


def test_a_calibrated_model_has_no_error_and_an_overconfident_one_has_the_right_one():
    assert calibration(simulated(1.0))["expected_calibration_error"] < 0.015
    margins = simulated(3.0)
    overstated = float((margins.abs().sigmoid() - (margins / 3).abs().sigmoid()).mean())
    assert calibration(margins)["expected_calibration_error"] == pytest.approx(overstated, abs=0.01)


def test_hand_worked_calibration():
    """Confidences 0.6 (right), 0.6 (wrong) and 0.9 (right): bins with errors 0.1 and 0.1."""
    logit = [math.log(p / (1 - p)) for p in (0.61, 0.62, 0.91)]
    found = calibration(torch.tensor([logit[0], -logit[1], logit[2]], dtype=torch.float64))
    filled = [row for row in found["bins"] if row["num_pairs"]]
    assert [(row["num_pairs"], row["accuracy"]) for row in filled] == [(2, 0.5), (1, 1.0)]
    assert [row["confidence"] for row in filled] == pytest.approx([0.615, 0.91])
    assert found["expected_calibration_error"] == pytest.approx(2 / 3 * 0.115 + 1 / 3 * 0.09)


def test_extreme_and_equal_margins_stay_in_their_bins():
    found = calibration(torch.tensor([1000.0, -1000.0, 0.0], dtype=torch.float64))
    assert [row["num_pairs"] for row in found["bins"]] == [1, 0, 0, 0, 0, 0, 0, 0, 0, 2]
    assert found["bins"][0]["accuracy"] == 0.5
    assert histogram(torch.zeros(3, dtype=torch.float64))["counts"] == [0.0] * 10 + [3.0] + [0.0] * 9


def test_a_model_that_counts_tokens_shows_its_bias():
    generator = torch.Generator().manual_seed(1)
    differences = torch.randint(-50, 51, (2000,), generator=generator)
    found = length_bias(differences.double() / 10, differences)
    assert found["prefers_longer"] == 1
    assert found["correlation"] == pytest.approx(1)
    assert [row["accuracy"] for row in found["bins"]][::4] == [0, 1]
    assert sum(row["num_pairs"] for row in found["bins"]) == 2000
    blind = length_bias(torch.randn(2000, generator=generator, dtype=torch.float64), differences)
    low, high = blind["prefers_longer_interval"]
    assert low < 0.5 < high


def test_results_are_json_whatever_the_pairs():
    for margins in ([1.0], [0.0, 0.0], [-1.0, 2.0, 3.0]):
        lengths = torch.zeros(len(margins), dtype=torch.int64)
        found = describe_margins(torch.tensor(margins), lengths, ["", "harmless", "helpful"][: len(margins)])
        json.dumps(found, allow_nan=False)
        assert found["accuracy"] == sum(margin > 0 for margin in margins) / len(margins)
        assert found["length"]["prefers_longer"] is None


def test_rewards_have_an_interval_per_category():
    samples = [{"reward": float(i), "category": ("helpful", "harmless")[i % 2]} for i in range(40)]
    samples.append({"reward": 100.0})
    found = reward_intervals(samples, seed=1)
    assert list(found["categories"]) == ["helpful", "harmless"]
    assert found["categories"]["harmless"]["reward"] == 20
    low, high = found["categories"]["harmless"]["reward_interval"]
    half = 1.96 * 11.547 / math.sqrt(20)
    assert (low, high) == pytest.approx((20 - half, 20 + half), abs=0.8)
    assert found == reward_intervals(samples, seed=1)
    assert reward_intervals(samples[:1], seed=1)["reward_interval"] is None


QUESTION = {"question": "1 + 1 = ?", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "B"}


def test_questions_of_a_folder_know_their_subjects(tmp_path):
    (tmp_path / "high_school_physics_val.csv").write_text(
        'id,question,A,B,C,D,answer\n0,"a, quoted\nquestion",x,y,z,w,D\n1,second,x,y,z,w, A \n', encoding="utf-8-sig"
    )
    row = QUESTION | {"subject": "law", "category": "Social"}
    (tmp_path / "other.jsonl").write_text(json.dumps(row) + "\n")
    questions = read_questions(tmp_path)
    assert [(q.subject, q.answer, q.category) for q in questions] == [
        ("high_school_physics", 3, ""),
        ("high_school_physics", 0, ""),
        ("law", 1, "Social"),
    ]
    assert questions[0].text == "a, quoted\nquestion"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "E"}, "the answer is 'E'; expected one of A, B, C, D"),
        ({"answer": ""}, "the answer is ''"),
        ({"question": " "}, "the question is empty"),
        ({"C": ""}, "or an empty one"),
        ({"A": None}, "0 options"),
        ({"D": None, "answer": "D"}, "expected one of A, B, C"),
    ],
)
def test_a_bad_question_is_named_with_its_line(tmp_path, change, message):
    rows = [QUESTION, QUESTION | change]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=rf"q.jsonl line 2: .*{message}"):
        read_questions(tmp_path / "q.jsonl")


class Characters:
    """A tokenizer whose ids are code points."""

    bos_id = 0

    def encode(self, text, *, continues=False):
        return [ord(c) for c in text]


def spelled(encoded):
    return "".join(map(chr, encoded.prompt[1:])), ["".join(map(chr, option)) for option in encoded.options]


@pytest.fixture
def questions(tmp_path):
    rows = [QUESTION, QUESTION | {"question": "2 + 2 = ?", "answer": "D"}, QUESTION | {"question": "1 + 2 = ?"}]
    (tmp_path / "simple_math_dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_questions(tmp_path)


def test_prompts_hold_examples_with_their_answers(questions):
    given = {"language": "en", "choice": "letter", "max_tokens": 1000}
    text, options = spelled(encode_question(questions[2], questions[:2], Characters(), **given))
    assert text == (
        "The following are multiple choice questions (with answers) about simple math.\n\n"
        "1 + 1 = ?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n"
        "2 + 2 = ?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: D\n\n"
        "1 + 2 = ?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )
    assert options == [" A", " B", " C", " D"]
    given["choice"] = "option"
    text, options = spelled(encode_question(questions[2], questions[:1], Characters(), **given))
    assert text.endswith("simple math.\n\n1 + 1 = ?\nAnswer: 2\n\n1 + 2 = ?\nAnswer:")
    assert options == [" 1", " 2", " 3", " 4"]
    given["language"] = "zh"
    text, options = spelled(encode_question(questions[2], [], Characters(), **given))
    assert text.endswith("答案:")
    assert options[0] == "1"


def test_examples_that_do_not_fit_are_left_out_and_a_question_that_does_not_is_an_error(questions):
    given = {"language": "en", "choice": "letter"}
    whole = encode_question(questions[2], questions[:2], Characters(), max_tokens=1000, **given)
    size = len(whole.prompt) + 2
    assert encode_question(questions[2], questions[:2], Characters(), max_tokens=size, **given) == whole
    assert encode_question(questions[2], questions[:2], Characters(), max_tokens=size - 1, **given).num_shots == 1
    with pytest.raises(DataError, match=r"line 3 of simple_math: .* tokens without an example"):
        encode_question(questions[2], questions[:2], Characters(), max_tokens=50, **given)


def test_length_decides_nothing_among_texts():
    assert choose([-3.0, -4.0, -3.0], [1, 4, 2], "letter") == 0
    assert choose([-3.0, -4.0, -3.0], [1, 4, 2], "option") == 1


def test_averages_are_those_of_subjects(tmp_path):
    rows = [QUESTION | {"subject": "a", "category": "STEM"}] * 4 + [QUESTION | {"subject": "b", "category": "STEM"}]
    rows.append(QUESTION | {"subject": "c", "category": "Other"})
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = summarise_answers(read_questions(tmp_path), [1, 1, 1, 0, 0, 1])
    assert result["subjects"]["a"]["accuracy"] == 0.75
    assert result["categories"]["STEM"]["average"] == pytest.approx((0.75 + 0) / 2)
    assert result["categories"]["STEM"]["accuracy"] == pytest.approx(3 / 5)
    assert result["average"] == pytest.approx((0.75 + 0 + 1) / 3)
    assert result["accuracy"] == pytest.approx(4 / 6)


def test_categories_come_from_names_or_lists(tmp_path):
    assert read_categories(tmp_path, {"law": "Social", "physics": ["Physics", "物理", "STEM"]}) == {
        "law": "Social",
        "physics": "STEM",
    }
    for content in ([], {}, {"law": 1}, {"law": []}, {"law": [1]}):
        with pytest.raises(ConfigError, match="expected an object"):
            read_categories(tmp_path, content)
