"""`ppomax chat`: a dialogue with a model in a terminal, token by token.

Lines are what the human says, or commands (`HELP`). Ctrl-C ends the response that is being written, which then stays in
the dialogue as far as it got; Ctrl-D leaves. What the model writes is shown with its control characters escaped.
"""

import argparse
import contextlib
import importlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from ppomax.engine.config import RunConfig, SamplingConfig
from ppomax.engine.config_file import load_config
from ppomax.engine.config_help import toml_value
from ppomax.engine.data.chat import Turn
from ppomax.engine.data.datasets import fit_prompt
from ppomax.engine.data.text_stream import TextStream
from ppomax.engine.errors import ConfigError, PpomaxError
from ppomax.engine.rollout.generate import generate, request_seeds
from ppomax.tools.inference import Model, inference_config, load_template, open_model, printable

HELP = """\
/reset                begin a new dialogue
/set                  show how responses are sampled
/set temperature=0.7  change it: any field of [sampling] (`ppomax help sampling`)
/help                 this text
/exit, Ctrl-D         leave
Ctrl-C                end the response that is being written
A line that starts with a space is never a command."""


def main(argv: Sequence[str]) -> None:
    """`ppomax chat MODEL [--system TEXT] [section.field=value ...]`."""
    parser = argparse.ArgumentParser(
        prog="ppomax chat",
        description=__doc__,
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face folder of a language model")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="sampling.temperature=0, ...")
    parser.add_argument("--system", metavar="TEXT", help="short for data.system_prompt=TEXT")
    parser.add_argument("--seed", type=int, help="short for train.seed=SEED")
    arguments = parser.parse_intermixed_args(argv)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("chat runs in one process; start it without torchrun")
    given = {"data.system_prompt": arguments.system, "train.seed": arguments.seed}
    overrides = [f"{key}={value}" for key, value in given.items() if value is not None]
    # A token is shown as soon as it is known.
    config = inference_config(arguments.model, ["sampling.steps_ahead=0", *arguments.overrides, *overrides])
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    with open_model(config, load_template(config)) as model:
        chat(model, _lines_of_terminal(), sys.stdout)


def _lines_of_terminal() -> Iterator[str]:
    """Lines that a person types, or of a pipe. Ctrl-C drops the line."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # line editing and history for input()
    while True:
        try:
            yield input("> " if is_terminal else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print()


def chat(model: Model, lines: Iterator[str], out: TextIO) -> None:
    """Answers the lines one after the other until they end or one says /exit."""
    dialogue = Dialogue(model, out)
    for line in lines:
        command, _, rest = line.rstrip().partition(" ")
        try:
            if not line.startswith("/"):
                if line.strip():
                    dialogue.answer(line.strip())
            elif command == "/exit":
                return
            elif command == "/reset":
                dialogue.reset()
            elif command == "/set":
                dialogue.set(rest.split())
            elif command == "/help":
                dialogue.note(HELP)
            else:
                dialogue.note(f"{command}: no such command; /help lists them, a leading space makes it text")
        except KeyboardInterrupt:
            dialogue.note("(stopped)")
        except PpomaxError as error:
            dialogue.note(f"{type(error).__name__}: {error}")


class Dialogue:
    """The turns so far and how the next response is sampled; what is said goes to `out`."""

    def __init__(self, model: Model, out: TextIO) -> None:
        self.model, self.out, self.config = model, out, model.config
        self.turns: tuple[Turn, ...] = ()
        self.num_asked = 0

    def reset(self) -> None:
        self.turns = ()
        self.note("(a new dialogue)")

    def set(self, assignments: Sequence[str]) -> None:
        """Changes fields of [sampling]; without any, shows them. Raises ConfigError on a fault and changes nothing."""
        self.config = with_sampling(self.config, assignments)
        if not assignments:
            self.note("\n".join(f"{name}={toml_value(value)}" for name, value in self.config.sampling))

    def note(self, text: str) -> None:
        self.out.write(printable(text) + "\n")
        self.out.flush()

    def answer(self, text: str) -> None:
        """Shows the response to what the human says and adds both to the dialogue.

        An empty response, and what it answers, is left out: templates have no empty turns. Raises DataError where the
        text alone leaves no room for a response.
        """
        model, sampling = self.model, self.config.sampling
        turns = (*self.turns, Turn("human", text))
        limit = self.config.data.max_length - sampling.max_new_tokens
        tokens, kept = fit_prompt(turns, model.template, max_prompt_tokens=limit)
        if len(kept) < len(turns):
            self.note(f"(the {len(turns) - len(kept)} oldest turns no longer fit and are forgotten)")
        ids: list[int] = []
        stream = TextStream(model.tokenizer)

        def show(request: int, token: int) -> None:
            ids.append(token)
            self.out.write(printable(stream.push(token)))
            self.out.flush()

        # The same question after /reset gets another response; the same session, the same responses.
        seeds = request_seeds(self.config.train.seed, self.num_asked, 1)
        self.num_asked += 1
        ending = ""
        try:
            rollout = generate(
                model.role,
                [tokens],
                sampling,
                seeds=seeds,
                eos_id=model.tokenizer.eos_id,
                pad_id=model.tokenizer.pad_id,
                max_length=self.config.data.max_length,
                on_token=show,
            )
            if not rollout.finished[0]:
                ending = f"\n(ends here: max_new_tokens={sampling.max_new_tokens})"
        except KeyboardInterrupt:
            ending = "\n(stopped)"
        self.note(stream.end() + ending)
        said = model.template.decode_response(ids)
        if said.strip():
            self.turns = (*kept, Turn("assistant", said))
        else:
            self.note("(an empty response; the turn is left out of the dialogue)")


def with_sampling(config: RunConfig, assignments: Sequence[str]) -> RunConfig:
    """The configuration with fields of [sampling] changed by FIELD=VALUE. Raises ConfigError."""
    for assignment in assignments:
        field, equals, _ = assignment.removeprefix("sampling.").partition("=")
        if not equals or "." in field:
            raise ConfigError(f"/set {assignment}: expected FIELD=VALUE, a field of [sampling], as temperature=0.7")
    old = [f"sampling.{name}={toml_value(value)}" for name, value in config.sampling]
    new = [f"sampling.{assignment.removeprefix('sampling.')}" for assignment in assignments]
    rest = [f"data.max_length={config.data.max_length}", f"model.policy={config.model.policy}"]
    sampling: SamplingConfig = load_config(None, [*old, *new, *rest], command="generate").sampling
    return config.model_copy(update={"sampling": sampling})
