"""Rollouts on disk: each token's own text and numbers."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppomax.engine.config import RunConfig
from ppomax.engine.config_checks import impossible_combinations
from ppomax.engine.config_monitor import MonitorConfig
from ppomax.engine.data.text_stream import token_pieces
from ppomax.engine.data.tokenizer import load_tokenizer
from ppomax.engine.ppo.types import Experience, Rollout, response_mask
from ppomax.engine.rollout_dump import COLUMNS, rollout_rows, write_rollouts

QUICKSTART = Path(__file__).parents[2] / "examples/data/quickstart/tokenizer.model"
KINDS = pytest.mark.parametrize("kind", ["sentencepiece", "byte level"])


def tokenizer_of(tiny, kind):
    return load_tokenizer(QUICKSTART if kind == "sentencepiece" else tiny.model("policy"))


@pytest.fixture
def tokenizer(tiny):
    return tokenizer_of(tiny, "byte level")


def experience_of(prompts, responses):
    """Numbers tell column, row and token: 1000 * column + 100 * row + t."""
    sequences = [torch.tensor([*p, *r]) for p, r in zip(prompts, responses, strict=True)]
    tokens = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    B, S = tokens.shape
    lengths = torch.tensor([len(s) for s in sequences])
    prompt_lengths = torch.tensor([len(p) for p in prompts])
    mask = response_mask(prompt_lengths, lengths, S - 1)
    position = torch.arange(S - 1, dtype=torch.float32)[None] + 100 * torch.arange(B)[:, None]
    columns = {name: (1000 * c + position) * mask for c, name in enumerate(COLUMNS)}
    rollout = Rollout(tokens, prompt_lengths, lengths, mask, torch.arange(B) % 2 == 0, columns["logprobs"])
    scores = torch.arange(B) - 0.5
    unused = torch.zeros(B, S - 1)
    return Experience(rollout, scores, old_logprobs=unused, returns=unused, **columns)


def test_every_token_has_its_own_numbers(tokenizer):
    prompts = [tokenizer.encode("ABC"), tokenizer.encode("D")]
    responses = [[*tokenizer.encode("XY"), tokenizer.eos_id], tokenizer.encode("KLMNO")]
    first, second = rollout_rows(7, experience_of(prompts, responses), tokenizer, 16)
    assert (first["step"], first["index"], first["prompt"], first["response"]) == (7, 0, "ABC", "XY</s>")
    assert (first["finished"], first["score"], first["length"]) == (True, -0.5, 3)
    assert (second["finished"], second["score"], second["length"]) == (False, 0.5, 5)
    assert first["tokens"] == responses[0]
    assert first["pieces"] == ["X", "Y", "</s>"]
    # Token s of a sequence is predicted in column s - 1.
    assert first["logprobs"] == [2, 3, 4]
    assert second["token_rewards"] == [5100, 5101, 5102, 5103, 5104]
    assert all(len(row[name]) == row["length"] for row in (first, second) for name in ("pieces", *COLUMNS))


def test_no_more_responses_are_written_than_asked_for(tokenizer, tmp_path):
    experience = experience_of([[70]] * 3, [[71]] * 3)
    write_rollouts(tmp_path, 3, experience, tokenizer, MonitorConfig(rollouts_size=2))
    (path,) = (tmp_path / "rollouts").iterdir()
    assert path.name == "step_000003.jsonl"
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [0, 1]


def test_what_is_not_a_number_is_null(tokenizer, tmp_path):
    experience = experience_of([[70]], [[71, 72]])
    experience.kl[0, 1] = math.nan
    write_rollouts(tmp_path, 1, experience, tokenizer, MonitorConfig())
    row = json.loads(
        (tmp_path / "rollouts/step_000001.jsonl").read_text(), parse_constant=lambda name: f"not JSON: {name}"
    )
    assert row["kl"] == [2000, None]


def test_parquet_has_the_rows_of_jsonl(tokenizer, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    experience = experience_of([[70], [71]], [[71, 72], [73]])
    write_rollouts(tmp_path, 1, experience, tokenizer, MonitorConfig(rollouts_format="parquet"))
    assert parquet.read_table(tmp_path / "rollouts/step_000001.parquet").to_pylist() == rollout_rows(
        1, experience, tokenizer, 16
    )


def test_parquet_without_pyarrow_is_refused_before_the_run(monkeypatch):
    monkeypatch.setattr("ppomax.engine.config_checks.find_spec", lambda name: None)
    config = RunConfig.model_validate({"monitor": {"rollouts_format": "parquet"}})
    assert any("pyarrow is not installed" in fault for fault in impossible_combinations(config, "ppo"))
    assert not any("pyarrow" in fault for fault in impossible_combinations(config, "sft"))


@KINDS
def test_a_character_of_several_tokens_belongs_to_the_last_of_them(tiny, kind):
    tokenizer = tokenizer_of(tiny, kind)
    ids = tokenizer.encode("a\U0001f600b")
    pieces = token_pieces(tokenizer, ids)
    assert "".join(pieces) == "a\U0001f600b"
    assert pieces[-2:] == ["\U0001f600", "b"]
    assert pieces[-5:-2] == ["", "", ""]


@KINDS
def test_special_tokens_are_spelled_and_end_a_broken_character(tiny, kind):
    tokenizer = tokenizer_of(tiny, kind)
    broken = tokenizer.encode("\U0001f600")[:-2]
    pieces = token_pieces(tokenizer, [*broken, tokenizer.eos_id, *tokenizer.encode("a")])
    assert pieces[len(broken)] == tokenizer.special_text(tokenizer.eos_id)
    assert "".join(pieces[: len(broken)]).strip("\ufffd") == ""
    assert "\ufffd" in pieces[len(broken) - 1]
    assert "".join(pieces[len(broken) + 1 :]) == "a"


@settings(max_examples=100, deadline=None)
@given(text=st.text("a b\n<\u00e9\u4e2d\U0001f600\u202e", max_size=12))
@KINDS
def test_pieces_are_together_the_text(tiny, kind, text):
    tokenizer = tokenizer_of(tiny, kind)
    ids = tokenizer.encode(text)
    assert "".join(token_pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_run_writes_rollouts_that_agree_with_its_metrics(tiny, tmp_path):
    from ppomax.engine.train_ppo import run

    sections = tiny.config("ppo", tmp_path / "run", monitor={"rollouts_every": 2, "rollouts_size": 100})
    run(RunConfig.model_validate(sections))
    (path,) = (tmp_path / "run/rollouts").iterdir()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    record = next(r for r in records if r["kind"] == "ppo" and r["step"] == 2)
    assert path.name == "step_000002.jsonl"
    assert len(rows) == sections["ppo"]["rollout_size"]
    assert sum(row["score"] for row in rows) / len(rows) == pytest.approx(record["reward"], abs=1e-5)
    assert sum(row["length"] for row in rows) / len(rows) == pytest.approx(record["response_length"])
    kl = [x for row in rows for x in row["kl"]]
    assert sum(kl) / len(kl) == pytest.approx(record["kl_estimate"], abs=1e-6)
