"""The embedded quickstart set: it can be made again, keeps its promises, and counting words does not solve it."""

import json
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
import torch

from ppomax.engine.data.chat import parse_hh
from ppomax.tools.make_quickstart_data import main
from ppomax.tools.quickstart_gold import DOMAINS, asked_thing, follows_rule

FOLDER = Path(__file__).parents[2] / "examples" / "data" / "quickstart"
PROMPT = ("Hello!", "Hello, what can I do for you?", "First the soup, now the bread. Where do I begin?")
GOOD = "Good question. For the bread, keep the heat low. Shall I list the steps?"

Pair = tuple[list[str], str, str]


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def turns_of(text: str) -> list[str]:
    return [turn.text for turn in parse_hh(text)]


def read_pairs(name: str) -> list[Pair]:
    """(turns of the prompt, good response, bad response) of every pair."""
    pairs = []
    for row in read(name):
        *prompt, good = turns_of(row["chosen"])
        *same_prompt, bad = turns_of(row["rejected"])
        assert prompt == same_prompt
        pairs.append((prompt, good, bad))
    return pairs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    main([str(folder)])
    return folder


def test_script_writes_the_committed_rows_again(made: Path) -> None:
    names = sorted(path.name for path in FOLDER.glob("*.jsonl"))
    assert len(names) == 5
    for name in names:
        assert (made / name).read_bytes() == (FOLDER / name).read_bytes(), name


def test_script_writes_the_committed_tokenizer_again(made: Path) -> None:
    """Pieces, not bytes: the file also records the settings that another version of sentencepiece knows."""
    new, committed = (
        sentencepiece.SentencePieceProcessor(model_file=str(f / "tokenizer.model")) for f in (made, FOLDER)
    )
    pieces = [[model.id_to_piece(i) for i in range(model.vocab_size())] for model in (new, committed)]
    assert pieces[0] == pieces[1]


def test_two_runs_write_the_same_bytes(made: Path, tmp_path: Path) -> None:
    main([str(tmp_path)])
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in made.iterdir()}


def test_set_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1_500_000


@pytest.mark.parametrize("name", ["preferences_train", "preferences_heldout"])
def test_chosen_follows_the_rule_and_rejected_does_not(name: str) -> None:
    for prompt, good, bad in read_pairs(name):
        assert follows_rule(prompt, good), (prompt, good)
        assert not follows_rule(prompt, bad), (prompt, bad)


def test_about_a_third_of_the_supervised_answers_follow_the_rule() -> None:
    dialogues = [[message["content"] for message in row["messages"]] for row in read("sft")]
    share = sum(follows_rule(turns[:-1], turns[-1]) for turns in dialogues) / len(dialogues)
    assert 0.25 < share < 0.4


def test_dialogues_have_one_to_three_human_turns() -> None:
    human_turns = Counter(len(row["messages"]) // 2 for row in read("sft"))
    assert set(human_turns) == {1, 2, 3}
    assert min(human_turns.values()) > 0.2 * sum(human_turns.values())


def test_heldout_questions_occur_in_no_training_file() -> None:
    trained = {row["messages"][-2]["content"] for row in read("sft")}
    trained |= {prompt[-1] for prompt, _, _ in read_pairs("preferences_train")}
    trained |= {turns_of(row["prompt"])[-1] for row in read("prompts_train")}
    heldout = [turns_of(row["prompt"])[-1] for row in read("prompts_heldout")]
    heldout += [prompt[-1] for prompt, _, _ in read_pairs("preferences_heldout")]
    assert not trained & set(heldout)


def test_every_prompt_asks_about_one_thing() -> None:
    for row in read("prompts_train") + read("prompts_heldout"):
        assert asked_thing(turns_of(row["prompt"])) is not None


def test_tokenizer_is_llama_like_and_keeps_texts_short() -> None:
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "tokenizer.model"))
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id()) == (0, 1, 2)
    assert tokenizer.decode(tokenizer.encode("naïve 你好")) == "naïve 你好"
    for prompt, good, bad in read_pairs("preferences_train"):
        assert sum(len(tokenizer.encode("Assistant:" + turn)) + 1 for turn in prompt) < 100
        assert max(len(tokenizer.encode(good)), len(tokenizer.encode(bad))) < 40


def bag_of_words(prompt: list[str], response: str) -> Counter[str]:
    return Counter(response.split())


def bag_of_words_with_prompt(prompt: list[str], response: str) -> Counter[str]:
    return Counter([f"prompt {word}" for turn in prompt for word in turn.split()] + response.split())


