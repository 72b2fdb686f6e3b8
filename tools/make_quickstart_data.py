"""Makes the quickstart's data set and tokenizer from a fixed seed.

`python -m ppomax.tools.make_quickstart_data examples/data/quickstart` writes the committed files again, byte for byte.
`quickstart_gold.py` holds the answers' language and the rule; this file holds the human's side, the mixture of good and
bad answers, and the files. Most answers of the supervised set are bad on purpose: the policy that learns it has
something to gain from the preferences.
"""

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from ppomax.tools.quickstart_gold import ACKNOWLEDGEMENTS, DOMAINS, FRAMES, OFFERS, advice, domain_of

SEED = 20230711
VOCAB_SIZE = 1024

NUM_SFT = 1900
NUM_PAIRS = 900
NUM_HELDOUT_PAIRS = 256
NUM_PROMPTS = 704
NUM_HELDOUT_PROMPTS = 256

# The share of answers in the supervised set that keep the order. All of them keep to the asked thing.
SFT_ORDER_SHARE = 0.32

# What the answers of a pair differ in: the order of the same sentences, the order of sentences drawn afresh, the thing
# that the advice is about, or the order of words within a sentence.
PAIR_KINDS = ("order", "order_fresh", "topic", "words")
PAIR_WEIGHTS = (48, 30, 12, 10)

# Orders of (acknowledgement, advice, offer). The first is the rule's.
GOOD_ORDER = (0, 1, 2)
BAD_ORDERS = ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))

PEOPLE = ("sister", "brother", "neighbour", "friend", "mother", "cousin")
GREETINGS = (
    ("Hello!", "Hello, what can I do for you?"),
    ("Good morning.", "Good morning, how can I help?"),
    ("Hi, do you have a minute?", "I do. What is it about?"),
    ("Are you there?", "Yes, I am listening."),
    ("I need a bit of advice today.", "Then you came to the right place."),
    ("It is raining again.", "A good day to stay in and talk."),
)
STORIES = (
    ("I spent the weekend on the {other}.", "How did it go?"),
    ("My {person} asked me about the {other} and the {thing}.", "That is a lot at once. Which one is first?"),
    ("We talked about the {thing} and the {other} last time.", "I remember. Is there any news?"),
    ("Yesterday I tried the {other} with my {person}.", "Was it a good day?"),
    ("I have the {other} on my list.", "Is there anything else on it?"),
    ("The {other} took me all day.", "Then you have earned a break."),
)
REPLIES = ("Quite well.", "It was fine.", "Well, yes.", "A bit slow.", "Better than I feared.", "So it was.")
QUESTIONS = (
    "Can you help me with the {thing}?",
    "Do you have a tip for the {thing}?",
    "What should I know about the {thing}?",
    "Next is the {thing}. Any advice?",
    "I am new to the {thing}. Where do I begin?",
    "My {person} wants to try the {thing}. What would you say?",
    "I am done with the {other}. How should I start with the {thing}?",
    "The {other} went well, but the {thing} did not. Any ideas?",
    "My {person} takes care of the {other} and I get the {thing}. What now?",
    "My {person} likes the {other}, but I prefer the {thing}. Any tips?",
    "First the {other}, now the {thing}. What do you think?",
    "Forget the {other}. Could you tell me about the {thing}?",
    "After the {other} I want to try the {thing}. Is it hard?",
    "I know the {other} by heart. Is there a trick for the {thing}?",
)


@dataclass(frozen=True)
class Prompt:
    """A dialogue up to the human's question: its turns, and the thing that it asks about."""

    turns: tuple[str, ...]
    thing: str


def make_quickstart_data(folder: Path, *, seed: int = SEED) -> None:
    """Writes five .jsonl files and tokenizer.model into `folder`, which is created if needed."""
    rng = random.Random(seed)
    heldout_prompts = draw_prompts(rng, NUM_HELDOUT_PROMPTS, avoid=set())
    heldout_pair_prompts = draw_prompts(rng, NUM_HELDOUT_PAIRS, avoid={p.turns[-1] for p in heldout_prompts})
    heldout_questions = {p.turns[-1] for p in heldout_prompts + heldout_pair_prompts}
    train_prompts = draw_prompts(rng, NUM_PROMPTS, avoid=heldout_questions)
    sft_prompts = draw_prompts(rng, NUM_SFT, avoid=heldout_questions)
    pair_prompts = draw_prompts(rng, NUM_PAIRS, avoid=heldout_questions)

    dialogues = [(*prompt.turns, draw_sft_answer(rng, prompt)) for prompt in sft_prompts]
    pairs = [(prompt, *draw_pair(rng, prompt)) for prompt in pair_prompts]
    heldout_pairs = [(prompt, *draw_pair(rng, prompt)) for prompt in heldout_pair_prompts]

    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "sft.jsonl", ({"messages": as_messages(turns)} for turns in dialogues))
    for name, rows in (("train", pairs), ("heldout", heldout_pairs)):
        write_jsonl(
            folder / f"preferences_{name}.jsonl",
            ({"chosen": as_hh((*p.turns, good)), "rejected": as_hh((*p.turns, bad))} for p, good, bad in rows),
        )
    for name, prompts in (("train", train_prompts), ("heldout", heldout_prompts)):
        write_jsonl(folder / f"prompts_{name}.jsonl", ({"prompt": as_hh(prompt.turns)} for prompt in prompts))
    train_tokenizer(folder / "tokenizer.model", dialogues)


