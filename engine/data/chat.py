"""Dialogues to token ids: turns, their checks, the paper's templates and the tokenizer's own chat template.

A template spells a dialogue as pieces: the context, and what the assistant says. Prompts, SFT dialogues and scored
responses all come from the same pieces, so the ids of a prompt are always a prefix of the ids of its dialogue.
Reading files and cutting long dialogues is left to `datasets.py`.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ppomax.engine.config import DataConfig
from ppomax.engine.data.tokenizer import SpecialToken, Tokenizer
from ppomax.engine.errors import ConfigError, DataError

Role = Literal["human", "assistant"]

HH_MARKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
HIDDEN = re.compile("\ue000([0-9]+)\ue001")


@dataclass(frozen=True)
class Turn:
    """What one side says."""

    role: Role
    text: str


@dataclass(frozen=True)
class Piece:
    """Tokens of a dialogue that are all learned by SFT, or all not."""

    tokens: list[int]
    learned: bool


@dataclass(frozen=True)
class Template:
    """Spells dialogues for one tokenizer; `make_template` makes it.

    spell: pieces of a dialogue. After a last human turn they end with the assistant's prefix; after a last assistant
    turn they end with that response, EOS included, as one piece.
    """

    tokenizer: Tokenizer
    spell: Callable[[Sequence[Turn]], list[Piece]]

    def encode_prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Token ids that a response follows: the dialogue and the assistant's prefix. The last turn must be human."""
        check_turns(turns, last="human")
        return [token for piece in self.spell(turns) for token in piece.tokens]

    def encode_dialogue(self, turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
        """Token ids and loss mask of a dialogue that ends with an assistant turn.

        The mask keeps assistant turns with their closing EOS; in the paper's templates also the assistant's prefix, as
        in the released code.
        """
        check_turns(turns, last="assistant")
        pieces = self.spell(turns)
        tokens = [token for piece in pieces for token in piece.tokens]
        return tokens, [piece.learned for piece in pieces for _ in piece.tokens]

    def encode_response(self, text: str) -> list[int]:
        """Token ids of a response with its EOS, as they follow a prompt. One format for training and for scoring."""
        turns = (Turn("human", "x"), Turn("assistant", text))
        check_turns(turns, last="assistant")
        return self.spell(turns)[-1].tokens

    def decode_response(self, ids: Iterable[int]) -> str:
        """Text of a response, up to its first EOS."""
        kept = list(ids)
        end = kept.index(self.tokenizer.eos_id) if self.tokenizer.eos_id in kept else len(kept)
        return self.tokenizer.decode(kept[:end])


def make_template(data: DataConfig, tokenizer: Tokenizer) -> Template:
    """The template that data.template names, with data.system_prompt.

    Raises ConfigError where the tokenizer lacks what the template needs.
    """
    if data.template == "chat_template":
        return _chat_template(tokenizer, data.system_prompt)
    return _paper_template(tokenizer, data.system_prompt, chinese=data.template == "paper_zh")


def check_turns(turns: Sequence[Turn], *, last: Role) -> None:
    """Raises DataError unless roles alternate from human to `last` and every text says something."""
    if not turns:
        raise DataError("the dialogue has no turns")
    _check_order(turns)
    for number, turn in enumerate(turns, 1):
        if not turn.text.strip():
            raise DataError(f"turn {number} of {len(turns)} ({turn.role}) is empty")
    if turns[-1].role != last:
        raise DataError(f"the last turn, {len(turns)}, is {turns[-1].role}, expected {last}")


def parse_hh(text: str) -> list[Turn]:
    """Turns of "\\n\\nHuman: ...\\n\\nAssistant: ...", the format of HH-RLHF.

    A marker counts at the start and after a blank line, nowhere else: real answers contain "Human:". Texts are stripped
    and may be empty. Raises DataError where roles do not alternate from human; nothing is merged or swapped.
    """
    parts = HH_MARKER.split(text)
    if parts[0].strip() or len(parts) == 1:
        raise DataError(f"expected '\\n\\nHuman:' at the start, found {_excerpt(text)}")
    roles: dict[str, Role] = {"Human": "human", "Assistant": "assistant"}
    turns = [Turn(roles[name], said.strip()) for name, said in zip(parts[1::2], parts[2::2], strict=True)]
    _check_order(turns)
    return turns


def _check_order(turns: Sequence[Turn]) -> None:
    for number, turn in enumerate(turns):
        expected = "assistant" if number % 2 else "human"
        if turn.role != expected:
            raise DataError(f"turn {number + 1} of {len(turns)} is {turn.role}, expected {expected}")


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _paper_template(tokenizer: Tokenizer, system_prompt: str, *, chinese: bool) -> Template:
    """<s>Human:u1</s>Assistant:a1</s>...: every turn closes with EOS, no space after the role (released code).

    The ids are those of the slow LlamaTokenizer that the paper used: a sentencepiece model puts ▁ after every special
    token. Role and text are encoded apart, so that no token spans them: else a prompt would not be a prefix of its
    dialogue. A system prompt is a first turn without a role.
    """
    if chinese:
        markers = {"human": _role_token(tokenizer, "<|Human|>"), "assistant": _role_token(tokenizer, "<|MOSS|>")}
    else:
        markers = {"human": tokenizer.encode("Human:"), "assistant": tokenizer.encode("Assistant:")}
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    if system_prompt:
        start += [*tokenizer.encode(system_prompt), tokenizer.eos_id]

    def spell(turns: Sequence[Turn]) -> list[Piece]:
        pieces = [Piece(start, False)]
        for turn in turns:
            learned = turn.role == "assistant"
            text = tokenizer.encode(turn.text, continues=not chinese)
            pieces += [Piece(markers[turn.role], learned), Piece([*text, tokenizer.eos_id], learned)]
        if turns[-1].role == "human":
            pieces.append(Piece(markers["assistant"], False))
        return pieces

    return Template(tokenizer, spell)


def _role_token(tokenizer: Tokenizer, text: str) -> list[int]:
    token_id = tokenizer.special_id(text)
    if token_id is None:
        raise ConfigError(
            f"{tokenizer.path} has no token {text!r}, which data.template=paper_zh needs; "
            "add it to the tokenizer, or set data.template to paper_en or chat_template"
        )
    return [token_id]


def _chat_template(tokenizer: Tokenizer, system_prompt: str) -> Template:
    """The jinja template of the tokenizer's folder, rendered in a sandbox that has no clock.

    What the template writes after the generation prompt, up to EOS, is the response. Special tokens that a text spells
    are hidden while the rendered dialogue is split into special tokens and text, so they stay text.
    """
    if tokenizer.chat_template is None:
        raise ConfigError(f"{tokenizer.path} has no chat template; set data.template=paper_en, or give the folder one")
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    sandbox.globals["raise_exception"] = _raise_exception
    try:
        compiled = sandbox.from_string(tokenizer.chat_template)
    except jinja2.TemplateError as error:
        raise ConfigError(f"the chat template of {tokenizer.path} is not valid jinja: {error}") from None
    render = partial(_render, tokenizer, compiled, system_prompt)
    template = Template(tokenizer, lambda turns: _encode_spans(tokenizer, _rendered_spans(tokenizer, render, turns)))
    try:
        template.encode_response("x")
    except DataError as error:
        hint = "; data.system_prompt is set, perhaps it knows no system role" if system_prompt else ""
        raise ConfigError(f"the chat template of {tokenizer.path} cannot be used: {error}{hint}") from None
    return template


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _render(tokenizer: Tokenizer, compiled: jinja2.Template, system_prompt: str, turns: Sequence[Turn]) -> str:
    numbers = {token.text: number for number, token in enumerate(tokenizer.special_tokens)}

    def message(role: str, text: str) -> dict[str, str]:
        hidden = tokenizer.special_pattern.sub(lambda match: f"\ue000{numbers[match[0]]}\ue001", text)
        return {"role": role, "content": hidden}

    messages = [message("system", system_prompt)] if system_prompt else []
    messages += [message("user" if turn.role == "human" else "assistant", turn.text) for turn in turns]
    try:
        return compiled.render(
            messages=messages,
            add_generation_prompt=turns[-1].role == "human",
            bos_token=tokenizer.special_text(tokenizer.bos_id),
            eos_token=tokenizer.special_text(tokenizer.eos_id),
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise DataError(f"the chat template refuses the dialogue: {str(error)[:200]}") from None


def _rendered_spans(
    tokenizer: Tokenizer, render: Callable[[Sequence[Turn]], str], turns: Sequence[Turn]
) -> list[tuple[str, bool]]:
    """(text, learned) of a rendered dialogue, found by rendering each of its prefixes."""
    eos = tokenizer.special_text(tokenizer.eos_id)
    spans: list[tuple[str, bool]] = []
    written = ""
    for count in range(1, len(turns), 2):
        prompt, dialogue = render(turns[:count]), render(turns[: count + 1])
        end = dialogue.find(eos, len(prompt)) + len(eos)
        if end < len(prompt) + len(eos):
            raise ConfigError(
                f"the chat template of {tokenizer.path} does not close an assistant turn with the EOS {eos!r}; "
                "set eos_token in tokenizer_config.json to the token that it writes"
            )
        if not (prompt.startswith(written) and dialogue.startswith(prompt)):
            break
        spans += [(prompt[len(written) :], False), (dialogue[len(prompt) : end], True)]
        written = dialogue[:end]
    whole = render(turns)
    if not whole.startswith(written) or len(spans) < len(turns) // 2 * 2:
        if turns[-1].role == "human":
            return [(whole, False)]
        raise ConfigError(
            f"the chat template of {tokenizer.path} rewrites earlier turns, so a dialogue of {len(turns)} turns has no "
            "loss mask; split the data into single exchanges, or set data.template=paper_en"
        )
    return [*spans, (whole[len(written) :], False)] if turns[-1].role == "human" else spans


def _encode_spans(tokenizer: Tokenizer, spans: Sequence[tuple[str, bool]]) -> list[Piece]:
    """Pieces of consecutive stretches of rendered text, special tokens recognised."""
    pieces = []
    by_text = {token.text: token for token in tokenizer.special_tokens}
    before: SpecialToken | None = None
    started = False
    for span, learned in spans:
        tokens: list[int] = []
        parts = re.split(f"({tokenizer.special_pattern.pattern})", span)
        for number, part in enumerate(parts):
            if number % 2:
                before = by_text[part]
                tokens.append(before.id)
            else:
                if before is not None and before.rstrip:
                    part = part.lstrip()
                if number + 1 < len(parts) and by_text[parts[number + 1]].lstrip:
                    part = part.rstrip()
                if not part:
                    continue
                text = HIDDEN.sub(lambda match: _unhide(tokenizer, match), part)
                continues = started and (before is None or not tokenizer.prefix_after_special)
                tokens += tokenizer.encode(text, continues=continues)
                before = None
            started = True
        pieces.append(Piece(tokens, learned))
    return pieces


def _unhide(tokenizer: Tokenizer, match: re.Match[str]) -> str:
    number = int(match[1])
    # Text may hold these private characters itself; then the number means nothing.
    return tokenizer.special_tokens[number].text if number < len(tokenizer.special_tokens) else match[0]
