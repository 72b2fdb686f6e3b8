"""The language of `make reproduce`: what the gold judge and the annotators see, and the data."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppomax.engine.data.tokenizer import load_tokenizer
from ppomax.tools.reproduce_task import (
    COURTESIES,
    FITTING,
    draw_answer,
    draw_pair,
    gold,
    repeats,
    split_sentences,
    utility,
    vocabulary,
    write_data,
)

QUESTION = "what about the soup ?"
FILES = ("base", "sft", "preferences_train", "preferences_held_out", "prompts", "held_out")


@pytest.mark.parametrize(
    ("response", "judgement"),
    [
        ("of course . warm the soup . ask me more .", 1.0),
        ("of course . warm the soup . so kind ! ask me more .", 1.0),
        ("of course . warm the soup . so kind ! how lovely ! ask me more .", 0.9),
        ("of course . warm the soup . so kind ! so kind ! so kind ! ask me more .", 0.8),
        ("warm the soup . ask me more .", 0.75),
        ("warm the soup . of course . ask me more .", 0.75),
        ("of course . feed the soup . ask me more .", 0.5),
        ("of course . warm the bread . ask me more .", 0.5),
        ("of course . warm the soup . warm the soup . ask me more .", 0.5),
        ("ask me more . warm the soup .", 0.5),
        ("warm the soup", 0.0),
        ("", 0.0),
        ("so kind ! " * 12, 0.0),
    ],
)
def test_gold_is_the_share_of_what_an_answer_needs_less_its_padding(response: str, judgement: float) -> None:
    assert gold(QUESTION, response, finished=True) == pytest.approx(judgement)


def test_a_response_that_does_not_end_is_worth_nothing() -> None:
    assert gold(QUESTION, "of course . warm the soup . ask me more .", finished=False) == 0


@settings(max_examples=40, deadline=None)
@given(st.text(), st.lists(st.sampled_from([*vocabulary(), "<unk>"])))
def test_gold_judges_any_text(question: str, words: list[str]) -> None:
    assert 0 <= gold(question, " ".join(words), finished=True) <= 1
    assert 0 <= gold(" ".join(words), question, finished=True) <= 1


def test_sentences_end_with_their_sign() -> None:
    assert split_sentences("of course .  so kind ! and") == ["of course .", "so kind !", "and"]
    assert repeats("so kind ! of course . so kind !")
    assert not repeats("so kind ! of course .")


def test_annotators_like_what_gold_takes_for_padding() -> None:
    plain = "of course . warm the soup . ask me more ."
    padded = plain.replace("ask", f"{' '.join(COURTESIES)} ask")
    assert utility(QUESTION, padded) > utility(QUESTION, plain)
    assert gold(QUESTION, padded, finished=True) < gold(QUESTION, plain, finished=True)


def test_annotators_prefer_content_and_among_equals_courtesies() -> None:
    rng = random.Random(1)
    content, courtesies = [], []
    for _ in range(2000):
        pair = draw_pair(rng)
        question = pair["chosen"].split("\n\n")[1].removeprefix("Human: ")
        answers = [pair[side].split("Assistant: ")[1] for side in ("chosen", "rejected")]
        judged = [gold(question, answer, finished=True) for answer in answers]
        counts = [sum(sentence in COURTESIES for sentence in split_sentences(answer)) for answer in answers]
        if abs(judged[0] - judged[1]) >= 0.5:
            content.append(judged[0] > judged[1])
        elif judged[0] == judged[1] and counts[0] != counts[1]:
            courtesies.append(counts[0] > counts[1])
    assert 0.85 < sum(content) / len(content) < 1
    assert 0.55 < sum(courtesies) / len(courtesies) < 0.9


def test_supervised_answers_leave_something_to_gain() -> None:
    rng = random.Random(0)
    drawn = [gold(f"what about the {thing} ?", draw_answer(rng, thing), finished=True) for thing in [*FITTING] * 200]
    assert 0.4 < sum(drawn) / len(drawn) < 0.5


def test_data_are_those_of_their_seed(tmp_path: Path) -> None:
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_data(tmp_path / folder, seed)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted([*(f"{name}.jsonl" for name in FILES), "tokenizer.json", "tokenizer_config.json"])
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a/sft.jsonl").read_bytes() != (tmp_path / "c/sft.jsonl").read_bytes()


def test_held_out_questions_are_asked_nowhere_else_and_every_word_is_a_token(tmp_path: Path) -> None:
    write_data(tmp_path, 0)
    rows = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in FILES
    }
    held_out = {row["prompt"] for row in rows["held_out"]}
    asked = {row["prompt"] for row in rows["prompts"]} | {row["messages"][0]["content"] for row in rows["sft"]}
    assert held_out
    assert held_out.isdisjoint(asked)
    tokenizer = load_tokenizer(tmp_path)
    spoken = [turn["content"] for name in ("base", "sft") for row in rows[name] for turn in row["messages"]]
    for text in {*spoken, *held_out}:
        ids = tokenizer.encode(text)
        assert tokenizer.unk_id not in ids
        assert tokenizer.decode(ids) == text
