"""Win / tie / lose, intervals, files of responses, people's verdicts and tables: no models, no network."""

import csv
import itertools
import json
import math

import pytest
import torch

from ppomax.engine.data.chat import Turn
from ppomax.engine.errors import DataError
from ppomax.engine.judge.blind import judge_by_hand, read_annotations, read_key, write_blind
from ppomax.engine.judge.intervals import bootstrap_mean, sign_test, wilson
from ppomax.engine.judge.pairwise import Judged, by_margin, combine, position_bias, summarise, tally
from ppomax.engine.judge.responses import Pair, read_pairs
from ppomax.engine.judge.tables import comparison_table


@pytest.mark.parametrize(("count", "total"), [(0, 10), (3, 10), (10, 10), (81, 263)])
def test_wilson_solves_its_equation(count, total):
    """The limits p are where |share - p| = z sqrt(p (1 - p) / n)."""
    for limit in wilson(count, total):
        if 0 < limit < 1:
            distance = abs(count / total - limit)
            assert distance == pytest.approx(1.959964 * math.sqrt(limit * (1 - limit) / total), rel=1e-6)
    assert wilson(count, total)[0] <= count / total <= wilson(count, total)[1]
    assert wilson(0, 0) == (0, 1)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (5, 5), (8, 1), (0, 6), (13, 4)])
def test_the_sign_test_counts_every_split(wins, losses):
    total = wins + losses
    as_extreme = [
        split
        for split in itertools.product((0, 1), repeat=total)
        if max(sum(split), total - sum(split)) >= max(wins, losses)
    ]
    assert sign_test(wins, losses) == pytest.approx(len(as_extreme) / 2**total)


def test_the_sign_test_of_many_is_the_normal_one():
    z = (5200 - 0.5 - 5000) / 50
    assert sign_test(5200, 4800) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)


def test_the_bootstrap_covers_the_mean_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(200, 80, generator=generator) * 3 + 1
    covered = [low <= 1 <= high for low, high in (bootstrap_mean(sample, seed=i) for i, sample in enumerate(samples))]
    assert 0.90 <= sum(covered) / 200 <= 0.98
    assert bootstrap_mean(samples[0], seed=3) == bootstrap_mean(samples[0], seed=3)
    assert bootstrap_mean(samples[0, :1], seed=3) is None


def test_a_win_needs_both_orders():
    places = ("first", "second", "tie", None)
    outcomes = {(one, other): combine(one, other) for one in places for other in places}
    assert [places for places, outcome in outcomes.items() if outcome == "win"] == [("first", "second")]
    assert [places for places, outcome in outcomes.items() if outcome == "lose"] == [("second", "first")]
    assert {None in places for places, outcome in outcomes.items() if outcome == "invalid"} == {True}
    assert sum(outcome == "tie" for outcome in outcomes.values()) == 7


def test_a_margin_makes_ties_and_no_number_makes_no_verdict():
    outcomes = [by_margin(x, 0.5) for x in (0.6, 0.5, -0.5, -0.6, math.nan, math.inf)]
    assert outcomes == ["win", "tie", "tie", "lose", "invalid", "invalid"]


def test_swapping_the_models_mirrors_the_result():
    places = ("first", "second", "tie", None)
    judged = [Judged(combine(one, other), one, other) for one in places for other in places]
    swapped = [Judged(combine(other, one), other, one) for one in places for other in places]
    result, mirror = (tally([item.outcome for item in items]) for items in (judged, swapped))
    assert (result["win"], result["tie"], result["num_valid"]) == (mirror["lose"], mirror["tie"], mirror["num_valid"])
    assert position_bias(judged) == position_bias(swapped)


def test_a_judge_that_always_takes_the_first_gives_ties_and_shows_its_bias():
    judged = [Judged(combine("first", "first"), "first", "first")] * 20
    assert tally([item.outcome for item in judged])["tie_rate"] == 1
    bias = position_bias(judged)
    assert (bias["both_first"], bias["both_second"], bias["consistent"], bias["first_share"]) == (20, 0, 0, 1)
    assert bias["p"] < 1e-5


