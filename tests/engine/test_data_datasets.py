"""Data files: every format to the same rows, every fault named by file, line and kind, and the truncation rule."""

import gzip
import json
import re
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from ppomax.engine.config import DataConfig
from ppomax.engine.data.chat import Turn, make_template
from ppomax.engine.data.datasets import load_dialogues, load_pairs, load_prompts
from ppomax.engine.data.tokenizer import load_tokenizer
from ppomax.engine.errors import ConfigError, DataError

SHARED = Path(__file__).parents[2].parent / "shared"
HH = SHARED / "data" / "hh_harmless.jsonl.gz"
TINY_TOKENIZER = SHARED / "oracles" / "tiny_tokenizer.model"
needs_hh = pytest.mark.skipif(
    not (HH.exists() and TINY_TOKENIZER.exists()),
    reason="../shared/data and ../shared/oracles are not beside the repository",
)

CONTEXT = ["how are you ?", "fine .", "what is two ?"]
HH_ROW = {
    "chosen": "\n\nHuman: how are you ?\n\nAssistant: fine .\n\nHuman: what is two ?\n\nAssistant: one and one",
    "rejected": "\n\nHuman: how are you ?\n\nAssistant: fine .\n\nHuman: what is two ?\n\nAssistant: no",
}
ROWS = {
    "hh": HH_ROW,
    "pairs": {"chosen": [*CONTEXT, "one and one"], "rejected": [*CONTEXT, "no"]},
    "dialogues": [*CONTEXT, "one and one"],
    "sft": {
        "messages": [
            {"role": role, "content": text}
            for role, text in zip(["user", "assistant"] * 2, [*CONTEXT, "one and one"], strict=True)
        ]
    },
    "prompts": {"prompt": CONTEXT},
}


