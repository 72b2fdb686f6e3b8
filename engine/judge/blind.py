"""Pairs for human annotators, who see no names and no fixed side, and what they decided.

`write_blind` makes two files: annotate.csv for the annotators, and key.json, which says who was left and stays away
from them. Sides, order and ids come from a seed that only the key holds.
"""

import csv
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppomax.engine.errors import DataError
from ppomax.engine.judge.intervals import sign_test, wilson
from ppomax.engine.judge.pairwise import Judged, Outcome
from ppomax.engine.judge.responses import Pair

COLUMNS = ("id", "prompt", "left", "right", "verdict")
VERDICTS = ("left", "right", "tie")
LARGEST_CELL = 2**30
"""csv refuses longer cells; its default of 131072 characters is less than a long response."""


@dataclass(frozen=True)
class Key:
    """name_a, name_b: what was compared. left: by id, "a" or "b". categories: by id. identical: pairs that were ties
    without a question.
    """

    name_a: str
    name_b: str
    left: dict[str, str]
    categories: dict[str, str]
    identical: tuple[str, ...]


def write_blind(pairs: Sequence[Pair], folder: Path, *, name_a: str, name_b: str, seed: int) -> int:
    """Writes annotate.csv and key.json; returns the number of questions. Equal responses are not asked for.

    Raises DataError where one of the files exists: annotations may depend on it.
    """
    for name in ("annotate.csv", "key.json"):
        if (folder / name).exists():
            raise DataError(f"{folder / name} exists, and annotations may depend on it; give another folder")
    draw = random.Random(seed)
    rows, left = [], {}
    ids = [hashlib.sha256(f"{seed} {number}".encode()).hexdigest()[:12] for number in range(len(pairs))]
    asked = [number for number, pair in enumerate(pairs) if pair.a != pair.b]
    draw.shuffle(asked)
    for number in asked:
        pair, id = pairs[number], ids[number]
        left[id] = draw.choice("ab")
        sides = (pair.a, pair.b) if left[id] == "a" else (pair.b, pair.a)
        dialogue = "\n\n".join(f"{turn.role.capitalize()}: {turn.text}" for turn in pair.prompt)
        rows.append([id, *map(_cell, (dialogue, *sides)), ""])
    key = {
        "a": name_a,
        "b": name_b,
        "seed": seed,
        "left": left,
        "categories": {id: pair.category for id, pair in zip(ids, pairs, strict=True)},
        "identical": [ids[number] for number, pair in enumerate(pairs) if pair.a == pair.b],
    }
    # Lone surrogates, which JSON can spell, have no UTF-8.
    with (folder / "annotate.csv").open("x", encoding="utf-8-sig", errors="backslashreplace", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    with (folder / "key.json").open("x", encoding="utf-8") as file:
        json.dump(key, file, indent=1)
    return len(rows)


def _cell(text: str) -> str:
    """Text that a spreadsheet shows and does not compute: with an apostrophe before what would begin a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r", "'")) else text


def read_key(path: Path) -> Key:
    """Raises DataError where the file is no key."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        key = Key(
            str(content["a"]),
            str(content["b"]),
            dict(content["left"]),
            dict(content["categories"]),
            tuple(content["identical"]),
        )
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; it is written beside annotate.csv") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{path} is no key of `ppomax compare blind`") from None
    if not set(key.left.values()) <= {"a", "b"} or not {*key.left, *key.identical} <= set(key.categories):
        raise DataError(f"{path} is damaged: its parts do not agree")
    return key


def read_annotations(path: Path, key: Key) -> dict[str, str]:
    """Verdict by id of one annotator's file; rows without a verdict are left out.

    Raises DataError with the line of an id that the key does not have, has twice, or of another verdict.
    """
    found: dict[str, str] = {}
    limit = csv.field_size_limit(LARGEST_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = {"id", "verdict"} - set(reader.fieldnames or ())
            if missing:
                raise DataError(f"{path} has no column {' and '.join(sorted(missing))}; expected {', '.join(COLUMNS)}")
            seen = set()
            for row in reader:
                id, verdict = (row["id"] or "").strip(), (row["verdict"] or "").strip().lower()
                where = f"{path} line {reader.line_num}"
                if id not in key.left:
                    raise DataError(f"{where}: id {id[:40]!r} is not of this key; was a row changed?")
                if id in seen:
                    raise DataError(f"{where}: id {id} is there twice; keep one of its rows")
                seen.add(id)
                if verdict not in ("", *VERDICTS):
                    raise DataError(f"{where}: verdict {verdict[:40]!r}; expected left, right, tie or nothing")
                if verdict:
                    found[id] = verdict
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8; save it as CSV in UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path} is no CSV file: {error}") from None
    finally:
        csv.field_size_limit(limit)
    if not found:
        raise DataError(f"{path} has no verdicts; fill its column verdict with left, right or tie")
    return found


def judge_by_hand(annotators: Sequence[dict[str, str]], key: Key) -> tuple[dict[str, Judged], dict[str, Any]]:
    """Judged pairs by id, and what can be said of the annotators.

    Several annotators of a pair: the side with more votes wins, else it is a tie. Pairs nobody judged are invalid.
    """
    judged = {id: Judged("tie", details={"identical": True}) for id in key.identical}
    for id, left in key.left.items():
        votes = [verdicts[id] for verdicts in annotators if id in verdicts]
        outcome: Outcome = "invalid"
        if votes:
            lead = votes.count("left") - votes.count("right")
            a_lead = lead if left == "a" else -lead
            outcome = "win" if a_lead > 0 else "lose" if a_lead < 0 else "tie"
        judged[id] = Judged(outcome, details={"left": left, "votes": votes})
    all_votes = [vote for verdicts in annotators for vote in verdicts.values()]
    num_left, num_right = all_votes.count("left"), all_votes.count("right")
    facts: dict[str, Any] = {
        "num_annotators": len(annotators),
        "num_votes": len(all_votes),
        "identical_pairs": len(key.identical),
        # Sides are drawn, so that a preference for one of them is the annotators'.
        "left_share": num_left / (num_left + num_right) if num_left + num_right else None,
        "left_interval": list(wilson(num_left, num_left + num_right)) if num_left + num_right else None,
        "left_p": sign_test(num_left, num_right),
        "agreement": _agreement(annotators),
    }
    return judged, facts


def _agreement(annotators: Sequence[dict[str, str]]) -> dict[str, Any] | None:
    """Share of pairs of votes on the same question that are equal, and Cohen's kappa: that beyond chance, by the
    shares of the three verdicts over all votes. None where no question has two votes.
    """
    same = total = 0
    for number, verdicts in enumerate(annotators):
        for other in annotators[number + 1 :]:
            common = verdicts.keys() & other.keys()
            total += len(common)
            same += sum(verdicts[id] == other[id] for id in common)
    if total == 0:
        return None
    votes = [vote for verdicts in annotators for vote in verdicts.values()]
    by_chance = sum((votes.count(verdict) / len(votes)) ** 2 for verdict in VERDICTS)
    kappa = (same / total - by_chance) / (1 - by_chance) if by_chance < 1 else 1.0
    return {"num_vote_pairs": total, "equal": same / total, "kappa": kappa}
