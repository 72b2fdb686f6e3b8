"""`ppomax chat` as a person meets it: what is shown, what is kept of a dialogue, how it is stopped."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppomax.engine import cli
from ppomax.engine.config import RunConfig, SamplingConfig
from ppomax.engine.config_models import ModelConfig
from ppomax.engine.data.chat import Turn
from ppomax.engine.data.tokenizer import Tokenizer, load_tokenizer
from ppomax.engine.errors import ConfigError
from ppomax.tools import chat as tool
from ppomax.tools.inference import Model, inference_config, load_template, open_model, printable

QUICKSTART = Path(__file__).parents[2] / "examples/data/quickstart/tokenizer.model"
SAMPLING = ["sampling.max_new_tokens=24", "sampling.min_new_tokens=4", "sampling.temperature=1.2"]


@pytest.fixture(scope="module")
def model(tiny) -> Iterator[Model]:
    config = inference_config(tiny.model("policy"), SAMPLING)
    with open_model(config, load_template(config)) as model:
        yield model


@pytest.fixture(params=["sentencepiece", "byte level"])
def tokenizer(request, tiny) -> Tokenizer:
    return load_tokenizer(QUICKSTART if request.param == "sentencepiece" else tiny.model("policy"))


def talk(model: Model, *lines: str) -> str:
    """What is shown for these lines."""
    out = io.StringIO()
    tool.chat(model, iter(lines), out)
    return out.getvalue()


@settings(max_examples=200)
@given(data=st.data())
@pytest.mark.parametrize("kind", ["sentencepiece", "byte level"])
def test_the_pieces_of_a_stream_are_together_the_text(tiny, kind, data):
    tokenizer = load_tokenizer(QUICKSTART if kind == "sentencepiece" else tiny.model("policy"))
    encoded = st.text("a b\u00e9\u4e2d\U0001f600", max_size=8).map(tokenizer.encode)
    anything = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=4)
    ids = [i for part in data.draw(st.lists(encoded | anything, max_size=4)) for i in part]
    stream = tool.TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.end() == tokenizer.decode(ids)
    assert not any(piece.endswith("\ufffd") for piece in pieces)


def test_a_character_is_shown_with_the_token_that_completes_it(tokenizer):
    stream = tool.TextStream(tokenizer)
    ids = tokenizer.encode("a\U0001f600b")
    pieces = [stream.push(token) for token in ids]
    assert [piece for piece in pieces if piece] == ["a", "\U0001f600", "b"]


def test_a_response_is_streamed_and_is_that_of_the_generator(model):
    shown: list[str] = []

    class Out(io.StringIO):
        def write(self, text: str) -> int:
            shown.append(text)
            return len(text)

    dialogue = tool.Dialogue(model, Out())
    dialogue.answer("abc")
    tokens = model.template.encode_prompt([Turn("human", "abc")])
    rollout = tool.generate(
        model.role,
        [tokens],
        model.config.sampling,
        seeds=tool.request_seeds(model.config.train.seed, 0, 1),
        eos_id=model.tokenizer.eos_id,
        pad_id=model.tokenizer.pad_id,
    )
    response = model.template.decode_response(rollout.tokens[0, len(tokens) :].tolist())
    assert "".join(shown).startswith(printable(response) + "\n")
    assert len([text for text in shown if text]) >= 4
    assert dialogue.turns == (Turn("human", "abc"), Turn("assistant", response))


def test_the_whole_dialogue_is_the_prompt_of_the_next_response(model, monkeypatch):
    prompts = []

    def generate(role, rows, *args, **kwargs):
        prompts.append(rows[0])
        return original(role, rows, *args, **kwargs)

    original = tool.generate
    monkeypatch.setattr(tool, "generate", generate)
    dialogue = tool.Dialogue(model, io.StringIO())
    dialogue.answer("abc")
    first = dialogue.turns
    dialogue.answer("cab")
    dialogue.reset()
    dialogue.answer("abc")
    expected = [[Turn("human", "abc")], [*first, Turn("human", "cab")], [Turn("human", "abc")]]
    assert [list(prompt) for prompt in prompts] == [model.template.encode_prompt(turns) for turns in expected]


def test_the_same_lines_give_the_same_dialogue_and_another_seed_another(model, tiny):
    lines = ("abc", "/reset", "abc", "/set temperature=0", "abc")
    assert talk(model, *lines) == talk(model, *lines)
    other = inference_config(tiny.model("policy"), [*SAMPLING, "train.seed=7"])
    assert talk(Model(other, model.role, model.template), *lines) != talk(model, *lines)


def test_set_changes_sampling_and_names_what_is_wrong(model):
    dialogue = tool.Dialogue(model, io.StringIO())
    dialogue.set(["temperature=0", "sampling.max_new_tokens=5"])
    assert (dialogue.config.sampling.temperature, dialogue.config.sampling.max_new_tokens) == (0, 5)
    assert dialogue.config.sampling.min_new_tokens == 4
    shown = talk(model, "/set temperture=1", "/set temperature=-1", "/set data.max_length=3", "/set max_new_tokens=999")
    assert "did you mean sampling.temperature?" in shown
    assert "/set data.max_length=3: expected FIELD=VALUE" in shown
    assert "max_new_tokens 999 leaves no room for a prompt" in shown
    assert "top_k=7" in talk(model, "/set top_k=7", "/set").splitlines()


@given(
    st.builds(
        SamplingConfig,
        temperature=st.just(0.0) | st.floats(1e-4, 5, allow_nan=False),
        top_p=st.floats(0.01, 1),
        top_k=st.integers(0, 100),
        max_new_tokens=st.integers(1, 100),
    ),
    st.integers(0, 50),
)
def test_set_leaves_all_other_fields_as_they_are(sampling, value):
    config = RunConfig(sampling=sampling, model=ModelConfig(policy="any"))
    changed = tool.with_sampling(config, [f"min_new_tokens={value}"]).sampling
    assert changed == sampling.model_copy(update={"min_new_tokens": value})


def test_what_cannot_be_answered_is_said_and_the_chat_goes_on(model):
    dialogue = tool.Dialogue(model, io.StringIO())
    shown = talk(model, "x" * 500, "\ud800", "", "   ", "/sett", "abc", "/exit", "never")
    assert "tokens long without any earlier turn" in shown
    assert "half of a surrogate pair" in shown
    assert "/sett: no such command" in shown
    dialogue.answer("abc")
    assert shown.endswith(dialogue.out.getvalue())


def test_old_turns_are_forgotten_where_they_no_longer_fit(model):
    shown = talk(model, *["abcdefghij" * 5] * 4)
    assert "oldest turns no longer fit" in shown


def test_an_interrupt_ends_the_response_and_keeps_what_was_said(model, monkeypatch):
    def interrupted(*args, on_token, **kwargs):
        for token in model.tokenizer.encode("KLM"):
            on_token(0, token)
        raise KeyboardInterrupt

    dialogue = tool.Dialogue(model, io.StringIO())
    monkeypatch.setattr(tool, "generate", interrupted)
    dialogue.answer("abc")
    assert dialogue.out.getvalue() == "KLM\n(stopped)\n"
    assert dialogue.turns == (Turn("human", "abc"), Turn("assistant", "KLM"))


def test_an_empty_response_is_left_out_of_the_dialogue(model, monkeypatch):
    def interrupted(*args, on_token, **kwargs):
        raise KeyboardInterrupt

    dialogue = tool.Dialogue(model, io.StringIO())
    monkeypatch.setattr(tool, "generate", interrupted)
    dialogue.answer("abc")
    assert dialogue.turns == ()
    assert "left out" in dialogue.out.getvalue()


def test_an_interrupt_beside_a_response_does_not_end_the_chat(model, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "fit_prompt", interrupted)
    assert talk(model, "abc", "/reset") == "(stopped)\n(a new dialogue)\n"


def test_what_a_model_writes_cannot_steer_the_terminal(model, monkeypatch):
    def rude(*args, on_token, **kwargs):
        for token in model.tokenizer.encode("a\x1b[2J\r\x9bb"):
            on_token(0, token)
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "generate", rude)
    assert talk(model, "abc").startswith("a\\x1b[2J\\r\\x9bb\n")


def test_chat_is_for_one_process(tiny, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["chat", tiny.model("policy")]) == ConfigError.exit_code
    assert "chat runs in one process" in capsys.readouterr().err


def command(tiny, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "ppomax.engine.cli", "chat", tiny.model("policy"), *SAMPLING, *arguments]


def test_a_pipe_is_answered_line_by_line(tiny, model):
    lines = ["abc", "/set temperature=0", "cab"]
    done = subprocess.run(command(tiny), input="\n".join(lines).encode() + b"\n\xff\n", capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == talk(model, *lines, "\ufffd")


def test_ctrl_c_stops_the_response_and_ctrl_d_the_chat(tiny):
    ours, theirs = pty.openpty()
    endless = ["sampling.max_new_tokens=120", "sampling.min_new_tokens=120", "--system", "cab = 1"]
    # Interpreted kernels: a response of the others would be over before Ctrl-C arrives.
    slowly = {**os.environ, "PPOMAX_KERNELS": "triton", "TRITON_INTERPRET": "1"}
    process = subprocess.Popen(
        command(tiny, *endless),
        stdin=theirs,
        stdout=theirs,
        start_new_session=True,
        env=slowly,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background ignore it
    )
    os.close(theirs)
    terminal = select.poll()
    terminal.register(ours, select.POLLIN)
    shown = ""

    def wait_for(pattern: str, *, ask_again: signal.Signals | None = None) -> None:
        nonlocal shown
        deadline = time.monotonic() + 120
        while not (match := re.search(pattern, shown)):
            assert time.monotonic() < deadline, shown
            if terminal.poll(5000):
                shown += os.read(ours, 4096).decode(errors="replace")
            elif ask_again:
                process.send_signal(ask_again)
        shown = shown[match.end() :]

    wait_for("> ")
    os.write(ours, b"abc\r")
    wait_for(r"abc\r\n.....")
    process.send_signal(signal.SIGINT)
    wait_for(r"\(stopped\)\r\n(.*\r\n)?> ")
    process.send_signal(signal.SIGINT)
    # Python misses a Ctrl-C between prompt and wait, until the next key: a person would try once more.
    wait_for("> ", ask_again=signal.SIGINT)
    os.write(ours, b"/set\r")
    wait_for("min_new_tokens=120")
    wait_for("> ")
    os.write(ours, b"\x04")
    assert process.wait(60) == 0
    os.close(ours)