def turns_of(*texts):
    return tuple(Turn("assistant" if number % 2 else "human", text) for number, text in enumerate(texts))


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A word is a token: "Human:" 1, each word 1, "Assistant:" 1, EOS 1, BOS 1 per dialogue."""
    folder = tmp_path_factory.mktemp("words")
    model = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "<s>": 1, "</s>": 2}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(["[UNK]", "<s>", "</s>"])
    words = "Human: Assistant: how are you ? fine . what is two one and no w bye hello"
    model.add_tokens(words.split())
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return make_template(DataConfig(), load_tokenizer(folder))


def write(folder, *rows, name="data.jsonl"):
    path = folder / name
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    content = b"[" + b",".join(lines) + b"]" if ".json" in name and ".jsonl" not in name else b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return str(path)


def config(*paths, **settings):
    return DataConfig(train=[{"path": path} if isinstance(path, str) else path for path in paths], **settings)


def prompts(template, *paths, max_prompt_tokens=100, **settings):
    data = config(*paths, **settings)
    return load_prompts(data, data.train, template, max_prompt_tokens=max_prompt_tokens)


def pairs(template, *paths, **settings):
    data = config(*paths, **settings)
    return load_pairs(data, data.train, template)


def dialogues(template, *paths, **settings):
    data = config(*paths, **settings)
    return load_dialogues(data, data.train, template)


@pytest.mark.parametrize("format", ROWS)
def test_every_format_gives_the_same_prompt(tmp_path, template, format):
    dataset = prompts(template, write(tmp_path, ROWS[format]))
    assert [row.turns for row in dataset.rows] == [turns_of(*CONTEXT)]
    assert dataset.rows[0].tokens == tuple(template.encode_prompt(turns_of(*CONTEXT)))


@pytest.mark.parametrize("format", ["hh", "pairs"])
def test_every_pair_format_gives_the_same_pair(tmp_path, template, format):
    row = pairs(template, write(tmp_path, ROWS[format])).rows[0]
    prompt = template.encode_prompt(turns_of(*CONTEXT))
    assert row.prompt_length == len(prompt)
    assert row.chosen == (*prompt, *template.encode_response("one and one"))
    assert row.rejected == (*prompt, *template.encode_response("no"))


@pytest.mark.parametrize("format", ["hh", "pairs", "dialogues", "sft"])
def test_every_dialogue_format_gives_the_same_dialogue(tmp_path, template, format):
    row = dialogues(template, write(tmp_path, ROWS[format])).rows[0]
    assert (list(row.tokens), list(row.loss_mask)) == template.encode_dialogue(turns_of(*CONTEXT, "one and one"))


@pytest.mark.parametrize("name", ["data.jsonl.gz", "data.json", "data.json.gz"])
@pytest.mark.parametrize("format", ROWS)
def test_file_kinds_hold_the_same_rows(tmp_path, template, format, name):
    rows = [ROWS[format]] * 3
    plain = prompts(template, write(tmp_path, *rows)).rows
    assert prompts(template, write(tmp_path, *rows, name=name)).rows == plain
    assert [row.line for row in plain] == [1, 2, 3]


def test_a_prompt_may_be_text_or_hh_text(tmp_path, template):
    rows = [
        {"prompt": "how are you ?"},
        {"prompt": "\n\nHuman: hello\n\nAssistant: fine .\n\nHuman: bye\n\nAssistant:"},
    ]
    dataset = prompts(template, write(tmp_path, *rows))
    assert [row.turns for row in dataset.rows] == [turns_of("how are you ?"), turns_of("hello", "fine .", "bye")]


def test_released_prompts_with_an_answer_are_not_flipped(tmp_path, template):
    """20 of the 31 released prompts are [question, answer]; the released code swaps their roles (ppo_max.md 5.3)."""
    dataset = prompts(template, write(tmp_path, ["how are you ?", "fine ."], ["hello"], name="train.json"))
    assert [row.turns for row in dataset.rows] == [turns_of("how are you ?"), turns_of("hello")]


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path, template):
    content = b"\xef\xbb\xbf" + json.dumps({"prompt": "hello"}).encode()
    dataset = prompts(template, write(tmp_path, content, b"", b"  ", {"prompt": "bye"}))
    assert [(row.line, row.turns[0].text) for row in dataset.rows] == [(1, "hello"), (4, "bye")]


def test_a_line_separator_inside_a_string_ends_no_line(tmp_path, template):
    row = json.dumps({"prompt": "hello\u2028bye\x85"}, ensure_ascii=False).encode()
    assert prompts(template, write(tmp_path, row)).sizes == (1,)


BAD_PAIRS = {
    "malformed": (b'{"chosen": "', "malformed JSON: "),
    "truncated": (b'{"chosen": "a"', "malformed JSON: "),
    "deep": (b"[" * 100_000, "malformed JSON: "),
    "not_utf8": (b'{"chosen": "\xff"}', "byte 12 of the line is not UTF-8"),
    "not_object": (["a"], "the row is a list of 1, expected an object"),
    "no_chosen": ({"rejected": "x"}, "the row has no 'chosen'; it is an object with the keys ['rejected']"),
    "no_rejected": (
        {"chosen": HH_ROW["chosen"]},
        "the row has no 'rejected'; it is an object with the keys ['chosen']",
    ),
    "number": ({**HH_ROW, "chosen": 5}, "chosen is a number, expected a string"),
    "no_markers": ({**HH_ROW, "chosen": "hi"}, r"chosen: expected '\n\nHuman:' at the start, found 'hi'"),
    "empty": ({**HH_ROW, "rejected": HH_ROW["rejected"][:-2]}, "rejected: turn 4 of 4 (assistant) is empty"),
    "empty_human": (
        {"chosen": "\n\nHuman: \n\nAssistant: a", "rejected": "\n\nHuman: \n\nAssistant: b"},
        "chosen: turn 1 of 2 (human) is empty",
    ),
    "roles": (
        {**HH_ROW, "chosen": "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c"},
        "chosen: turn 3 of 3 is assistant, expected human",
    ),
    "ends_human": ({**HH_ROW, "rejected": "\n\nHuman: a"}, "rejected: the last turn, 1, is human, expected assistant"),
    "lengths": (
        {**HH_ROW, "rejected": "\n\nHuman: how are you ?\n\nAssistant: fine ."},
        "chosen has 4 turns and rejected 2; they must differ in the last one only",
    ),
    "context": (
        {**HH_ROW, "rejected": HH_ROW["rejected"].replace("fine", "bye")},
        "turn 2 of chosen and rejected differs; they must differ in the last one only",
    ),
    "same": ({"chosen": HH_ROW["chosen"], "rejected": HH_ROW["chosen"]}, "chosen and rejected are the same"),
    "too_long": (
        {
            "chosen": "\n\nHuman: " + "w " * 90 + "\n\nAssistant: no",
            "rejected": "\n\nHuman: " + "w " * 90 + "\n\nAssistant: " + "w " * 10,
        },
        "105 tokens long without any earlier turn, longer than the 100 that fit; shorten the text",
    ),
    "surrogate": (
        {**HH_ROW, "rejected": HH_ROW["rejected"] + "\ud83d"},
        "character 2 of the text is half of a surrogate pair, not Unicode",
    ),
}


@pytest.mark.parametrize("kind", BAD_PAIRS)
def test_a_bad_row_ends_the_run_with_file_line_and_fault(tmp_path, template, kind):
    bad, fault = BAD_PAIRS[kind]
    path = write(tmp_path, HH_ROW, bad, HH_ROW)
    with pytest.raises(DataError) as caught:
        pairs(template, path, max_length=100)
    message = str(caught.value)
    assert message.startswith(f"{path} line 2: {fault}")
    assert message.endswith("; mend the row, or set data.on_bad_row=skip to leave such rows out")
    assert len(message) < 400 + len(path)


def test_skip_leaves_bad_rows_out_and_lists_them(tmp_path, template):
    rows = [row for bad, _ in BAD_PAIRS.values() for row in (bad, HH_ROW)]
    dataset = pairs(template, write(tmp_path, HH_ROW, *rows), max_length=100, on_bad_row="skip")
    assert dataset.sizes == (len(BAD_PAIRS) + 1,)
    assert [bad.line for bad in dataset.skipped] == list(range(2, 2 * len(BAD_PAIRS) + 1, 2))
    for bad, (_, fault) in zip(dataset.skipped, BAD_PAIRS.values(), strict=True):
        assert bad.fault.startswith(fault)
    assert dataset.summary().startswith(f"{len(BAD_PAIRS) + 1} rows, {len(BAD_PAIRS)} rows skipped\n")
    assert dataset.summary().endswith(f"... and {len(BAD_PAIRS) - 5} more")


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"messages": []}, "messages is a list of 0, expected a list of turns"),
        ({"messages": "hi"}, "messages is a string, expected a list of turns"),
        (
            {"messages": [{"role": "system", "content": "x"}]},
            "turn 1 of messages is a system turn; leave it out and set",
        ),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "turn 1 of messages has no role user or assistant"),
        ({"messages": [{"role": "user", "content": None}]}, "turn 1 of messages is null, expected a string"),
        ({"messages": ["hello", True]}, "turn 2 of messages is true or false, expected a string"),
        ({"messages": ["hello"]}, "the last turn, 1, is human, expected assistant"),
        (
            {"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]},
            "turn 1 of 2 is assistant, expected human",
        ),
        ({"text": "secret " * 100}, "the row has no 'messages'; it is an object with the keys ['text']"),
        ({"k" * 50: 1}, "the row has no 'messages'; it is an object with the keys ['kkkkkkkkkkkkkkkkk...']"),
        ({"messages": ["w " * 97, "no"]}, "103 tokens long without any earlier turn, longer than the 100 that fit"),
    ],
)
def test_bad_dialogues_are_named(tmp_path, template, row, fault):
    path = write(tmp_path, ROWS["sft"], row)
    dataset = dialogues(template, path, max_length=100, on_bad_row="skip")
    assert dataset.sizes == (1,)
    assert [(bad.path, bad.line) for bad in dataset.skipped] == [(path, 2)]
    assert dataset.skipped[0].fault.startswith(fault)


def test_a_prompt_does_not_need_the_answers_to_be_whole(tmp_path, template):
    rows = [{"chosen": "\n\nHuman: hello\n\nAssistant: ", "rejected": 5}]
    assert prompts(template, write(tmp_path, *rows)).rows[0].turns == turns_of("hello")


def test_a_prompt_longer_than_the_context_is_a_bad_row(tmp_path, template):
    path = write(tmp_path, {"prompt": "hello"}, {"prompt": "w " * 50})
    with pytest.raises(DataError, match="line 2: 54 tokens long without any earlier turn, longer than the 20 that fit"):
        prompts(template, path, max_prompt_tokens=20)
    assert prompts(template, path, max_prompt_tokens=20, on_bad_row="skip").sizes == (1,)
    assert prompts(template, path, max_prompt_tokens=54).sizes == (2,)


def test_no_room_for_a_prompt_is_a_config_error(tmp_path, template):
    with pytest.raises(ConfigError, match="0 tokens are left for a prompt"):
        prompts(template, write(tmp_path, {"prompt": "hello"}), max_prompt_tokens=0)


def test_the_oldest_exchanges_are_dropped_first(tmp_path, template):
    """5 turns of one word: BOS, 3 ids a turn, the assistant's prefix. Each exchange dropped saves 6."""
    words = ["hello", "fine", "how", "no", "bye"]
    path = write(tmp_path, words)
    for limit in range(5, 25):
        kept = 5 if limit >= 17 else 3 if limit >= 11 else 1
        row = prompts(template, path, max_prompt_tokens=limit).rows[0]
        assert row.turns == turns_of(*words)[5 - kept :]
        assert row.turns[0].role == "human"
        assert len(row.tokens) == 2 + 3 * kept


