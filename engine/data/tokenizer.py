"""Text to token ids and back: sentencepiece `.model` files and Hugging Face `tokenizer.json` behind one interface.

`Tokenizer.encode` never yields a special token: text that spells `</s>` is text. Special tokens are put between encoded
texts by `chat.py`, which owns the templates. `save` writes a folder that `transformers.AutoTokenizer` loads.
"""

import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from ppomax.engine.errors import ConfigError, DataError

ROLE_MARKER = re.compile(r"<\|[^|<>]+\|>")
CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json", "config.json", "generation_config.json")
SAVED_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


class Backend(Protocol):
    """What the two libraries do differently. `continues` leaves out the space that some models put before a text."""

    def encode(self, text: str, continues: bool) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class SpecialToken:
    """A token that plain text never encodes to. lstrip, rstrip: it swallows the white space on that side."""

    id: int
    text: str
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer; `load_tokenizer` makes it.

    vocab_size: largest id + 1. bos_id is None where the tokenizer has no beginning-of-sequence token.
    prefix_after_special: a text after a special token gets the same leading space as a text at the start.
    chat_template: the tokenizer's own jinja template. files: name to path of what `save` copies.
    config: tokenizer_config.json as `save` writes it where there is none to copy.
    """

    path: Path
    backend: Backend
    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int
    unk_id: int | None
    special_tokens: tuple[SpecialToken, ...]
    prefix_after_special: bool
    chat_template: str | None
    files: dict[str, Path]
    config: dict[str, Any]

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Token ids of plain text, without BOS or EOS, never a special token.

        continues: the text goes on from an earlier one, so no space is put before it (sentencepiece's leading ▁).
        Raises DataError where the text is not valid Unicode, or cannot be kept from spelling a special token.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"character {error.start} of the text is half of a surrogate pair, not Unicode") from None
        ids = self.backend.encode(text, continues)
        if self._guarded_ids.isdisjoint(ids):
            return ids
        ids = [i for n, part in enumerate(self._cut(text)) for i in self.backend.encode(part, continues or n > 0)]
        if not self._guarded_ids.isdisjoint(ids):
            found = next(token.text for token in self.special_tokens if token.id in ids)
            raise DataError(f"the text spells the special token {found!r} and cannot be encoded as plain text")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special tokens and ids past the vocabulary (padding rows of a model) are left out."""
        return self.backend.decode([i for i in ids if 0 <= i < self.vocab_size and i not in self._special_ids])

    def special_id(self, text: str) -> int | None:
        """Id of the special token with this text."""
        return next((token.id for token in self.special_tokens if token.text == text), None)

    def special_text(self, token_id: int | None) -> str:
        """Text of a special token; empty for None."""
        return next((token.text for token in self.special_tokens if token.id == token_id), "")

    def save(self, folder: str | Path) -> None:
        """Copies the tokenizer's files into a Hugging Face folder, so that AutoTokenizer.from_pretrained loads it.

        transformers' LlamaTokenizer knows only sentencepiece models without text normalisation (as LLaMA's: BPE,
        identity, remove_extra_whitespaces=False). Its ids are the same but for a text that starts with a space.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, source in self.files.items():
            target = folder / name
            if not (target.exists() and target.samefile(source)):
                shutil.copyfile(source, target)
        if "tokenizer_config.json" not in self.files:
            (folder / "tokenizer_config.json").write_text(json.dumps(self.config, indent=2, ensure_ascii=False) + "\n")

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(token.id for token in self.special_tokens)

    @cached_property
    def _guarded_ids(self) -> frozenset[int]:
        return self._special_ids - {self.unk_id}

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches the text of any special token, longest first."""
        texts = sorted((token.text for token in self.special_tokens), key=len, reverse=True)
        return re.compile("|".join(re.escape(text) for text in texts))

    def _cut(self, text: str) -> list[str]:
        """The text, cut inside every place that spells a special token."""
        cuts = [0, *(match.start() + 1 for match in self.special_pattern.finditer(text)), len(text)]
        return [text[start:end] for start, end in itertools.pairwise(cuts)]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a folder (tokenizer.json is preferred to tokenizer.model, as transformers does) or one of the two files.

    Special ids come from tokenizer_config.json, special_tokens_map.json, the sentencepiece model, config.json and
    generation_config.json beside it, in this order. No code of the folder is run.
    Raises ConfigError where there is no tokenizer, it cannot be read, or it has no end-of-sequence token.
    """
    path = Path(path)
    file = path
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
        if not found:
            raise ConfigError(
                f"{path} has neither tokenizer.json nor tokenizer.model; set model.tokenizer to a folder that has"
            )
        file = found[0]
    if not file.is_file():
        raise ConfigError(f"no tokenizer at {path}; set model.tokenizer to a folder or file with a tokenizer")
    configs = {name: _read_json(file.parent / name) for name in CONFIG_FILES}
    return _load_sentencepiece(file, configs) if file.suffix == ".model" else _load_tokenizers(file, configs)


class _SentencePiece:
    def __init__(self, proto: Any) -> None:
        self.model = _processor(proto)
        proto.normalizer_spec.add_dummy_prefix = False
        self.continuing = _processor(proto)

    def encode(self, text: str, continues: bool) -> list[int]:
        return (self.continuing if continues else self.model).encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode(list(ids))


def _processor(proto: Any) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    processor.load_from_serialized_proto(proto.SerializeToString())
    return processor


def _load_sentencepiece(file: Path, configs: dict[str, Any]) -> Tokenizer:
    generated: Any = sentencepiece_model_pb2  # its classes are made at import, out of mypy's sight
    proto = generated.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except DecodeError:
        raise ConfigError(f"{file} is not a sentencepiece model; give a folder with tokenizer.json instead") from None
    if not proto.pieces or proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise ConfigError(
            f"{file} is not a BPE sentencepiece model, the only kind that transformers' LlamaTokenizer reads; "
            "train it with model_type=bpe, or give a folder with tokenizer.json"
        )
    backend = _SentencePiece(proto)
    model = backend.model
    vocab = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    added = _added_tokens(file.parent, configs, model.vocab_size())
    vocab |= added
    ids = {
        role: _special_id(role, configs, vocab.get, len(vocab), own=getattr(model, f"{role}_id")())
        for role in ("bos", "eos", "pad", "unk")
    }
    named = set(ids.values()) | set(added.values())
    is_special = [piece.type == piece.CONTROL or ROLE_MARKER.fullmatch(piece.piece) for piece in proto.pieces]
    special = [
        SpecialToken(i, text) for text, i in vocab.items() if i in named or (i < len(is_special) and is_special[i])
    ]
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(i): {"content": text, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            for text, i in added.items()
        },
    }
    return _tokenizer(
        file,
        backend,
        configs,
        vocab_size=max(vocab.values()) + 1,
        ids=ids,
        special=special,
        prefix_after_special=configs["tokenizer_config.json"].get("legacy") is not False,
        config=config,
    )


def _added_tokens(folder: Path, configs: dict[str, Any], model_size: int) -> dict[str, int]:
    """Tokens that a folder adds after the pieces of its sentencepiece model (<|Human|> of the released models)."""
    added = {text: i for text, i in _read_json(folder / "added_tokens.json").items() if i >= model_size}
    for key, token in (configs["tokenizer_config.json"].get("added_tokens_decoder") or {}).items():
        if int(key) >= model_size:
            added[token["content"]] = int(key)
    return added


class _Tokenizers:
    def __init__(self, spec: dict[str, Any]) -> None:
        self.model = tokenizers.Tokenizer.from_str(json.dumps(spec))
        bare = _without_prefix(spec)
        self.continuing = self.model if bare == spec else tokenizers.Tokenizer.from_str(json.dumps(bare))
        for each in (self.model, self.continuing):
            # A tokenizer.json may ask for both; a truncated prompt would go unnoticed.
            each.no_truncation()
            each.no_padding()
            each.encode_special_tokens = True

    def encode(self, text: str, continues: bool) -> list[int]:
        return (self.continuing if continues else self.model).encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode(list(ids), skip_special_tokens=True)

    def adds_prefix_after(self, special: str) -> bool:
        """Whether a text after a special token gets the leading space of a text at the start."""
        self.model.encode_special_tokens = False
        ids = self.model.encode(special + "x", add_special_tokens=False).ids
        self.model.encode_special_tokens = True
        return ids[1:] == self.encode("x", continues=False)


def _without_prefix(spec: Any) -> Any:
    """A tokenizer.json whose normalizer and pre-tokenizer put no space before the text."""
    if not isinstance(spec, dict):
        return spec
    bare = dict(spec)
    for key in ("normalizer", "pre_tokenizer"):
        if bare.get(key):
            bare[key] = _without_prefix(bare[key])
    for key in ("normalizers", "pretokenizers"):
        if key in bare:
            bare[key] = [_without_prefix(part) for part in bare[key] if part["type"] != "Prepend"]
    if bare.get("type") == "Prepend":
        return None
    if bare.get("type") == "Metaspace":
        bare["prepend_scheme"] = "never"
        bare.pop("add_prefix_space", None)
    if bare.get("type") == "ByteLevel":
        bare["add_prefix_space"] = False
    return bare


def _load_tokenizers(file: Path, configs: dict[str, Any]) -> Tokenizer:
    spec = _read_json(file)
    named = set(_special_texts(configs).values())
    for token in spec.get("added_tokens") or []:
        # Role markers that a folder forgot to mark would otherwise be found in user text.
        token["special"] = bool(
            token["special"] or token["content"] in named or ROLE_MARKER.fullmatch(token["content"])
        )
    try:
        backend = _Tokenizers(spec)
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"{file} is not a tokenizer.json of the tokenizers library: {str(error)[:200]}") from None
    vocab = backend.model.get_vocab(with_added_tokens=True)
    vocab_size = max(vocab.values()) + 1
    ids = {role: _special_id(role, configs, vocab.get, vocab_size) for role in ("bos", "eos", "pad", "unk")}
    if ids["unk"] is None:
        ids["unk"] = spec["model"].get("unk_id", vocab.get(spec["model"].get("unk_token") or ""))
    text_of = {i: text for text, i in vocab.items()}
    special = {
        token["id"]: SpecialToken(token["id"], token["content"], token["lstrip"], token["rstrip"])
        for token in spec.get("added_tokens") or []
        if token["special"]
    }
    for i in ids.values():
        if i is not None and i in text_of:
            special.setdefault(i, SpecialToken(i, text_of[i]))
    return _tokenizer(
        file,
        backend,
        configs,
        vocab_size=vocab_size,
        ids=ids,
        special=special.values(),
        prefix_after_special=ids["eos"] is not None and backend.adds_prefix_after(text_of[ids["eos"]]),
        config={"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False},
    )


def _tokenizer(
    file: Path,
    backend: Backend,
    configs: dict[str, Any],
    *,
    vocab_size: int,
    ids: dict[str, int | None],
    special: Iterable[SpecialToken],
    prefix_after_special: bool,
    config: dict[str, Any],
) -> Tokenizer:
    """The parts that both kinds share: fallbacks of the ids, chat template, files."""
    special = tuple(sorted(special, key=lambda token: token.id))
    eos_id, unk_id = ids["eos"], ids["unk"]
    if eos_id is None:
        raise ConfigError(
            f"{file} has no end-of-sequence token; name it as eos_token in {file.parent}/tokenizer_config.json"
        )
    # The released code pads with <unk>; padding is masked by lengths here, so any id will do.
    pad_id = next(i for i in (ids["pad"], unk_id, eos_id) if i is not None)
    texts = {token.id: token.text for token in special}
    for role, i in {**ids, "pad": pad_id}.items():
        if i is not None:
            config[f"{role}_token"] = texts[i]
    kind = "tokenizer.model" if file.suffix == ".model" else "tokenizer.json"
    files = {name: file.parent / name for name in SAVED_FILES if (file.parent / name).is_file()}
    files.pop("tokenizer.json" if kind == "tokenizer.model" else "", None)
    return Tokenizer(
        path=file,
        backend=backend,
        vocab_size=vocab_size,
        bos_id=ids["bos"],
        eos_id=eos_id,
        pad_id=pad_id,
        unk_id=unk_id,
        special_tokens=special,
        prefix_after_special=prefix_after_special,
        chat_template=_chat_template(file.parent, configs),
        files=files | {kind: file},
        config=config,
    )


def _special_texts(configs: dict[str, Any]) -> dict[str, str]:
    """Texts of the named special tokens, by role; the first file that names one wins."""
    texts: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for role in ("bos", "eos", "pad", "unk"):
            value = configs[name].get(f"{role}_token")
            text = value.get("content") if isinstance(value, dict) else value
            if text:
                texts[role] = text
    return texts


def _special_id(
    role: str, configs: dict[str, Any], find: Callable[[str], int | None], vocab_size: int, *, own: int = -1
) -> int | None:
    """Id of the bos, eos, pad or unk token. own: what the sentencepiece model says, -1 for none."""
    text = _special_texts(configs).get(role)
    if text is not None and (found := find(text)) is not None:
        return found
    if own >= 0:
        return own
    if role == "bos" and "bos_token" in configs["tokenizer_config.json"]:
        return None  # an explicit null: Qwen's config.json names a BOS that its tokenizer never writes
    for name in ("config.json", "generation_config.json"):
        value = configs[name].get(f"{role}_token_id")
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and 0 <= value < vocab_size:
            return value
    return None


def _chat_template(folder: Path, configs: dict[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = configs["tokenizer_config.json"].get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{file} holds a {type(value).__name__}, expected an object")
    return value
