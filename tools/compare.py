"""`ppomax compare`: win / tie / lose of two models on the same prompts.

A and B are files of responses, as `ppomax generate` and `ppomax evaluate` write them, or model folders, which answer
--prompts first. The judge is a reward model, a chat model behind an endpoint, or people.
"""

import argparse
import json
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch.distributed as dist

from ppomax.engine.data.readers import Format
from ppomax.engine.errors import ConfigError, DataError
from ppomax.engine.judge.blind import judge_by_hand, read_annotations, read_key, write_blind
from ppomax.engine.judge.chat_judge import AnswerCache, ChatJudge, judge_pairs
from ppomax.engine.judge.pairwise import Judged, by_margin, summarise
from ppomax.engine.judge.responses import Pair, Pairs, read_pairs
from ppomax.engine.judge.reward_judge import encode_pairs, score_pairs
from ppomax.engine.judge.tables import comparison_table
from ppomax.engine.models.roles import load_role, role_groups
from ppomax.engine.parallel.collectives import raise_on_all
from ppomax.engine.service import Service, ServiceConfig
from ppomax.tools.generate import json_line
from ppomax.tools.inference import joined_ranks, load_template, printable, score_config
from ppomax.tools.responses import Side, prepare_side, respond

USAGE = """\
ppomax compare reward A B --reward FOLDER --output DIR [--margin M]
ppomax compare chat   A B --url URL --model NAME --output DIR [--key-env VARIABLE]
ppomax compare blind  A B --output DIR          then, when annotate.csv has verdicts:
ppomax compare read   DIR ANNOTATED.csv [ANNOTATED.csv ...]
ppomax compare table  DIR [DIR ...] [--markdown | --json]
`ppomax compare JUDGE --help` lists the arguments of each."""


def main(argv: Sequence[str]) -> None:
    """`ppomax compare {reward,chat,blind,read,table} ...`."""
    commands: dict[str, Callable[[Sequence[str]], None]] = {
        "reward": by_reward,
        "chat": by_chat,
        "blind": blind,
        "read": read,
        "table": table,
    }
    kind, *rest = argv or ["--help"]
    if kind in ("-h", "--help"):
        print(USAGE)
    elif kind in commands:
        commands[kind](rest)
    else:
        raise ConfigError(f"{kind!r}: no such judge; expected one of {', '.join(commands)}\n{USAGE}")


def by_reward(argv: Sequence[str]) -> None:
    """Both responses of each pair are scored; no position exists that could be swapped. Also under torchrun."""
    parser = _pair_parser("reward", "by a reward model's scores")
    parser.add_argument("--reward", required=True, metavar="FOLDER", help="Hugging Face folder of the reward model")
    parser.add_argument(
        "--margin", type=float, default=0.0, metavar="M", help="scores that differ by at most M are a tie (default 0)"
    )
    given = parser.parse_intermixed_args(argv)
    if not given.margin >= 0:
        raise ConfigError(f"--margin {given.margin}: expected 0 or more")
    config = score_config(given.reward, given.overrides)
    template = load_template(config)
    sides = _sides(given)
    with joined_ranks(config):
        is_writer = dist.get_rank() == 0
        for side in sides:
            respond(side)
        with raise_on_all(DataError, "the responses cannot be read"):
            pairs = read_pairs(*(str(side.path) for side in sides))
            sequences = encode_pairs(pairs.rows, template, max_tokens=config.data.max_length)
        reward = load_role("reward", given.reward, config, role_groups(config)["reward"], scalar=True)
        scores = score_pairs(reward, sequences, config).tolist()
        judged = [Judged(by_margin(a - b, given.margin), details={"score_a": a, "score_b": b}) for a, b in scores]
        settings = {"kind": "reward", "reward": given.reward, "margin": given.margin}
        with raise_on_all(ConfigError, f"{given.output} cannot be written"):
            if is_writer:
                _write(given, pairs, judged, judge=given.judge_name or "reward model", settings=settings)