def test_both_sides_of_a_pair_lose_the_same_turns(tmp_path, template):
    """Prompt of 3 turns: 11 ids, of 1 turn: 5. The longer response has 7 words and EOS."""
    context = ["hello", "fine", "how"]
    path = write(tmp_path, {"chosen": [*context, "no"], "rejected": [*context, "w w w w w w w"]})
    whole = pairs(template, path, max_length=19).rows[0]
    cut = pairs(template, path, max_length=18).rows[0]
    assert (whole.prompt_length, len(whole.chosen), len(whole.rejected)) == (11, 13, 19)
    assert (cut.prompt_length, len(cut.chosen), len(cut.rejected)) == (5, 7, 13)
    assert cut.turns == turns_of("how")


def test_a_long_dialogue_keeps_its_last_exchanges(tmp_path, template):
    path = write(tmp_path, ["hello", "fine", "how", "no", "bye", "w w"])
    row = dialogues(template, path, max_length=19).rows[0]
    assert row.turns == turns_of("how", "no", "bye", "w w")
    assert len(row.tokens) == 14


def test_sources_are_mixed_by_weight_and_keep_their_numbers(tmp_path, template):
    first = write(tmp_path, {"prompt": "hello"}, {"prompt": "bye"}, name="a.jsonl")
    second = write(tmp_path, ["how"], ["what"], ["two"], name="b.json.gz")
    dataset = prompts(template, {"path": first, "weight": 3.0}, {"path": second, "weight": 1.0})
    assert (dataset.sizes, dataset.weights) == ((2, 3), (3.0, 1.0))
    assert [(row.source, row.line) for row in dataset.rows] == [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3)]
    order = dataset.order(seed=0)
    taken = dataset.take(order, 0, 40)
    assert Counter(row.source for row in taken) == {0: 30, 1: 10}
    assert dataset.take(order, 13, 9) == taken[13:22]