def test_invalid_pairs_count_in_no_share():
    result = tally(["win", "win", "lose", "invalid", "invalid"])
    assert (result["num_valid"], result["num_invalid"], result["win_rate"]) == (3, 2, pytest.approx(2 / 3))
    assert tally(["invalid"])["win_rate"] is None


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_responses_meet_by_prompt_whatever_their_order_and_format(tmp_path):
    generated = [
        {"prompt": [{"role": "user", "content": text}], "response": f"a {number}"}
        for number, text in enumerate(("x", "y", "x", "only a"))
    ]
    sampled = [
        {"prompt": [{"role": "human", "text": text}], "response": f"b {number}", "category": "harmless"}
        for number, text in enumerate(("y", "x", "only b", "only b", "x"))
    ]
    generated.append({"line": 5, "error": "a bad row"})
    pairs = read_pairs(write_rows(tmp_path / "a.jsonl", generated), write_rows(tmp_path / "b.jsonl", sampled))
    assert [(pair.prompt[0].text, pair.a, pair.b) for pair in pairs.rows] == [
        ("x", "a 0", "b 1"),
        ("y", "a 1", "b 0"),
        ("x", "a 2", "b 4"),
    ]
    assert (pairs.unpaired_a, pairs.unpaired_b, pairs.failed) == (1, 2, 1)
    assert {pair.category for pair in pairs.rows} == {"harmless"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 1: malformed JSON"),
        ('{"prompt": "x"}', "line 1: the row has no text under 'response'"),
        ('{"prompt": [], "response": "y"}', "line 1: prompt is a list of 0"),
        ('{"prompt": [{"role": "assistant", "content": "z"}], "response": "y"}', "line 1"),
        ('{"prompt": [7], "response": "y"}', "line 1: turn 1 of prompt is a number"),
        ('{"error": "x"}', "has no responses"),
        ('{"prompt": "other", "response": "y"}', "no prompt in common"),
    ],
)
def test_a_bad_file_of_responses_is_named(tmp_path, row, message):
    (tmp_path / "bad.jsonl").write_text(row + "\n")
    good = write_rows(tmp_path / "good.jsonl", [{"prompt": "x", "response": "y"}])
    with pytest.raises(DataError, match=message):
        read_pairs(str(tmp_path / "bad.jsonl"), good)


PAIRS = [
    Pair((Turn("human", f"question {i}"),), f"from A {i}" if i != 3 else "same", f"from B {i}" if i != 3 else "same", c)
    for i, c in enumerate(["helpful"] * 20 + ["harmless"] * 20)
]


@pytest.fixture
def annotated(tmp_path):
    """Writes the questions, lets `decide(row, number)` answer them, and reads the file; returns what is judged."""
    assert write_blind(PAIRS, tmp_path, name_a="after", name_b="before", seed=5) == 39

    def judge(*deciders):
        found = []
        key = read_key(tmp_path / "key.json")
        for decide in deciders:
            with (tmp_path / "annotate.csv").open(encoding="utf-8-sig", newline="") as file:
                rows = list(csv.DictReader(file))
            for number, row in enumerate(rows):
                row["verdict"] = decide(row, number)
            with (tmp_path / "done.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            found.append(read_annotations(tmp_path / "done.csv", key))
        return judge_by_hand(found, key)

    return judge


def prefers_a(row, number):
    return "Left " if "from A" in row["left"] else "RIGHT"


def test_people_see_neither_names_nor_fixed_sides(annotated, tmp_path):
    text = (tmp_path / "annotate.csv").read_text(encoding="utf-8-sig")
    assert not any(word in text for word in ("after", "before", "helpful", "seed"))
    rows = list(csv.DictReader((tmp_path / "annotate.csv").open(encoding="utf-8-sig", newline="")))
    left = ["from A" in row["left"] for row in rows]
    assert 10 < sum(left) < 30
    assert [row["prompt"] for row in rows] != sorted(row["prompt"] for row in rows)


def test_verdicts_of_people_find_their_way_back(annotated):
    judged, facts = annotated(prefers_a)
    outcomes = [item.outcome for item in judged.values()]
    assert (outcomes.count("win"), outcomes.count("tie"), facts["identical_pairs"]) == (39, 1, 1)
    judged, facts = annotated(lambda row, number: "left")
    outcomes = [item.outcome for item in judged.values()]
    assert min(outcomes.count("win"), outcomes.count("lose")) > 10
    assert facts["left_share"] == 1


def test_several_people_vote_and_their_agreement_is_told(annotated):
    judged, facts = annotated(prefers_a, prefers_a, lambda row, number: "" if number < 30 else "tie")
    assert {item.outcome for item in judged.values() if len(item.details.get("votes", ())) == 2} == {"win"}
    assert facts["num_votes"] == 39 + 39 + 9
    assert facts["agreement"]["num_vote_pairs"] == 39 + 9 + 9
    assert facts["agreement"]["equal"] == pytest.approx(39 / 57)
    judged, facts = annotated(lambda row, number: "left", lambda row, number: "right")
    assert {item.outcome for item in judged.values()} == {"tie"}
    assert facts["agreement"]["kappa"] == pytest.approx(-1)


def test_a_question_without_a_verdict_is_invalid(annotated):
    judged, _ = annotated(lambda row, number: "tie" if number < 9 else "")
    assert [item.outcome for item in judged.values()].count("invalid") == 30


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,left\n", "no column verdict"),
        ("id,verdict\nffff,left\n", "line 2: id 'ffff' is not of this key"),
        ("id,verdict\n{id},left\n{id},right\n", "line 3: id .* twice"),
        ("id,verdict\n{id},A is better\n", "line 2: verdict 'a is better'; expected left, right, tie"),
        ("id,verdict\n{id},\n", "has no verdicts"),
        ("\xff\xfe", "not UTF-8"),
    ],
)
def test_a_file_that_people_spoilt_is_refused_with_its_line(annotated, tmp_path, content, message):
    key = read_key(tmp_path / "key.json")
    path = tmp_path / "spoilt.csv"
    path.write_bytes(content.format(id=next(iter(key.left))).encode("latin-1"))
    with pytest.raises(DataError, match=message):
        read_annotations(path, key)