def by_chat(argv: Sequence[str]) -> None:
    """Each pair is asked for in both orders; what was answered stays in the cache. Under torchrun one rank asks."""
    parser = _pair_parser("chat", "by a chat model behind an OpenAI-compatible endpoint")
    parser.add_argument("--url", required=True, help="base address, as https://HOST/v1: /chat/completions is added")
    parser.add_argument("--model", required=True, metavar="NAME", help="the judge's name at the endpoint")
    parser.add_argument("--key-env", default="", metavar="VARIABLE", help="environment variable that holds the key")
    parser.add_argument("--concurrency", type=int, default=4, metavar="N", help="requests at a time (default 4)")
    parser.add_argument("--requests-per-minute", type=float, default=0.0, metavar="N", help="default 0: no limit")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="of one attempt (default 120)")
    parser.add_argument("--retries", type=int, default=6, metavar="N", help="attempts after the first (default 6)")
    parser.add_argument("--max-wait", type=float, default=120.0, metavar="SECONDS", help="before a retry (default 120)")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="of one answer (default 512)")
    parser.add_argument(
        "--extra", type=_json_object, default={}, metavar="JSON", help='added to each request: {"temperature": null}'
    )
    parser.add_argument("--cache", type=Path, metavar="DIR", help="answers (default: OUTPUT/answers)")
    given = parser.parse_intermixed_args(argv)
    for name, least in (("concurrency", 1), ("retries", 0), ("max_tokens", 1)):
        if getattr(given, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(given, name)}: expected {least} or more")
    for name in ("timeout", "max_wait"):
        if not 0 < getattr(given, name) < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(given, name)}: expected seconds above 0")
    config = ServiceConfig(
        given.url, given.key_env, given.timeout, given.retries, given.requests_per_minute, longest_wait=given.max_wait
    )
    service = Service(config)
    pairs = _read_or_generate(given)
    if pairs is None:
        return
    judge = ChatJudge(given.model, given.max_tokens, given.extra)
    cache = AnswerCache(given.cache or given.output / "answers", given.url)
    judged, counts = judge_pairs(
        service, judge, pairs.rows, cache, concurrency=given.concurrency, progress=_show_progress
    )
    settings = {"kind": "chat", "url": given.url, "model": given.model, "extra": given.extra, **counts}
    _write(given, pairs, judged, judge=given.judge_name or given.model, settings=settings, is_swapped=True)
    if all(item.outcome == "invalid" for item in judged):
        raise DataError(f"none of {len(judged)} pairs has two valid verdicts; {given.output}/pairs.jsonl says why")


def blind(argv: Sequence[str]) -> None:
    """Writes the questions for people."""
    parser = _pair_parser("blind", "by people: writes annotate.csv, and key.json for `ppomax compare read`")
    parser.add_argument("--seed", type=int, help="of sides and order (default: drawn); it stands in key.json")
    given = parser.parse_intermixed_args(argv)
    pairs = _read_or_generate(given)
    if pairs is None:
        return
    seed = secrets.randbits(64) if given.seed is None else given.seed
    number = write_blind(pairs.rows, given.output, name_a=_name(given, "a"), name_b=_name(given, "b"), seed=seed)
    print(pairs.summary())
    print(f"{given.output / 'annotate.csv'}: {number} questions; write left, right or tie into the column verdict")
    print(f"{given.output / 'key.json'}: who is left; keep it from the annotators")


def read(argv: Sequence[str]) -> None:
    """Reads what people decided."""
    parser = argparse.ArgumentParser(prog="ppomax compare read", description=read.__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, metavar="DIR", help="where `ppomax compare blind` wrote key.json")
    parser.add_argument("annotated", type=Path, nargs="+", metavar="ANNOTATED.csv", help="one file per annotator")
    parser.add_argument("--judge-name", default="human", metavar="NAME", help="in tables (default human)")
    given = parser.parse_args(argv)
    key = read_key(given.folder / "key.json")
    judged, facts = judge_by_hand([read_annotations(path, key) for path in given.annotated], key)
    result = summarise(
        list(judged.values()),
        [key.categories[id] for id in judged],
        name_a=key.name_a,
        name_b=key.name_b,
        judge=given.judge_name,
        is_swapped=False,
    )
    rows = [{"id": id, "category": key.categories[id], **_record(item)} for id, item in judged.items()]
    _save(given.folder, result | {"settings": {"kind": "human"}, "annotators": facts}, rows)


def table(argv: Sequence[str]) -> None:
    """Prints results of comparisons side by side: the layout of Fig. 10 and 11."""
    parser = argparse.ArgumentParser(prog="ppomax compare table", description=table.__doc__, allow_abbrev=False)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="output of the other commands")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="as a markdown table")
    form.add_argument("--json", action="store_true", help="head and rows as JSON")
    given = parser.parse_args(argv)
    results = []
    for folder in given.folders:
        path = folder / "results.json"
        try:
            results.append(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError):
            raise DataError(f"{path} is not JSON; expected what `ppomax compare` wrote") from None
    found = comparison_table(results)
    if given.json:
        print(json.dumps({"head": found.head, "rows": found.rows}))
    else:
        print(found.markdown() if given.markdown else printable(found.text()))