def test_no_sources_are_an_empty_dataset(template):
    assert prompts(template).sizes == ()


@pytest.mark.parametrize(
    ("content", "name", "fault"),
    [
        (None, "data.jsonl", "no such file: .*data.jsonl; check the path in"),
        (b"", "data.jsonl", "has no usable row$"),
        (b"[]", "data.json", "has no usable row$"),
        (
            b'{"prompt": "a"}\n{"prompt": "b"}',
            "data.json",
            "malformed JSON: Extra data.*; name it .jsonl if it has a row per",
        ),
        (b'{"prompt": "a"}', "data.json", "holds an object with the keys .'prompt'., expected a list of rows"),
        (b"[\xff]", "data.json", "byte 1 of .* is not UTF-8"),
        (b"hello", "data.jsonl.gz", "is a damaged gzip file, 0 rows could be read"),
        (gzip.compress(b'{"prompt": "a"}\n' * 1000)[:-20], "data.jsonl.gz", "is a damaged gzip file"),
        ("folder", "data.jsonl", "cannot be read: Is a directory"),
    ],
    ids=["missing", "empty", "empty_list", "lines", "object", "not_utf8", "not_gzip", "cut_gzip", "folder"],
)
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_file_that_cannot_be_read_is_always_a_data_error(tmp_path, template, content, name, fault, on_bad_row):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=fault):
        prompts(template, str(path), on_bad_row=on_bad_row)


