"""`ppomax doctor`: is this environment, alone or under torchrun on many hosts, ready for a run? One table, with fixes.

Ranks report through the store of the rendezvous, so a rank that fails or hangs is a row of the table and holds up the
others for no longer than --timeout.
"""

import argparse
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ppomax.engine.errors import ConfigError, PeerFailedError
from ppomax.engine.parallel.agent import end_with_agent
from ppomax.engine.parallel.device import join_store
from ppomax.engine.parallel.environment import SLACK_SECONDS, hear_first, tell_first
from ppomax.tools.doctor_config import check_config, judge_folder, remove_token, see_folder, try_folder
from ppomax.tools.doctor_facts import facts
from ppomax.tools.doctor_findings import Finding, judge
from ppomax.tools.doctor_links import clock_skew, judge_links, measure

STAGES = ("sft", "reward", "critic", "ppo", "evaluate")
WIDTH = 150
"""Columns where the output is no terminal."""
COLOURS = {"OK": "green", "WARN": "yellow", "FAIL": "red"}
GOODBYE_SECONDS = 10.0
"""Rank 0 may hold the store: it stays until the others have read the verdict, but no longer than this."""


def main(argv: Sequence[str]) -> int:
    """`ppomax doctor [CONFIG.toml] [section.field=value ...] [--stage ppo] [--json] [--timeout SECONDS]`.

    Returns 0 where nothing failed, else the exit code of the first failure; the same on every rank.
    """
    arguments = _parser().parse_intermixed_args(argv)
    paths = [argument for argument in arguments.config if "=" not in argument]
    if len(paths) > 1:
        raise ConfigError(f"{', '.join(paths)}: expected one configuration file and section.field=value arguments")
    overrides = [argument for argument in arguments.config if "=" in argument]
    seconds = arguments.timeout
    if seconds <= 0:
        raise ConfigError(f"--timeout {seconds:g}: expected seconds, more than 0")
    end_with_agent()
    world = join_store(timedelta(seconds=seconds))
    rank = world["rank"]
    findings = _examine(world, paths[0] if paths else None, overrides, arguments.stage, seconds)
    code = 0
    if rank == 0:
        failed = [one for one in findings if one.status == "FAIL"]
        code = failed[0].error.exit_code if failed else 0
        _show(findings, world["world_size"], as_json=arguments.json)
    heard = hear_first(world["store"], "doctor/verdict", rank, code, seconds + SLACK_SECONDS)
    # Rank 0 goes last: under torchrun the first one that ends with an error ends the others.
    tell_first(world["store"], "doctor/goodbye", rank, world["world_size"], True, GOODBYE_SECONDS)
    if dist.is_initialized() and (heard == 0 or world["world_size"] == 1):
        dist.destroy_process_group()  # after a failure it could wait for a rank that is gone
    return PeerFailedError.exit_code if heard is None else int(heard)


def _examine(
    world: dict[str, Any], path: str | None, overrides: Sequence[str], stage: str, seconds: float
) -> list[Finding]:
    """All checks, in an order in which each needs what the ones before found. Findings are on rank 0, elsewhere []."""
    store, rank, world_size = world["store"], world["rank"], world["world_size"]
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    try:
        own = facts(local_rank)
    except Exception as error:
        own = {"failed": f"{type(error).__name__}: {error}", "local_rank": local_rank}
    own["host"] = socket.gethostname()
    told = tell_first(store, "doctor/facts", rank, world_size, own, seconds) or []
    places = [one["host"] if one else "unknown host" for one in told]
    leaders = [number for number, one in enumerate(told) if one and one["local_rank"] == 0]
    plan = hear_first(
        store, "doctor/go", rank, {"go": all(told), "leaders": leaders, "places": places}, seconds + SLACK_SECONDS
    )
    if plan is None or not plan["go"]:
        return judge(told, places)
    leaders, places = plan["leaders"], plan["places"]
    for leader, skew in clock_skew(store, rank, leaders, seconds).items():
        told[leader]["skew"] = skew
    findings = judge(told, places) if rank == 0 else []

    has_config = path is not None or bool(overrides)
    output, needed = None, 0
    if has_config and rank == 0:
        about_config, config, needed = check_config(path, overrides, stage, world_size)
        findings += about_config
        output = config.train.output if config is not None else None
    output = hear_first(store, "doctor/output", rank, output, seconds + SLACK_SECONDS)
    if output is not None:
        findings += _folder(store, rank, world_size, leaders, places, output, needed, seconds)

    has_gpu = torch.cuda.is_available() and local_rank < torch.cuda.device_count()
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    links = measure(store, rank, world_size, device, seconds)
    # Steps of `measure` fail one after the other at worst: joining, and one collective.
    measured = tell_first(store, "doctor/links", rank, world_size, links, 2 * seconds + SLACK_SECONDS)
    if measured is not None:
        findings += judge_links(measured, places, device.type)
    return findings


def _folder(
    store: dist.Store,
    rank: int,
    world_size: int,
    leaders: Sequence[int],
    places: Sequence[str],
    output: str,
    needed: int,
    seconds: float,
) -> list[Finding]:
    """The output folder as the first rank of each host finds it."""
    mine = try_folder(output, rank) if rank in leaders else None
    told = tell_first(store, "doctor/folder", rank, world_size, mine, seconds)
    token = hear_first(store, "doctor/token", rank, (mine or {}).get("token"), seconds + SLACK_SECONDS)
    saw = see_folder(output, token) if token and rank in leaders else None
    all_saw = tell_first(store, "doctor/saw", rank, world_size, saw, seconds)
    if told is None or all_saw is None:
        return []
    if token:
        remove_token(output, token)
    return judge_folder(told, all_saw, places, needed)


def _show(findings: Sequence[Finding], world_size: int, *, as_json: bool) -> None:
    counts = {status: sum(one.status == status for one in findings) for status in COLOURS}
    if as_json:
        rows = [asdict(one) | {"error": one.error.__name__ if one.status == "FAIL" else None} for one in findings]
        print(json.dumps({"ranks": world_size, "counts": counts, "findings": rows}, indent=1), flush=True)
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    table = Table(
        "check",
        "",
        "found",
        "what to do",
        title=f"ppomax doctor, {world_size} {'rank' if world_size == 1 else 'ranks'}",
    )
    for one in findings:
        # Text, not markup: what a host says of itself is shown as it is.
        table.add_row(one.check, Text(one.status, COLOURS[one.status]), Text(one.found), Text(one.fix))
    console.print(table)
    console.print(", ".join(f"{number} {status}" for status, number in counts.items()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ppomax doctor", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "config",
        nargs="*",
        metavar="CONFIG.toml | section.field=value",
        help="a configuration to check on these ranks: layout, models, plan, and space in train.output",
    )
    parser.add_argument("--stage", choices=STAGES, default="ppo", help="of the configuration (default: ppo)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="longest wait for another rank (default: 60)"
    )
    return parser
