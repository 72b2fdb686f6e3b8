"""`ppomax generate`: a file of prompts in, a file of responses out, and nothing lost or invented on the way."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from ppomax.engine import cli
from ppomax.engine.config import DataConfig
from ppomax.engine.data.chat import Turn, make_template
from ppomax.engine.data.tokenizer import Tokenizer, load_tokenizer
from ppomax.tools import generate as tool
from ppomax.tools.inference import printable, read_response, stop_sequences

LIMITS = ["sampling.max_new_tokens=12"]
GREEDY = [*LIMITS, "sampling.temperature=0", "sampling.top_p=1", "sampling.repetition_penalty=1"]
LIVELY = ["sampling.max_new_tokens=24", "sampling.temperature=1.5", "sampling.top_p=1"]
QUICKSTART = Path(__file__).parents[2] / "examples/data/quickstart/tokenizer.model"


@pytest.fixture
def command(tiny, tmp_path, monkeypatch):
    """Runs `ppomax generate` on the tiny policy with some rows and returns the rows of its output."""
    monkeypatch.chdir(tmp_path)

    def run(rows, *arguments, file="prompts.jsonl", code=0):
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        Path(file).write_text(text)
        Path("out.jsonl").unlink(missing_ok=True)
        given = ["generate", tiny.model("policy"), "--prompts", file, "--output", "out.jsonl", *arguments]
        assert cli.main(given) == code
        assert not Path("out.jsonl.partial").exists()
        return [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]

    return run


@pytest.fixture(scope="module")
def tokenizer(tiny) -> Tokenizer:
    return load_tokenizer(tiny.model("policy"))


@pytest.fixture(scope="module")
def prompts(tiny) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(tiny.path("prompts.jsonl")).read_text().splitlines()[:9]]


def responses(rows) -> list[str]:
    return [row.get("response") for row in rows]


@torch.no_grad()
def test_greedy_rows_say_what_transformers_generates(command, tiny, tokenizer, prompts):
    rows = command(prompts, *GREEDY, "sampling.min_new_tokens=6")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.model("policy")).eval()
    template = make_template(DataConfig(), tokenizer)
    for row, prompt in zip(rows, prompts, strict=True):
        ids = template.encode_prompt([Turn("human", prompt["prompt"])])
        # Here EOS may be the sixth token; transformers counts the tokens before it.
        whole = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12, min_new_tokens=5)[0]
        new = whole[len(ids) :].tolist()
        logprobs = model(whole[None]).logits[0].log_softmax(-1)[len(ids) - 1 : -1].gather(1, whole[len(ids) :, None])
        is_eos = new[-1] == tokenizer.eos_id
        assert row["response"] == tokenizer.decode(new)
        assert (row["num_prompt_tokens"], row["num_tokens"]) == (len(ids), len(new))
        assert row["finish"] == ("eos" if is_eos else "length")
        assert row["mean_logprob"] == pytest.approx(float(logprobs.mean()), abs=1e-5)


def test_the_first_response_to_each_prompt_is_that_of_evaluate(command, tiny, prompts, tmp_path):
    rows = command(prompts, *LIMITS, "--samples", "2", "--seed", "5")
    overrides = [f"model.{role}={tiny.model(role)}" for role in ("policy", "reward")]
    overrides += ["data.eval=prompts.jsonl", "data.max_length=160", "train.output=evaluated", "train.seed=5", *LIMITS]
    assert cli.main(["evaluate", *overrides]) == 0
    evaluated = [json.loads(line) for line in (tmp_path / "evaluated/samples.jsonl").read_text().splitlines()]
    assert responses(rows[::2]) == responses(evaluated)
    assert [row["sample"] for row in rows] == [0, 1] * len(prompts)
    assert responses(rows[::2]) != responses(rows[1::2])


@pytest.mark.parametrize("penalty", [0.0, 1.2, 3.0])
def test_evaluate_takes_the_sample_with_the_best_score(command, tiny, prompts, tmp_path, penalty):
    settings = [*LIVELY, f"sampling.length_penalty={penalty}", "train.seed=5"]
    rows = command(prompts, *settings, "--samples", "3")
    for row in rows:
        assert row["score"] == pytest.approx(row["mean_logprob"] * row["num_tokens"] ** (1 - penalty))
    overrides = [f"model.{role}={tiny.model(role)}" for role in ("policy", "reward")]
    overrides += ["data.eval=prompts.jsonl", "data.max_length=160", "train.output=evaluated", "monitor.eval_best_of=3"]
    assert cli.main(["evaluate", *overrides, *settings]) == 0
    evaluated = [json.loads(line) for line in (tmp_path / "evaluated/samples.jsonl").read_text().splitlines()]
    best = [max(rows[i : i + 3], key=lambda row: row["score"]) for i in range(0, len(rows), 3)]
    assert responses(evaluated) == responses(best)
    assert len({row["sample"] for row in best}) > 1


def test_chunks_do_not_change_the_responses(command, prompts, capsys, monkeypatch):
    arguments = [*LIVELY, "--samples", "2"]
    whole = command(prompts, *arguments)
    assert {row["finish"] for row in whole} == {"eos", "length"}
    assert capsys.readouterr().err.count("tokens/s\n") == 1
    monkeypatch.setattr(tool, "RESPONSES_PER_CHUNK", 2)
    in_chunks = command(prompts, *arguments, "sampling.batch_size=3")
    assert capsys.readouterr().err.count("tokens/s\n") == 3
    for row, other in zip(whole, in_chunks, strict=True):
        for number in ("mean_logprob", "score"):
            assert row.pop(number) == pytest.approx(other.pop(number), abs=1e-5)
        assert row == other


def test_every_format_of_prompts_is_read(command):
    said = ["aa", "bb", "cc"]
    turns = [{"role": "user", "content": "aa"}, {"role": "assistant", "content": "bb"}]
    files = {
        "a.txt": "aa\n\nbb\r\n  \ncc",
        "b.jsonl": [{"prompt": text} for text in said],
        "c.jsonl": [{"messages": [{"role": "user", "content": text}, turns[1]]} for text in said],
        "d.jsonl": [{"chosen": f"\n\nHuman: {text}\n\nAssistant: x", "rejected": "any"} for text in said],
        "e.json": json.dumps([[text] for text in said]),
    }
    outputs = [command(rows, *LIMITS, file=file) for file, rows in files.items()]
    for rows in outputs:
        assert [row["prompt"] for row in rows] == [[{"role": "user", "content": text}] for text in said]
        assert responses(rows) == responses(outputs[0])
    assert [row["line"] for row in outputs[0]] == [1, 3, 5]


def test_the_output_can_be_the_prompts_of_the_next_run(command, prompts):
    rows = command(prompts, *LIMITS)
    assert responses(command(Path("out.jsonl").read_text(), *LIMITS)) == responses(rows)


def test_bad_rows_fail_alone_and_in_their_place(command, prompts, tokenizer):
    lines = [json.dumps(row) for row in prompts]
    good = command(prompts, *LIMITS)
    bad = {1: '{"prompt": ', 3: '{"prompt": " "}', 4: json.dumps({"prompt": "x" * 400}), 6: "7", 8: '{"prompt": [1]}'}
    for number, line in bad.items():
        lines[number] = line
    rows = command("\n".join(lines), *LIMITS)
    assert [row["line"] for row in rows] == list(range(1, 10))
    for number, row in enumerate(rows):
        assert ("error" in row) == (number in bad)
        assert row.get("response") == (None if number in bad else good[number]["response"])
    assert "malformed JSON" in rows[1]["error"]
    assert "empty" in rows[3]["error"]
    assert "tokens long" in rows[4]["error"]


def test_a_token_that_the_model_does_not_know_is_the_fault_of_its_row(command, prompts, tmp_path, tiny):
    folder = tmp_path / "larger"
    load_tokenizer(tiny.model("policy")).save(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 277, "content": "WORD", "special": False})
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    rows = command([*prompts[:2], {"prompt": "WORD"}], *LIMITS, f"model.tokenizer={folder}")
    assert ["error" in row for row in rows] == [False, False, True]
    assert "outside the model's vocabulary of 277" in rows[2]["error"]


def test_only_bad_rows_end_with_code_4_and_a_complete_file(command):
    rows = command([{"prompt": ""}, {"prompt": None}], *LIMITS, code=4)
    assert [row["line"] for row in rows] == [1, 2]
    assert all("error" in row for row in rows)


def test_an_interrupted_run_leaves_a_partial_file_that_is_never_overwritten(
    command, tiny, prompts, monkeypatch, capsys
):
    complete = command(prompts, *LIMITS)
    Path("out.jsonl").unlink()
    arguments = ["generate", tiny.model("policy"), "--prompts", "prompts.jsonl", "--output", "out.jsonl", *LIMITS]
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    generate = tool.generate
    monkeypatch.setattr(tool, "generate", interrupted)
    assert cli.main([*arguments, "sampling.batch_size=1"]) == cli.INTERRUPTED
    assert not Path("out.jsonl").exists()
    partial = Path("out.jsonl.partial").read_text()
    rows = [json.loads(line) for line in partial.splitlines()]
    assert responses(rows) == responses(complete[: 2 * tool.RESPONSES_PER_CHUNK])
    assert cli.main(arguments) == 2
    assert "out.jsonl.partial holds the rows of a run that did not end" in capsys.readouterr().err
    assert Path("out.jsonl.partial").read_text() == partial


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "absent/out.jsonl"], "cannot be written"),
        (["--samples", "0"], "--samples 0"),
        (["--stop", ""], "--stop ''"),
        (["data.max_length=12"], "leaves no room for a prompt"),
        (["parallel.tp=2"], "does not divide the 1 rank"),
    ],
)
def test_a_wrong_command_line_is_one_message_with_code_2(tiny, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"prompt": "aa"}\n')
    assert cli.main(["generate", tiny.model("policy"), "--prompts", "prompts.jsonl", *LIMITS, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert Path("prompts.jsonl").read_text() == '{"prompt": "aa"}\n'


def test_faults_of_files_are_found_before_the_model_is_loaded(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "open_model", lambda *args: pytest.fail("the model was loaded"))
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("\n")
    Path("prompts.txt").write_text("aa")
    for file, output, code, message in (
        ("absent.jsonl", "out.jsonl", 4, "no such file: absent.jsonl"),
        ("absent.txt", "out.jsonl", 4, "absent.txt cannot be read"),
        ("empty.jsonl", "out.jsonl", 4, "has no rows"),
        ("prompts.csv", "out.jsonl", 2, "is not a data file"),
        ("prompts.txt", "prompts.txt", 2, "prompts.txt exists"),
    ):
        given = ["generate", tiny.model("policy"), "--prompts", file, "--output", output, *LIMITS]
        assert cli.main(given) == code
        assert message in capsys.readouterr().err


def test_without_an_output_file_rows_are_printed(tiny, prompts, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("aa\nbb\n")
    assert cli.main(["generate", tiny.model("policy"), *LIMITS, "--prompts", str(tmp_path / "prompts.txt")]) == 0
    printed = capsys.readouterr()
    assert [json.loads(line)["line"] for line in printed.out.splitlines()] == [1, 2]
    assert "2/2 prompts, " in printed.err


def test_stop_texts_end_responses_and_are_not_part_of_them(command, prompts):
    free = command(prompts, *LIVELY)
    stop = next(row["response"] for row in free if len(row["response"]) > 3)[1:3]
    stopped = command(prompts, *LIVELY, "--stop", stop, "--stop", "never written")
    for row, whole in zip(stopped, free, strict=True):
        has_stop = stop in whole["response"]
        assert row["response"] == whole["response"].partition(stop)[0]
        assert row["finish"] == ("stop" if has_stop else whole["finish"])
        assert row["num_tokens"] <= whole["num_tokens"]
    assert "stop" in {row["finish"] for row in stopped}


def read(tokenizer, ids, stops=(), *, finished=False, min_new_tokens=0):
    logprobs = [-float(i) for i in range(len(ids))]
    return read_response(
        ids, logprobs, finished=finished, tokenizer=tokenizer, stops=stops, min_new_tokens=min_new_tokens
    )


@given(text=st.text("ab :\n", max_size=20), stop=st.text("ab :\n", min_size=1, max_size=3), has_eos=st.booleans())
def test_a_response_ends_before_the_first_stop_text_however_it_was_tokenised(text, stop, has_eos):
    tokenizer = load_tokenizer(QUICKSTART)
    ids = tokenizer.encode(text)
    written = tokenizer.decode(ids)
    response = read(tokenizer, [*ids, tokenizer.eos_id] if has_eos else ids, [stop], finished=has_eos)
    assert response.text == written.partition(stop)[0]
    if stop in written:
        count = response.num_tokens
        assert response.finish == "stop"
        assert stop in tokenizer.decode(ids[:count])
        assert stop not in tokenizer.decode(ids[: count - 1])
    else:
        assert response.finish == ("eos" if has_eos else "length")
        assert response.num_tokens == len(ids) + has_eos
    count = response.num_tokens
    assert response.mean_logprob == (pytest.approx(-(count - 1) / 2) if count else None)


def test_a_stop_text_does_not_count_before_the_shortest_response(tokenizer):
    ids = [i for character in "K.L.M." for i in tokenizer.encode(character)]
    assert read(tokenizer, ids, ["."], min_new_tokens=2).text == "K"
    assert read(tokenizer, ids, ["."], min_new_tokens=3).text == "K.L"
    assert read(tokenizer, ids, [".L"], min_new_tokens=3).text == "K"
    assert read(tokenizer, ids, [".L"], min_new_tokens=4).text == "K.L.M."


def test_a_special_token_can_be_a_stop_text(tokenizer):
    pad = tokenizer.special_id("<pad>")
    assert stop_sequences(["<pad>"], tokenizer) == [[pad]]
    response = read(tokenizer, [*tokenizer.encode("KL"), pad], ["<pad>"], finished=True)
    assert (response.text, response.finish) == ("KL", "stop")


@given(st.text(st.characters(codec="utf-8")))
def test_a_row_is_one_line_without_anything_that_a_terminal_obeys(text):
    line = tool.json_line({"response": text})
    assert line.index("\n") == len(line) - 1
    assert printable(line) == line
    assert json.loads(line) == {"response": text}


def test_printable_keeps_text_and_escapes_what_a_terminal_obeys():
    kept = "a\tb\nc \u4e2d\u3000\u00e9 \U0001f469\u200d\U0001f4bb"
    assert printable(kept) == kept
    assert printable("\x1b[2J\r\x07\x9b\u202e\ud800\x7f") == r"\x1b[2J\r\x07\x9b\u202e\ud800\x7f"


def test_progress_counts_prompts_failures_and_tokens(capsys, monkeypatch):
    monkeypatch.setattr(tool, "time", SimpleNamespace(perf_counter=iter([0.0, 2.0]).__next__))
    tool.Progress(10, is_shown=True).add([{"num_tokens": 30}, {"num_tokens": 10}, {"error": "x"}], 3)
    assert capsys.readouterr().err == "3/10 prompts, 1 failed, 40 tokens, 20 tokens/s\n"