def test_a_file_of_bad_rows_only_is_an_error_that_shows_the_first(tmp_path, template):
    path = write(tmp_path, b"{", b"}")
    with pytest.raises(DataError, match=r"has no usable row; first fault: .* line 1: malformed JSON"):
        prompts(template, path, on_bad_row="skip")


@pytest.mark.parametrize(
    ("row", "load", "fault"),
    [
        ({"prompt": "a"}, pairs, "has the format 'prompts', but this stage reads hh, pairs"),
        ({"prompt": "a"}, dialogues, "has the format 'prompts', but this stage reads hh, pairs, dialogues, sft"),
        ({"text": "a"}, prompts, r"cannot be told from line 1 \(an object with the keys \['text'\]\); set format"),
        ("a", prompts, r"cannot be told from line 1 \(a string\)"),
    ],
)
def test_a_format_of_another_stage_is_a_config_error(tmp_path, template, row, load, fault):
    with pytest.raises(ConfigError, match=fault):
        load(template, write(tmp_path, row), on_bad_row="skip")


def test_a_set_format_is_not_guessed(tmp_path, template):
    path = write(tmp_path, {"chosen": HH_ROW["chosen"], "prompt": "bye"})
    assert prompts(template, {"path": path, "format": "prompts"}).rows[0].turns == turns_of("bye")


def test_another_kind_of_file_is_a_config_error(template):
    with pytest.raises(ConfigError, match=r"'data.csv' is not a data file; expected .jsonl, .json"):
        prompts(template, "data.csv")


def test_a_datasets_name_is_loaded_with_its_split(monkeypatch, template):
    calls = []

    def load_dataset(name, split):
        calls.append((name, split))
        return [HH_ROW, {"chosen": None, "rejected": None}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    dataset = pairs(template, "datasets:team/set:test", "datasets:team/set", on_bad_row="skip")
    assert calls == [("team/set", "test"), ("team/set", "train")]
    assert dataset.sizes == (1, 1)
    assert str(dataset.skipped[0]).startswith("datasets:team/set:test line 2: the row has no 'chosen'")


def test_a_datasets_name_without_the_library_is_a_config_error(monkeypatch, template):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=re.escape("pip install ppomax[datasets]")):
        pairs(template, "datasets:team/set")


def test_a_dataset_that_cannot_be_loaded_is_a_data_error(monkeypatch, template):
    def load_dataset(name, split):
        raise ValueError(f"Unknown split {split!r}")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match="'datasets:team/set:x' cannot be loaded: ValueError: Unknown split 'x'"):
        pairs(template, "datasets:team/set:x")


@needs_hh
def test_real_pairs_load_but_for_their_known_faults():
    """Of the 1,800 rows 5 have broken roles in chosen (3 in both sides), and 4 an empty chosen answer."""
    template = make_template(DataConfig(), load_tokenizer(TINY_TOKENIZER))
    settings = {"on_bad_row": "skip", "max_length": 4096}
    broken_roles, empty = {668, 764, 1255, 1320, 1689}, {87, 517, 926, 1104}
    found = pairs(template, str(HH), **settings)
    assert {bad.line for bad in found.skipped} == broken_roles | empty
    assert found.sizes == (1791,)
    assert all(row.chosen[: row.prompt_length] == row.rejected[: row.prompt_length] for row in found.rows)
    assert {bad.line for bad in dialogues(template, str(HH), **settings).skipped} == broken_roles | empty
    assert {bad.line for bad in prompts(template, str(HH), max_prompt_tokens=4096, **settings).skipped} == broken_roles