def words_and_overlap(prompt: list[str], response: str) -> Counter[str]:
    words = Counter(response.split())
    words["shared with the prompt"] = len(
        {w.strip(".,?!") for w in words} & {w.strip(".,?!") for w in prompt[-1].split()}
    )
    return words


def length(prompt: list[str], response: str) -> Counter[str]:
    return Counter({"words": len(response.split()), "characters": len(response) // 4})


@pytest.mark.parametrize("features", [bag_of_words, bag_of_words_with_prompt, words_and_overlap, length])
def test_counting_does_not_tell_good_from_bad(features: Callable[[list[str], str], Counter[str]]) -> None:
    assert 0.35 < heldout_accuracy(features) < 0.65


def test_the_measure_of_counting_sees_what_word_pairs_give_away() -> None:
    """The limit above would mean nothing if the regression could not learn."""

    def word_pairs(prompt: list[str], response: str) -> Counter[str]:
        words = ["<s>", *response.split(), "</s>"]
        return Counter(pairwise(words))

    assert heldout_accuracy(word_pairs) > 0.75


def heldout_accuracy(features: Callable[[list[str], str], Counter]) -> float:
    """Share of held-out pairs that a logistic regression on `features` ranks right; a tie counts half."""
    train, heldout = read_pairs("preferences_train"), read_pairs("preferences_heldout")
    names = sorted({name for prompt, *responses in train for r in responses for name in features(prompt, r)})
    column = {name: i for i, name in enumerate(names)}

    def matrix(pairs: list[Pair]) -> torch.Tensor:
        rows = torch.zeros(2 * len(pairs), len(column), dtype=torch.float64)  # good and bad responses alternate
        for i, (prompt, *responses) in enumerate(pairs):
            for j, response in enumerate(responses):
                for name, count in features(prompt, response).items():
                    if name in column:
                        rows[2 * i + j, column[name]] = count
        return rows

    x, labels = matrix(train), torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(len(train))
    weights = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = x @ weights[:-1] + weights[-1]
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels) + 1e-4 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    scores = (matrix(heldout) @ weights[:-1]).detach().view(-1, 2)
    difference = scores[:, 0] - scores[:, 1]
    ties = difference.abs() < 1e-9
    return float(((difference > 0) & ~ties).double().mean() + 0.5 * ties.double().mean())


def test_rule_accepts_a_good_answer() -> None:
    assert follows_rule(PROMPT, GOOD)
    assert follows_rule(PROMPT[2:], f" {GOOD}\n")


@pytest.mark.parametrize(
    "response",
    [
        pytest.param("For the bread, keep the heat low. Good question. Shall I list the steps?", id="other order"),
        pytest.param("Good question. Shall I list the steps? For the bread, keep the heat low.", id="offer too early"),
        pytest.param(GOOD.replace("bread", "soup"), id="thing of an earlier sentence"),
        pytest.param(GOOD.replace("bread", "piano"), id="thing of another domain"),
        pytest.param(GOOD.replace("keep the heat low", "relax your hands"), id="tip of another domain"),
        pytest.param(GOOD.replace("the heat", "heat the"), id="words swapped"),
        pytest.param(f"{GOOD} {GOOD}", id="twice"),
        pytest.param(f"Of course. {GOOD}", id="two acknowledgements"),
        pytest.param(f"{GOOD} Tell me how it goes.", id="two offers"),
        pytest.param(f"{GOOD} And", id="trailing word"),
        pytest.param(GOOD[:-1], id="cut short"),
        pytest.param(GOOD.replace(". ", ".  "), id="two spaces"),
        pytest.param(GOOD.lower(), id="lower case"),
        pytest.param("Good question. Shall I list the steps?", id="no advice"),
        pytest.param("Good question.", id="acknowledgement only"),
        pytest.param("Good question. ", id="acknowledgement and space"),
        pytest.param("", id="empty"),
        pytest.param("\x00 \ufffd {thing} % \\", id="noise"),
    ],
)
def test_rule_refuses(response: str) -> None:
    assert not follows_rule(PROMPT, response)


@pytest.mark.parametrize("prompt", [(), ("",), ("Hello!",)], ids=["no turns", "empty turn", "no thing"])
def test_rule_refuses_any_answer_to_a_prompt_that_asks_nothing(prompt: tuple[str, ...]) -> None:
    assert not follows_rule(prompt, GOOD)


def test_things_belong_to_one_domain() -> None:
    things = [thing for domain in DOMAINS for thing in domain.things]
    assert len(things) == len(set(things))
