"""Where the steps of a response end: the one rule for training process models, for scoring with them and for rewards
per step.

A step ends with the token that completes data.step_delimiter; the last one ends with EOS. A delimiter behind nothing
but white space ends no step, so that empty steps earn nothing. A response without EOS has no last step: it is not
complete.
"""

from bisect import bisect_left
from collections.abc import Sequence
from functools import cache

from ppomax.engine.data.chat import Template


def step_ends(response: Sequence[int], template: Template, delimiter: str) -> list[int]:
    """Positions in `response` (its tokens, EOS included where it has ended) of the last token of each step."""
    return [end for end, _ in _steps(response, template, delimiter)]


def step_texts(response: Sequence[int], template: Template, delimiter: str) -> list[str]:
    """The texts of the steps, without delimiters and surrounding white space."""
    return [text for _, text in _steps(response, template, delimiter)]


def _steps(response: Sequence[int], template: Template, delimiter: str) -> list[tuple[int, str]]:
    """(position of the last token, text) of each step.

    A delimiter may begin and end in the middle of tokens, so the text of growing beginnings of the response is asked
    how many delimiters it has: a number that never falls.
    """
    eos = template.tokenizer.eos_id
    size = list(response).index(eos) if eos in response else len(response)  # tokens before EOS

    @cache
    def beginning(length: int) -> str:
        return template.tokenizer.decode(response[:length])

    pieces = beginning(size).split(delimiter)
    steps: list[tuple[int, str]] = []
    text = ""
    for number, piece in enumerate(pieces[:-1], 1):
        text = text + piece
        if not text.strip():
            continue
        length = bisect_left(range(1, size + 1), number, key=lambda n: beginning(n).count(delimiter)) + 1
        if steps and steps[-1][0] == length - 1:  # one token completes two delimiters
            steps[-1] = (length - 1, steps[-1][1] + delimiter + text.strip())
        else:
            steps.append((length - 1, text.strip()))
        text = ""
    text += pieces[-1]
    if text.strip() and size < len(response):
        steps.append((size, text.strip()))
    return steps
