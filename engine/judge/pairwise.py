"""From single judgements to win / tie / lose: position swap, tallies with intervals, position bias.

The responses of a pair are A and B; what is won, is won by A. A judge sees them as first and second.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ppomax.engine.judge.intervals import LEVEL, sign_test, wilson

Place = Literal["first", "second", "tie"]
Outcome = Literal["win", "tie", "lose", "invalid"]
OUTCOMES: tuple[Outcome, ...] = ("win", "tie", "lose")


@dataclass(frozen=True)
class Judged:
    """The outcome of one pair, and what led to it.

    in_order: what the judge preferred when A came first; swapped: when B did; None where it gave no verdict.
    details: more for the record of the pair.
    """

    outcome: Outcome
    in_order: Place | None = None
    swapped: Place | None = None
    details: dict[str, Any] | None = None


def combine(in_order: Place | None, swapped: Place | None) -> Outcome:
    """A wins or loses only if both orders say so; verdicts that differ are a tie, a missing one makes the pair invalid.

    in_order: the verdict with A first; swapped: with B first.
    """
    if in_order is None or swapped is None:
        return "invalid"
    if (in_order, swapped) == ("first", "second"):
        return "win"
    if (in_order, swapped) == ("second", "first"):
        return "lose"
    return "tie"


def by_margin(difference: float, margin: float) -> Outcome:
    """Win where A's score is higher by more than the margin, lose where B's is, else tie; invalid without a number."""
    if not math.isfinite(difference):
        return "invalid"
    if abs(difference) <= margin:
        return "tie"
    return "win" if difference > 0 else "lose"


def tally(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Counts, shares of the valid pairs with Wilson intervals, and the sign test of wins against losses."""
    total = sum(outcome != "invalid" for outcome in outcomes)
    result: dict[str, Any] = {"num_valid": total, "num_invalid": len(outcomes) - total}
    for name in OUTCOMES:
        count = outcomes.count(name)
        result[name] = count
        result[f"{name}_rate"] = count / total if total else None
        result[f"{name}_interval"] = list(wilson(count, total)) if total else None
    result["sign_test_p"] = sign_test(result["win"], result["lose"])
    return result


def position_bias(judged: Sequence[Judged]) -> dict[str, Any]:
    """How often the place decided: pairs whose both orders prefer the first place, or the second.

    consistent: pairs with the same answer in both orders. first_interval: of the share of first places among all
    verdicts that are no tie; without bias it is 1/2, since each response is first once. p: sign test of both_first
    against both_second.
    """
    valid = [(item.in_order, item.swapped) for item in judged if item.in_order and item.swapped]
    both = {place: valid.count((place, place)) for place in ("first", "second")}
    verdicts = [verdict for pair in valid for verdict in pair]
    num_first, num_decided = verdicts.count("first"), len(verdicts) - verdicts.count("tie")
    agreeing = (("first", "second"), ("second", "first"), ("tie", "tie"))
    return {
        "num_pairs": len(valid),
        "both_first": both["first"],
        "both_second": both["second"],
        "consistent": sum(pair in agreeing for pair in valid),
        "first_share": num_first / num_decided if num_decided else None,
        "first_interval": list(wilson(num_first, num_decided)) if num_decided else None,
        "p": sign_test(both["first"], both["second"]),
    }


def summarise(
    judged: Sequence[Judged], categories: Sequence[str], *, name_a: str, name_b: str, judge: str, is_swapped: bool
) -> dict[str, Any]:
    """The content of results.json. is_swapped: the judge saw both orders, so its position bias can be told."""
    outcomes = [item.outcome for item in judged]
    names = dict.fromkeys(category for category in categories if category)
    of_category = {
        name: [outcome for outcome, category in zip(outcomes, categories, strict=True) if category == name]
        for name in names
    }
    return {
        "a": name_a,
        "b": name_b,
        "judge": judge,
        "level": LEVEL,
        "overall": tally(outcomes),
        "categories": {name: tally(members) for name, members in of_category.items()},
        "position": position_bias(judged) if is_swapped else None,
    }