def draw_prompts(rng: random.Random, count: int, *, avoid: set[str]) -> list[Prompt]:
    """Draws `count` different prompts whose question, the last turn, is not in `avoid`."""
    prompts: dict[tuple[str, ...], Prompt] = {}
    while len(prompts) < count:
        prompt = draw_prompt(rng)
        if prompt.turns[-1] not in avoid:
            prompts[prompt.turns] = prompt
    return list(prompts.values())


def draw_prompt(rng: random.Random) -> Prompt:
    """Draws a prompt of one, two or three human turns."""
    thing, other = rng.sample(rng.choice(DOMAINS).things, 2)
    person = rng.choice(PEOPLE)

    def fill(template: str) -> str:
        return template.format(thing=thing, other=other, person=person)

    num_human_turns = rng.choices((1, 2, 3), weights=(40, 35, 25))[0]
    with_story = num_human_turns == 3 or (num_human_turns == 2 and rng.random() < 0.6)
    turns: list[str] = []
    if num_human_turns == 3 or (num_human_turns == 2 and not with_story):
        turns += rng.choice(GREETINGS)
    if with_story:
        turns += map(fill, rng.choice(STORIES))
    question = fill(rng.choice(QUESTIONS))
    turns.append(f"{rng.choice(REPLIES)} {question}" if with_story else question)
    return Prompt(turns=tuple(turns), thing=thing)


def draw_sentences(rng: random.Random, thing: str) -> tuple[str, str, str]:
    """Draws the three sentences of an answer about `thing`, in the rule's order."""
    tip = rng.choice(domain_of(thing).tips)
    return rng.choice(ACKNOWLEDGEMENTS), advice(rng.choice(FRAMES), tip, thing), rng.choice(OFFERS)


def in_order(sentences: Sequence[str], order: Iterable[int]) -> str:
    """Joins `sentences`, taken in `order`, to one text."""
    return " ".join(sentences[i] for i in order)


def draw_sft_answer(rng: random.Random, prompt: Prompt) -> str:
    """Draws an answer of the supervised set, good or bad."""
    order = GOOD_ORDER if rng.random() < SFT_ORDER_SHARE else rng.choice(BAD_ORDERS)
    return in_order(draw_sentences(rng, prompt.thing), order)


def draw_pair(rng: random.Random, prompt: Prompt) -> tuple[str, str]:
    """Draws a good answer to `prompt` and a bad one."""
    kind = rng.choices(PAIR_KINDS, weights=PAIR_WEIGHTS)[0]
    sentences = draw_sentences(rng, prompt.thing)
    good = in_order(sentences, GOOD_ORDER)
    if kind == "topic":
        opening, _, closing = sentences
        _, off_topic, _ = draw_sentences(rng, draw_off_topic(rng, prompt.thing))
        return good, in_order((opening, off_topic, closing), GOOD_ORDER)
    if kind == "words":
        return good, swap_neighbours(rng, good)
    if kind == "order_fresh":
        sentences = draw_sentences(rng, prompt.thing)
    return good, in_order(sentences, rng.choice(BAD_ORDERS))


def draw_off_topic(rng: random.Random, thing: str) -> str:
    """Draws a thing of another domain than that of `thing`."""
    return rng.choice([other for domain in DOMAINS if thing not in domain.things for other in domain.things])


def swap_neighbours(rng: random.Random, text: str) -> str:
    """Swaps two words of `text` that stand side by side, away from punctuation and capitals."""
    words = text.split()
    places = [i for i in range(len(words) - 1) if (words[i] + words[i + 1]).isalpha() and words[i].islower()]
    place = rng.choice(places)
    words[place], words[place + 1] = words[place + 1], words[place]
    return " ".join(words)


def as_messages(turns: Sequence[str]) -> list[dict[str, str]]:
    """Returns `turns` as chat messages; the human speaks first."""
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def as_hh(turns: Sequence[str]) -> str:
    """Returns `turns` as one string in the format of HH-RLHF; the human speaks first."""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def write_jsonl(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Writes one JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")


def train_tokenizer(path: Path, dialogues: Sequence[Sequence[str]]) -> None:
    """Trains a Llama-like sentencepiece BPE model on the turns of `dialogues`, spelled as in the paper's template."""
    turns = (f"{('Human', 'Assistant')[i % 2]}:{turn}" for turns in dialogues for i, turn in enumerate(turns))
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=turns,
            model_writer=file,
            model_type="bpe",
            vocab_size=VOCAB_SIZE,
            character_coverage=1.0,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the output folder from the command line and writes the set there."""
    parser = argparse.ArgumentParser(description="Make the quickstart data set and its tokenizer.")
    parser.add_argument("folder", type=Path, help="the folder to write, such as examples/data/quickstart")
    make_quickstart_data(parser.parse_args(arguments).folder)


if __name__ == "__main__":
    main()
