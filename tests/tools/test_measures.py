"""`ppomax evaluate-reward`, `ppomax multiple-choice` and the categories of `ppomax evaluate`, on tiny models."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from ppomax.engine import cli


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_a_reward_model_is_measured_as_transformers_scores(tiny, tmp_path, capsys):
    reward = tiny.model("reward")
    pairs = tiny.path("pairs.jsonl")
    arguments = ["--pairs", f"{pairs}=harmless", "--output", str(tmp_path / "out")]
    assert cli.main(["evaluate-reward", reward, *arguments]) == 0
    result = json.loads((tmp_path / "out/results.json").read_text())
    rows = read_jsonl(tmp_path / "out/pairs.jsonl")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(reward).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{reward}/tokenizer.json")
    right = 0
    for row, pair in zip(rows, read_jsonl(pairs), strict=True):
        scores = {}
        for side in ("chosen", "rejected"):
            question, answer = pair[side].removeprefix("\n\nHuman: ").split("\n\nAssistant: ")
            parts = ("<s>", "Human:", question.strip(), "</s>", "Assistant:", answer.strip(), "</s>")
            ids = [token for part in parts for token in tokenizer(part)["input_ids"]]
            with torch.no_grad():
                scores[side] = float(model(torch.tensor([ids])).logits[0, 0])
            assert row[side] == pytest.approx(scores[side], abs=1e-4)
        right += scores["chosen"] > scores["rejected"]
    assert result["num_pairs"] == len(rows) == 40
    assert result["accuracy"] == result["categories"]["harmless"]["accuracy"] == right / 40
    assert "expected calibration error" in capsys.readouterr().out


QUESTIONS = [
    {"question": f"abc {i}", "A": "abcd", "B": "ab jihg", "C": "K", "D": "fe", "answer": "ABCD"[i % 4]}
    for i in range(8)
]


@pytest.mark.parametrize("choice", ["letter", "option"])
def test_choices_are_those_of_the_log_likelihoods_of_transformers(tiny, tmp_path, choice):
    for name, rows in (("sums_val", QUESTIONS[:5]), ("signs_val", QUESTIONS[5:]), ("sums_dev", QUESTIONS[6:7])):
        folder = tmp_path / name[-3:]
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "categories.json").write_text('{"sums": ["Sums", "STEM"], "signs": "Other"}')
    policy = tiny.model("policy")
    given = ["--questions", str(tmp_path / "val"), "--dev", str(tmp_path / "dev"), "--shots", "1"]
    more = ["--categories", str(tmp_path / "categories.json"), "--choice", choice, "--output", str(tmp_path / "out")]
    assert cli.main(["multiple-choice", policy, *given, *more, "sampling.max_new_tokens=1"]) == 0
    result = json.loads((tmp_path / "out/results.json").read_text())
    rows = read_jsonl(tmp_path / "out/questions.jsonl")
    model = transformers.AutoModelForCausalLM.from_pretrained(policy).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{policy}/tokenizer.json")
    right = 0
    for row, question in zip(rows, [*QUESTIONS[5:], *QUESTIONS[:5]], strict=True):
        examples = QUESTIONS[6:7] if row["subject"] == "sums" else []
        head = f"The following are multiple choice questions (with answers) about {row['subject']}."
        texts = [head]
        for q in [*examples, question]:
            options = "".join(f"{x}. {q[x]}\n" for x in "ABCD") if choice == "letter" else ""
            texts.append(f"{q['question']}\n{options}Answer:")
            if q is not question:
                texts[-1] += f" {q['answer'] if choice == 'letter' else q[q['answer']]}"
        prompt = [274, *tokenizer("\n\n".join(texts))["input_ids"]]
        if len(prompt) > 150:  # the example did not fit
            prompt = [274, *tokenizer("\n\n".join([texts[0], texts[-1]]))["input_ids"]]
        expected, sizes = [], []
        for letter in "ABCD":
            ids = tokenizer(" " + (letter if choice == "letter" else question[letter]))["input_ids"]
            with torch.no_grad():
                logprobs = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(ids) - 1)
            expected.append(sum(float(logprobs[t, token]) for t, token in zip(places, ids, strict=True)))
            sizes.append(len(ids))
        assert row["logprobs"] == pytest.approx(expected, abs=1e-3)
        scores = [x / n for x, n in zip(expected, sizes, strict=True)] if choice == "option" else expected
        assert row["choice"] == "ABCD"[scores.index(max(scores))]
        right += row["choice"] == question["answer"]
    assert result["accuracy"] == right / 8
    assert set(result["categories"]) == {"STEM", "Other"}


def test_evaluate_tells_rewards_per_category(tiny, tmp_path):
    rows = read_jsonl(tiny.path("prompts.jsonl"))[:12]
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps(row | ({"category": "helpful"} if i % 3 == 0 else {})) + "\n" for i, row in enumerate(rows))
    )
    given = [
        f"model.policy={tiny.model('policy')}",
        f"model.reward={tiny.model('reward')}",
        f'data.eval=[{{path = "{tmp_path}/prompts.jsonl", category = "harmless"}}]',
        "data.max_length=160",
        "sampling.max_new_tokens=6",
        f"train.output={tmp_path}/out",
    ]
    assert cli.main(["evaluate", *given]) == 0
    found = json.loads((tmp_path / "out/evaluation.json").read_text())
    samples = read_jsonl(tmp_path / "out/samples.jsonl")
    assert {name: part["num_prompts"] for name, part in found["categories"].items()} == {"helpful": 4, "harmless": 8}
    assert [sample["category"] for sample in samples[:3]] == ["helpful", "harmless", "harmless"]
    low, high = found["reward_interval"]
    assert low < found["reward"] < high
    mean = sum(sample["reward"] for sample in samples if sample["category"] == "helpful") / 4
    assert found["categories"]["helpful"]["reward"] == pytest.approx(mean)
