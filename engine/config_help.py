"""The configuration in words: what a field takes, what it is for, and which known key a misspelt one is nearest to."""

import difflib
import itertools
import json
import re
import textwrap
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from ppomax.engine.config import DataSource, RunConfig
from ppomax.engine.config_section import Section
from ppomax.engine.errors import ConfigError
from ppomax.engine.presets import PRESETS

WIDTH = 110


def describe(topic: str | None) -> str:
    """The text of `ppomax help TOPIC`: all sections, one section, or one field."""
    if topic is None:
        lines = [f"  {name:<12}{_first_sentence(section)}" for name, section in sections() if "." not in name]
        return "Sections of the configuration (`ppomax help SECTION` lists the fields of one):\n" + "\n".join(lines)
    by_name, by_key = dict(sections()), dict(fields())
    if topic in by_key:
        return _describe_field(topic, by_key[topic])
    if topic not in by_name:
        guess = nearest_key(topic, [*by_name, *by_key])
        hint = f"; did you mean {guess}?" if guess else "; `ppomax help` lists the sections"
        raise ConfigError(f"{topic}: no section or field of this name{hint}")
    parts = [textwrap.fill(f"[{topic}]  {_text(by_name[topic].__doc__)}", WIDTH)]
    parts += [_describe_field(key, field) for key, field in by_key.items() if key.rpartition(".")[0] == topic]
    parts += [f"[{name}]  {_first_sentence(inner)}" for name, inner in by_name.items() if name.startswith(topic + ".")]
    for row in dict.fromkeys(filter(None, map(row_section, by_name[topic].model_fields.values()))):
        parts += [f"One row: {_text(row.__doc__)}", *(_describe_field(*item) for item in row.model_fields.items())]
    return "\n\n".join(parts)


def sections(root: type[Section] = RunConfig, prefix: str = "") -> Iterator[tuple[str, type[Section]]]:
    """(dotted name, class) of every section under root, outer ones first."""
    for name, field in root.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield prefix + name, inner
            yield from sections(inner, f"{prefix}{name}.")


def fields() -> Iterator[tuple[str, FieldInfo]]:
    """(dotted key, field) of everything that can be set, in the order of the tree."""
    for section_name, section in sections():
        inner = {name.rpartition(".")[2] for name, _ in sections(section)}
        for name, field in section.model_fields.items():
            if name not in inner:
                yield f"{section_name}.{name}", field


def nearest_key(key: str, known: list[str]) -> str | None:
    """The known key that was probably meant: the same field in another section, else the most similar spelling."""
    last = key.rpartition(".")[2]
    same_field = [candidate for candidate in known if candidate.rpartition(".")[2] == last]
    matches = difflib.get_close_matches(key, same_field or known, n=1, cutoff=0.0 if same_field else 0.6)
    return matches[0] if matches else None


def expected(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """What a field takes, as "whole number > 0" or 'one of "a", "b"'."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        extras = [extra.metadata if isinstance(extra, FieldInfo) else [extra] for extra in arguments[1:]]
        return expected(arguments[0], tuple(itertools.chain.from_iterable(extras)))
    if origin in (Union, types.UnionType):
        return " or ".join(expected(option) for option in arguments)
    if origin is Literal:
        return "one of " + ", ".join(json.dumps(option) for option in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        if arguments[0] is DataSource:
            return "a file, or a list of files or of {path = FILE, weight = NUMBER, format = NAME}"
        return "a list of {" + ", ".join(f"{name} = ..." for name in list(arguments[0].model_fields)[:3]) + ", ...}"
    if origin is tuple:
        return "[" + ", ".join(expected(item) for item in arguments) + "]"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return f"a table with {', '.join(annotation.model_fields)}"
    names = {bool: "true or false", int: "whole number", float: "number", str: "text", types.NoneType: '"none"'}
    return " ".join([names[annotation], *_bounds(metadata)])


def row_section(field: FieldInfo) -> type[Section] | None:
    """The section that each row of a list field is, as DataSource of data.train; None for other fields."""
    first = next(iter(get_args(field.annotation)), None)
    return first if isinstance(first, type) and issubclass(first, Section) else None


def allows_none(field: FieldInfo) -> bool:
    """Whether "none" in the file stands for no value."""
    return types.NoneType in get_args(field.annotation)


def toml_value(value: Any) -> str:
    """A value as TOML writes it; None, which TOML lacks, becomes the word that the reader takes for it."""
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return str(value)


def _describe_field(key: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else f"default {toml_value(field.default)}"
    lines = [f"{key}: {expected(field.annotation, tuple(field.metadata))}; {default}"]
    others = [
        f"{name} {toml_value(values[key])}"
        for name, values in PRESETS.items()
        if key in values and toml_value(values[key]) != toml_value(field.default)
    ]
    if others:
        lines.append("Presets: " + ", ".join(others))
    lines.append(_text(field.description))
    indented = [textwrap.fill(line, WIDTH, initial_indent="    ", subsequent_indent="    ") for line in lines[1:]]
    return "\n".join([lines[0], *indented])


def _bounds(metadata: tuple[Any, ...]) -> list[str]:
    signs = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
    limits = [(sign, getattr(item, name, None)) for item in metadata for name, sign in signs]
    texts = [f"{sign} {limit}" for sign, limit in limits if limit is not None]
    return [" and ".join(texts)] if texts else []


def _text(docstring: str | None) -> str:
    return " ".join((docstring or "").split())


def _first_sentence(section: type[Section]) -> str:
    """Up to the first full stop before a capital: "Fig. 5" does not end a sentence."""
    return re.split(r"\.(?: (?=[A-Z])|$)", _text(section.__doc__))[0]
