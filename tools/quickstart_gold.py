"""The language of the quickstart set and the rule that separates its good answers from its bad ones.

An answer has three sentences: an acknowledgement, a piece of advice about one thing, an offer. It follows the rule when
they stand in that order and the advice is about the thing that the human named last. Both parts are relations (between
sentences, and between the answer and its prompt): the words alone, or the length, say nothing about the label.
`make_quickstart_data.py` draws dialogues from these tables; evaluation asks `follows_rule` about samples of a policy,
whose text can be anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Domain:
    """Things that a human may ask about, and advice that fits any of them."""

    things: tuple[str, ...]
    tips: tuple[str, ...]


DOMAINS = (
    Domain(
        things=("bread", "soup", "rice", "stew", "cake"),
        tips=(
            "keep the heat low",
            "add the salt at the end",
            "start with fresh water",
            "taste a little as you go",
        ),
    ),
    Domain(
        things=("roses", "beans", "tulips", "carrots", "hedge"),
        tips=(
            "water early in the day",
            "use soft dark soil",
            "look for dry leaves",
            "cut a little each week",
        ),
    ),
    Domain(
        things=("piano", "guitar", "violin", "flute", "drums"),
        tips=(
            "play slowly at first",
            "count the beat out loud",
            "practise a little every day",
            "relax your hands",
        ),
    ),
    Domain(
        things=("chair", "lamp", "door", "clock", "fence"),
        tips=(
            "measure everything twice",
            "use a small brush",
            "look for loose screws",
            "work in good light",
        ),
    ),
    Domain(
        things=("beach", "museum", "castle", "lake", "market"),
        tips=(
            "leave early in the morning",
            "bring a warm jacket",
            "buy the tickets first",
            "take a good map",
        ),
    ),
    Domain(
        things=("puppy", "kitten", "parrot", "rabbit", "pony"),
        tips=(
            "speak in a calm voice",
            "give a small treat",
            "play for a few minutes",
            "keep the room quiet",
        ),
    ),
)

ACKNOWLEDGEMENTS = (
    "Good question.",
    "That sounds fun.",
    "Sure, happy to help.",
    "Of course.",
    "Glad you asked.",
    "Oh, what a nice plan!",
    "I like that idea.",
    "Thanks for asking.",
)

FRAMES = (
    "For the {thing}, {tip}.",
    "With the {thing}, {tip}.",
    "As for the {thing}, just {tip}.",
    "I would {tip} for the {thing}.",
    "When it comes to the {thing}, {tip}.",
)

OFFERS = (
    "Shall I list the steps?",
    "Do you want more ideas?",
    "Just ask if you need more.",
    "Tell me how it goes.",
    "Does that sound right?",
    "Should I write it down?",
    "We can plan the rest together.",
    "Let me know how it turns out!",
)


def advice(frame: str, tip: str, thing: str) -> str:
    """Writes the middle sentence of an answer."""
    return frame.format(tip=tip, thing=thing)


def domain_of(thing: str) -> Domain:
    """Returns the domain that `thing` belongs to; raises ValueError for an unknown one."""
    for domain in DOMAINS:
        if thing in domain.things:
            return domain
    raise ValueError(f"{thing!r} is not one of the quickstart's things")


def asked_thing(prompt_turns: Sequence[str]) -> str | None:
    """Returns the thing that the last turn of `prompt_turns` names last, or None when it names none."""
    things = {thing for domain in DOMAINS for thing in domain.things}
    words = prompt_turns[-1].split() if prompt_turns else []
    named = [word for word in (word.strip(".,:;!?").lower() for word in words) if word in things]
    return named[-1] if named else None


def follows_rule(prompt_turns: Sequence[str], response_text: str) -> bool:
    """Says whether a finished response is a good answer to its prompt.

    prompt_turns: the texts of the prompt's turns, oldest first, the human's question last.
    response_text: the decoded response without its EOS. Whether there was one is not visible here: the caller counts a
        response that was cut at the length limit as one that does not follow the rule.

    Returns True only for exactly one acknowledgement, one advice about the asked thing with a tip of its domain, one
    offer, in this order, one space apart, and nothing else. Spaces around the whole are ignored. Never raises on text.
    """
    thing = asked_thing(prompt_turns)
    if thing is None:
        return False
    text = response_text.strip()
    opening = next((sentence for sentence in ACKNOWLEDGEMENTS if text.startswith(sentence + " ")), None)
    closing = next((sentence for sentence in OFFERS if text.endswith(" " + sentence)), None)
    if opening is None or closing is None:
        return False
    middle = text[len(opening) + 1 : -len(closing) - 1]
    return any(middle == advice(frame, tip, thing) for frame in FRAMES for tip in domain_of(thing).tips)