def test_text_that_a_spreadsheet_would_run_is_shown(tmp_path):
    evil = '=HYPERLINK("http://x","y")'
    huge = "long " * 40_000
    pair = Pair((Turn("human", "+1"),), evil, "\ud800 " + huge, "")
    write_blind([pair], tmp_path, name_a="a", name_b="b", seed=1)
    lines = (tmp_path / "annotate.csv").read_text(encoding="utf-8-sig")
    assert f",'{evil[:9]}" in lines.replace('"', "")
    assert ",=" not in lines.replace('"', "")
    text = lines.replace("\n1", "").rstrip("\r\n") + "left\r\n"
    (tmp_path / "done.csv").write_text(text)
    assert len(read_annotations(tmp_path / "done.csv", read_key(tmp_path / "key.json"))) == 1


def test_questions_are_never_overwritten(annotated, tmp_path):
    with pytest.raises(DataError, match=r"annotate.csv exists"):
        write_blind(PAIRS, tmp_path, name_a="a", name_b="b", seed=5)


def result(judge, counts, models=("RLHF", "SFT")):
    judged = [Judged(outcome) for outcome, number in counts.items() for _ in range(number)]
    categories = ["harmless", "helpful"] * (len(judged) // 2)
    return summarise(judged, categories, name_a=models[0], name_b=models[1], judge=judge, is_swapped=False)


def test_the_table_is_that_of_the_paper():
    """Fig. 10, harmless prompts in English: 62 / 33 / 5 by people, 34 / 59 / 7 by GPT-4."""
    people = result("human", {"win": 124, "tie": 66, "lose": 10})
    model = result("GPT-4", {"win": 68, "tie": 118, "lose": 14})
    table = comparison_table([people, model])
    assert table.head[:6] == ("models", "prompts", "human: n", "human: win %", "human: tie %", "human: lose %")
    assert [row[1] for row in table.rows] == ["harmless", "helpful", "all"]
    assert table.rows[2][3:6] == ("62 [55, 68]", "33", "5")
    assert table.rows[2][7:] == ("34 [28, 41]", "59", "7")
    assert len({len(line) for line in table.text().splitlines()}) <= 2
    assert table.markdown().splitlines()[1] == "| --- | --- |" + " ---: |" * 8


def test_models_against_one_other_are_rows_of_one_table():
    table = comparison_table(
        [result("GPT-4", {"tie": 2}, ("RLHF", "ChatGPT")), result("GPT-4", {"lose": 2}, ("SFT|<b>", "ChatGPT"))]
    )
    assert [row[:2] for row in table.rows[::3]] == [
        ("RLHF vs. ChatGPT", "harmless"),
        ("SFT|<b> vs. ChatGPT", "harmless"),
    ]
    assert "SFT\\|\\<b\\> vs." in table.markdown()


def test_a_table_refuses_what_it_cannot_show():
    with pytest.raises(DataError, match="two results of GPT-4 for RLHF"):
        comparison_table([result("GPT-4", {"tie": 2}), result("GPT-4", {"win": 2})])
    with pytest.raises(DataError, match="not a results"):
        comparison_table([{"a": 1}])