def _pair_parser(kind: str, what: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"ppomax compare {kind}", description=f"Win / tie / lose of A against B, {what}.", allow_abbrev=False
    )
    parser.add_argument("a", metavar="A", help="file of responses, or model folder")
    parser.add_argument("b", metavar="B", help="the same for the other side")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="sampling.temperature=0, ...")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="results.json and pairs.jsonl")
    parser.add_argument("--prompts", metavar="FILE", help="what model folders answer")
    parser.add_argument("--format", choices=get_args(Format), help="of the prompts (default: told from the first row)")
    parser.add_argument("--name-a", metavar="NAME", help="in tables (default: A)")
    parser.add_argument("--name-b", metavar="NAME", help="in tables (default: B)")
    parser.add_argument("--judge-name", metavar="NAME", help="in tables")
    return parser


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


def _sides(given: argparse.Namespace) -> list[Side]:
    """Both sides, checked; makes the output folder."""
    sides = [
        prepare_side(source, given.prompts, given.format, given.overrides, given.output / f"responses_{name}.jsonl")
        for name, source in (("a", given.a), ("b", given.b))
    ]
    try:
        given.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {given.output} cannot be made: {error.strerror}") from None
    return sides


def _read_or_generate(given: argparse.Namespace) -> Pairs | None:
    """The pairs, after models have answered on all ranks; None on all ranks but the first, whose work is done then."""
    sides = _sides(given)
    configs = [side.config for side in sides if side.config is not None]
    if configs:
        with joined_ranks(configs[0]):
            for side in sides:
                respond(side)
    if os.environ.get("RANK", "0") != "0":
        return None
    return read_pairs(*(str(side.path) for side in sides))


def _name(given: argparse.Namespace, side: str) -> str:
    return getattr(given, f"name_{side}") or getattr(given, side)


def _write(
    given: argparse.Namespace,
    pairs: Pairs,
    judged: Sequence[Judged],
    *,
    judge: str,
    settings: dict[str, Any],
    is_swapped: bool = False,
) -> None:
    result = summarise(
        judged,
        [pair.category for pair in pairs.rows],
        name_a=_name(given, "a"),
        name_b=_name(given, "b"),
        judge=judge,
        is_swapped=is_swapped,
    )
    found = {"unpaired_a": pairs.unpaired_a, "unpaired_b": pairs.unpaired_b, "failed_rows": pairs.failed}
    rows = [_pair_record(pair) | _record(item) for pair, item in zip(pairs.rows, judged, strict=True)]
    print(pairs.summary())
    _save(given.output, result | {"settings": settings, **found}, rows)


def _pair_record(pair: Pair) -> dict[str, Any]:
    prompt = [{"role": "user" if turn.role == "human" else "assistant", "content": turn.text} for turn in pair.prompt]
    return {"prompt": prompt, "a": pair.a, "b": pair.b, "category": pair.category}


def _record(item: Judged) -> dict[str, Any]:
    return {"outcome": item.outcome, "in_order": item.in_order, "swapped": item.swapped, **(item.details or {})}


def _save(folder: Path, result: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """results.json and pairs.jsonl, and the table on standard output."""
    (folder / "results.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    # Lone surrogates, which JSON can spell, have no UTF-8: escaped again, they are the same JSON.
    with (folder / "pairs.jsonl").open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(map(json_line, rows))
    print(printable(comparison_table([result]).text()))
    overall, position = result["overall"], result["position"]
    print(f"sign test of wins against losses: p = {overall['sign_test_p']:.3g}; invalid: {overall['num_invalid']}")
    if position is not None and position["num_pairs"]:
        print(
            f"same answer in both orders: {position['consistent']} of {position['num_pairs']}; the first place in "
            f"both: {position['both_first']}, the second: {position['both_second']} (p = {position['p']:.3g})"
        )
    print(f"wrote {folder / 'results.json'} and {folder / 'pairs.jsonl'}")


def _show_progress(done: int, total: int) -> None:
    """A line on standard error after each tenth of the requests."""
    if done == total or done * 10 // total != (done - 1) * 10 // total:
        print(f"{done}/{total} verdicts", file=sys.stderr, flush=True)
