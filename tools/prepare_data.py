"""`ppomax prepare-data`: from one file of preference pairs to training and held-out files and a tokenizer.

Pairs whose dialogues begin with the same human turn stay on one side of the split, so no held-out prompt is a
training prompt.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from ppomax.engine.data.readers import Turns, find_format, parse, read
from ppomax.engine.errors import ConfigError, DataError


def main(argv: Sequence[str]) -> None:
    """`ppomax prepare-data INPUT OUTPUT [--held-out N] [--vocab-size V] [--seed S]`."""
    parser = argparse.ArgumentParser(prog="ppomax prepare-data", description=__doc__)
    parser.add_argument("input", help="HH-RLHF jsonl (also .gz), or the released code's list of pairs")
    parser.add_argument("output", type=Path, help="folder for train.jsonl, heldout.jsonl and tokenizer.model")
    parser.add_argument("--held-out", type=int, default=200, help="at least this many held-out pairs (default 200)")
    parser.add_argument(
        "--vocab-size", type=int, default=2048, help="pieces of the sentencepiece tokenizer (default 2048)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split (default 0)")
    arguments = parser.parse_args(argv)
    prepare(arguments.input, arguments.output, arguments.held_out, arguments.vocab_size, arguments.seed)


def prepare(source: str, output: Path, num_held_out: int, vocab_size: int, seed: int) -> None:
    """Writes the three files; rows that cannot be parsed are counted and left out."""
    if output.exists():
        raise ConfigError(f"{output} exists; give a new folder")
    groups: dict[str, list[tuple[Turns, Turns]]] = {}
    faults = []
    format = None
    for record in read(source):
        try:
            if record.fault is not None:
                raise DataError(record.fault)
            format = format or find_format(source, record)
            chosen, rejected = parse(record.value, format, with_rejected=True)
            if rejected is None:
                raise DataError("no rejected response")
            groups.setdefault(chosen[0].text, []).append((chosen, rejected))
        except DataError as error:
            faults.append(f"line {record.line}: {error}")
    order = sorted(groups, key=lambda text: hashlib.blake2b(f"{seed} {text}".encode()).digest())
    held_out: list[tuple[Turns, Turns]] = []
    while order and len(held_out) < num_held_out:
        held_out += groups[order.pop()]
    train = [pair for text in order for pair in groups[text]]
    if not train:
        raise DataError(
            f"{source}: {len(held_out)} usable pairs, none left for training; lower --held-out {num_held_out}"
        )
    output.mkdir(parents=True)
    try:
        texts = [turn.text for pair in train for side in pair for turn in side]
        train_tokenizer(texts, output / "tokenizer.model", vocab_size)
    except RuntimeError as error:  # of sentencepiece; its message says which size would do
        shutil.rmtree(output)
        raise ConfigError(f"no tokenizer of --vocab-size {vocab_size} can be trained on {source}: {error}") from None
    for name, pairs in (("train", train), ("heldout", held_out)):
        lines = (json.dumps({"chosen": _spell(c), "rejected": _spell(r)}, ensure_ascii=False) for c, r in pairs)
        (output / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    print(f"{source}: {len(train)} training pairs, {len(held_out)} held-out pairs, {len(faults)} rows left out")
    for fault in faults[:5]:
        print(f"  {fault}")
    print(f"wrote {output}/train.jsonl, heldout.jsonl, tokenizer.model")


def _spell(turns: Turns) -> str:
    return "".join(f"\n\n{turn.role.capitalize()}: {turn.text}" for turn in turns)


def train_tokenizer(texts: Sequence[str], path: Path, vocab_size: int) -> None:
    """A byte-fallback BPE model, as Llama's: unk 0, BOS 1, EOS 2."""
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
