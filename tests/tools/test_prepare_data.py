"""prepare-data: a split without shared prompts, nothing lost, a tokenizer that the engine and transformers read."""

import gzip
import json
from pathlib import Path

import pytest

from ppomax.engine.data.tokenizer import load_tokenizer
from ppomax.engine.errors import ConfigError, DataError
from ppomax.tools.prepare_data import prepare


def write_pairs(path: Path, count: int) -> None:
    rows = [
        {
            "chosen": f"\n\nHuman: question {i % 20}?\n\nAssistant: a good answer number {i}.",
            "rejected": f"\n\nHuman: question {i % 20}?\n\nAssistant: bad {i}.",
        }
        for i in range(count)
    ]
    rows.insert(3, {"chosen": "no roles here", "rejected": "none"})
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def first_turns(path: Path) -> set[str]:
    return {json.loads(line)["chosen"].split("\n\n")[1] for line in path.read_text().splitlines()}


def test_split_shares_no_prompt_and_loses_no_good_row(tmp_path, capsys):
    write_pairs(tmp_path / "pairs.jsonl.gz", 100)
    out = tmp_path / "out"
    prepare(str(tmp_path / "pairs.jsonl.gz"), out, num_held_out=12, vocab_size=320, seed=0)
    train, held_out = ((out / name).read_text().splitlines() for name in ("train.jsonl", "heldout.jsonl"))
    assert len(train) + len(held_out) == 100
    assert 12 <= len(held_out) < 20
    assert not first_turns(out / "train.jsonl") & first_turns(out / "heldout.jsonl")
    assert "1 rows left out" in capsys.readouterr().out
    tokenizer = load_tokenizer(out / "tokenizer.model")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    text = "question 7? Ünïcode."
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_same_seed_gives_the_same_files(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl.gz", 60)
    for name in ("a", "b"):
        prepare(str(tmp_path / "pairs.jsonl.gz"), tmp_path / name, num_held_out=10, vocab_size=300, seed=5)
    for file in ("train.jsonl", "heldout.jsonl", "tokenizer.model"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_refuses_an_existing_folder_and_a_split_that_leaves_nothing(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl.gz", 5)
    with pytest.raises(ConfigError, match="exists"):
        prepare(str(tmp_path / "pairs.jsonl.gz"), tmp_path, num_held_out=1, vocab_size=300, seed=0)
    with pytest.raises(DataError, match="none left for training"):
        prepare(str(tmp_path / "pairs.jsonl.gz"), tmp_path / "out", num_held_out=50, vocab_size=300, seed=0)
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_too_large_for_the_text_is_a_config_error_and_leaves_no_folder(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl.gz", 20)
    with pytest.raises(ConfigError, match=r"--vocab-size 5000 .* Vocabulary size too high"):
        prepare(str(tmp_path / "pairs.jsonl.gz"), tmp_path / "out", num_held_out=2, vocab_size=5000, seed=0)
    assert not (tmp_path / "out").exists()


def test_a_first_row_that_is_no_json_is_left_out(tmp_path, capsys):
    write_pairs(tmp_path / "pairs.jsonl.gz", 20)
    good = gzip.decompress((tmp_path / "pairs.jsonl.gz").read_bytes())
    (tmp_path / "pairs.jsonl").write_bytes(b"{\n" + good)
    prepare(str(tmp_path / "pairs.jsonl"), tmp_path / "out", num_held_out=2, vocab_size=300, seed=0)
    assert "line 1: malformed JSON" in capsys.readouterr().out
