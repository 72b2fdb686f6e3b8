"""Tokens to text one by one: what each token adds to the text of those before it."""

from collections.abc import Callable, Sequence

from ppomax.engine.data.tokenizer import Tokenizer


class TextStream:
    """Text of tokens that come one by one. What `push` and `end` return is together the text of all tokens.

    Tokens are decoded behind some that were decoded before, because the text of a token depends on what precedes it
    (the space at the start of a text), and kept while they end within a character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode: Callable[[Sequence[int]], str] = tokenizer.decode
        self._shown: list[int] = []
        self._kept: list[int] = []

    def push(self, token: int) -> str:
        self._kept.append(token)
        return "" if self._text().endswith("\ufffd") else self.end()

    def end(self) -> str:
        """The text of the tokens that were kept."""
        text = self._text()[len(self._decode(self._shown)) :]
        # Tokens without text, as special ones, cannot stand for what came before them.
        self._shown, self._kept = self._kept if text else self._shown + self._kept, []
        return text

    def _text(self) -> str:
        return self._decode([*self._shown, *self._kept])


def token_pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; special tokens spelled out.

    Of several tokens that make one character (bytes of it) the last one has it, the others have "". A special token
    ends a character that is not complete, which becomes U+FFFD.
    """
    stream = TextStream(tokenizer)
    special = {token.id: token.text for token in tokenizer.special_tokens}
    pieces: list[str] = []
    for token in ids:
        if token not in special:
            pieces.append(stream.push(token))
            continue
        rest = stream.end()
        if rest:
            pieces[-1] += rest
            stream = TextStream(tokenizer)
        pieces.append(special[token])
    if pieces:
        pieces[-1] += stream.end()
    return pieces
