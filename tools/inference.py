"""What commands share that use a model outside of a stage: its configuration, the ranks, the text of its responses."""

import contextlib
import os
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist

from ppomax.engine.config import RunConfig, SamplingConfig
from ppomax.engine.config_checks import check_paths
from ppomax.engine.config_file import load_config
from ppomax.engine.data.chat import Template, make_template
from ppomax.engine.data.tokenizer import Tokenizer, load_tokenizer
from ppomax.engine.dry_run import check_models
from ppomax.engine.models.hf_config import read_shape
from ppomax.engine.models.roles import Role, load_role, role_groups
from ppomax.engine.parallel.device import start, stop
from ppomax.engine.parallel.environment import settings
from ppomax.engine.parallel.layout import check_layout
from ppomax.engine.parallel.watchdog import Watchdog

JOINERS = "\u200c\u200d"
"""Format characters that change nothing but the shape of letters and emoji."""


@dataclass(frozen=True)
class Model:
    """A language model that is ready to answer, on this rank."""

    config: RunConfig
    role: Role
    template: Template

    @property
    def tokenizer(self) -> Tokenizer:
        return self.template.tokenizer


@dataclass(frozen=True)
class Response:
    """text: without EOS and stop text. num_tokens: with them. mean_logprob: nats, of the unmodified T = 1 distribution;
    None where there are no tokens.
    """

    text: str
    num_tokens: int
    finish: Literal["eos", "stop", "length"]
    mean_logprob: float | None


def inference_config(model: str, overrides: Sequence[str]) -> RunConfig:
    """The configuration of a model folder, checked against it and the ranks of this run.

    Unless an override says otherwise, prompt and response fill the model's context, the response half of it at most.
    """
    context = read_shape(model).max_position_embeddings
    longest = max(1, min(SamplingConfig().max_new_tokens, context // 2))
    defaults = [f"data.max_length={context}", f"sampling.max_new_tokens={longest}"]
    config = load_config(None, [*defaults, *overrides, f"model.policy={model}"], command="generate")
    check_layout(config, int(os.environ.get("WORLD_SIZE", "1")), ("policy",))
    check_paths(config, "generate")
    check_models(config, "generate")
    return config


def score_config(model: str, overrides: Sequence[str]) -> RunConfig:
    """The configuration of a reward model's folder, checked as in inference_config; data.max_length is its context."""
    context = read_shape(model).max_position_embeddings
    config = load_config(None, [f"data.max_length={context}", *overrides, f"model.reward={model}"], command="score")
    check_layout(config, int(os.environ.get("WORLD_SIZE", "1")), ("reward",))
    check_paths(config, "score")
    check_models(config, "score")
    return config


def load_template(config: RunConfig) -> Template:
    """The template of an inference_config or a score_config, for its tokenizer."""
    model = config.model
    return make_template(config.data, load_tokenizer(model.tokenizer or model.policy or model.reward))


@contextlib.contextmanager
def open_model(config: RunConfig, template: Template) -> Iterator[Model]:
    """Loads the model of an inference_config and leaves the process group at the end. Every rank must call it."""
    with joined_ranks(config):
        yield load_model(config, template)


def load_model(config: RunConfig, template: Template) -> Model:
    """The model of an inference_config, within joined_ranks. Every rank must call it."""
    return Model(config, load_role("policy", config.model.policy, config, role_groups(config)["policy"]), template)


@contextlib.contextmanager
def joined_ranks(config: RunConfig) -> Iterator[None]:
    """The ranks of this run are one process group until the end of the body. Every rank must call it."""
    start(config.parallel.timeout_seconds, agreed=settings(config))
    watchdog = Watchdog(config.parallel.timeout_seconds)
    try:
        yield
    except BaseException as error:
        watchdog.explain(error)
        # As in a stage: peers may wait in a collective, and leaving the group could wait for them in turn.
        if dist.get_world_size() == 1:
            stop()
        raise
    watchdog.stop()
    stop()


def stop_sequences(stops: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Token sequences that spell the stop texts: each alone and going on from other text, or one special token."""
    sequences: list[list[int]] = []
    for text in stops:
        special = tokenizer.special_id(text)
        alone, behind = tokenizer.encode(text), tokenizer.encode(text, continues=True)
        ways = [alone, behind] if special is None else [[special]]
        sequences += [ids for ids in ways if ids and ids not in sequences]
    return sequences


def read_response(
    ids: Sequence[int],
    logprobs: Sequence[float],
    *,
    finished: bool,
    tokenizer: Tokenizer,
    stops: Sequence[str],
    min_new_tokens: int,
) -> Response:
    """Text and end of a response, given its tokens and whether EOS or a stop sequence ended it.

    Which tokens spell a stop text also depends on what is around it, so the generator may run past one: the response
    ends with the first token, from the min_new_tokens-th on, that completes a stop text.
    """
    ends_by_eos = finished and ids[-1] == tokenizer.eos_id
    body = list(ids[:-1] if ends_by_eos else ids)
    text, count = tokenizer.decode(body), len(ids)
    finish: Literal["eos", "stop", "length"] = "eos" if ends_by_eos else "length"
    span = _first_stop(text, stops, len(tokenizer.decode(body[: max(0, min_new_tokens - 1)])))
    if span is not None:
        count = 1 + bisect_left(range(1, len(body)), span[1], key=lambda n: len(tokenizer.decode(body[:n])))
        text, finish = text[: span[0]], "stop"
    elif finished and not ends_by_eos:
        # The text of this stop sequence is not in that of the response: a special token, or a space at its start.
        ends = [len(stop) for stop in stop_sequences(stops, tokenizer) if body[-len(stop) :] == stop]
        text, finish = tokenizer.decode(body[: -max(ends)]), "stop"
    return Response(text, count, finish, sum(logprobs[:count]) / count if count else None)


def _first_stop(text: str, stops: Sequence[str], start: int) -> tuple[int, int] | None:
    """(start, end) of the stop text in `text` that ends first, of those that end behind `start` characters."""
    found = [(text.find(stop, max(0, start - len(stop) + 1)), stop) for stop in stops]
    spans = [(first, first + len(stop)) for first, stop in found if first >= 0]
    return min(spans, key=lambda span: (span[1], span[0]), default=None)


def printable(text: str) -> str:
    """The text with its control characters escaped, so that a terminal shows it and does not obey it.

    Line breaks and tabs stay. Escaped, as in a Python string: other controls, surrogates, and format characters, which
    can turn the direction of what is shown.
    """
    return "".join(map(_printable, text))


def _printable(character: str) -> str:
    is_shown = unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
    return character if is_shown or character in "\n\t" + JOINERS else ascii(character)[1:-1]
