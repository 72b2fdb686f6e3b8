"""Final answers of mathematical responses: found in a text, and compared as numbers where they are numbers.

Nothing is evaluated: a response cannot run code, and numbers of more than MAX_DIGITS characters are compared as text.
"""

import re
from fractions import Fraction

MAX_DIGITS = 60
NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+"
LAST_NUMBER = re.compile(rf"(?<![\w.])(?:{NUMBER})(?:/\d+)?")
ANNOUNCED = re.compile(r"(?:####|(?:final\s+)?answer\s*(?:is\b|:|=))\s*:?\s*(.+)", re.IGNORECASE)
VALUE = re.compile(rf"({NUMBER})(?:/({NUMBER}))?")
FRACTION = re.compile(r"(-?)\\[dt]?frac\s*(?:\{(-?[\d.]+)\}\s*\{([\d.]+)\}|(\d)\s*(\d))")
WRAPPER = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}")
DECORATION = re.compile(r"\\[,;:! ]|\\(?:left|right|displaystyle|dollar|percent)|\\?[$%]|\^\{?\\circ\}?|°|~")


def final_answer(text: str) -> str:
    """The answer that a text comes to; "" where there is none.

    In this order: the last \\boxed{...}; what follows the last "####", "answer is", "answer:" or "answer =" on its
    line; the last number.
    """
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    announced = ANNOUNCED.findall(text)
    if announced:
        return re.sub(r"[.!]\s*$", "", announced[-1]).strip()
    numbers = LAST_NUMBER.findall(text)
    return numbers[-1] if numbers else ""


def same_answer(found: str, expected: str) -> bool:
    """Whether two answers are equal: as exact numbers (3/4 = 0.75 = \\frac{3}{4}, 1,000 = 1000), else as texts without
    spaces and decoration. An empty answer equals nothing.
    """
    ours, theirs = _plain(found), _plain(expected)
    if not ours or not theirs:
        return False
    numbers = _number(ours), _number(theirs)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return ours == theirs


def _last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...} or \\fbox{...} whose braces close."""
    starts = [match.end() for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]
    for start in reversed(starts):
        depth = 1
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start:end]
    return None


def _plain(answer: str) -> str:
    answer = WRAPPER.sub(r"\1", answer)
    answer = DECORATION.sub("", answer)
    answer = FRACTION.sub(lambda m: f"{m[1]}{m[2] or m[4]}/{m[3] or m[5]}", answer)
    return re.sub(r"\s+", "", answer).strip(".").removeprefix("+").lower()


def _number(answer: str) -> Fraction | None:
    match = VALUE.fullmatch(answer)
    if match is None or len(answer) > MAX_DIGITS:
        return None
    top, bottom = (Fraction(part.replace(",", "")) if part else Fraction(1) for part in match.groups())
    return None if bottom == 0 else top / bottom
