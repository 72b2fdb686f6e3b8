"""`ppomax plan`: how much memory each GPU needs for a stage and about how long it takes, before anything is started."""

import argparse
from collections.abc import Sequence
from functools import partial

from rich.console import Console
from rich.table import Table

from ppomax.engine.config_file import load_config
from ppomax.engine.errors import ConfigError, DoesNotFitError
from ppomax.engine.plan.advice import proposals
from ppomax.engine.plan.gpus import GPUS, Gpu, find_gpu
from ppomax.engine.plan.memory import GIB, KINDS, Bytes
from ppomax.engine.plan.models import MODELS, known_model
from ppomax.engine.plan.moments import waiting
from ppomax.engine.plan.plan import Plan, make_plan
from ppomax.engine.plan.search import Found, search

STAGES = ("sft", "reward", "critic", "ppo", "evaluate")
WIDTH = 150
"""Columns where the output is no terminal."""


def main(argv: Sequence[str]) -> None:
    """`ppomax plan [CONFIG.toml] --gpus N --gpu NAME [--stage ppo] [--search] [section.field=value ...]`.

    Raises DoesNotFitError where the plan does not fit.
    """
    arguments = _parser().parse_intermixed_args(argv)
    gpu = find_gpu(arguments.gpu)
    if arguments.gpus < 1:
        raise ConfigError(f"--gpus {arguments.gpus}: expected a number of GPUs, 1 or more")
    for name in ("prompt", "response"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} {getattr(arguments, name)}: expected a number of tokens, 1 or more")
    paths = [argument for argument in arguments.config if "=" not in argument]
    if len(paths) > 1:
        raise ConfigError(f"{', '.join(paths)}: expected one configuration file and section.field=value arguments")
    overrides = [argument for argument in arguments.config if "=" in argument]
    config = load_config(paths[0] if paths else None, overrides, command=arguments.stage, for_planning=True)
    model = None if arguments.model is None else known_model(arguments.model)
    replan = partial(
        make_plan,
        command=arguments.stage,
        gpu=gpu,
        model=model,
        prompt=arguments.prompt,
        response=arguments.response,
    )
    plan = replan(config, world_size=arguments.gpus)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    console.print(_heading(plan, gpu))
    for table in (_models(plan), _memory(plan), _times(plan)):
        console.print(table)
    hosts = [f"{memory.role.name} {memory.host / GIB:.1f}" for memory in plan.worst.roles if memory.host]
    if hosts:
        console.print(f"A checkpoint takes host memory on each rank of the first replica, GiB: {', '.join(hosts)}.")
    waits = [f"{memory.role.name} {waiting(memory) / GIB:.1f}" for memory in plan.worst.roles if waiting(memory)]
    if waits:
        console.print(f"What is offloaded waits in host memory, GiB on each rank: {', '.join(waits)}.")
    if arguments.search:
        found = search(plan, gpu, lambda config, world_size: replan(config, world_size=world_size))
        console.print(_proposed(found) if found else "No layout of these models fits; take more GPUs.")
    if plan.faults:
        advice = proposals(
            plan, lambda config, world_size: replan(config, world_size=world_size), largest_tp=gpu.per_node
        )
        changes = ["Any of these makes it fit:", *(f"  {change}" for change in advice)] if advice else []
        raise DoesNotFitError("\n".join([*plan.faults, *changes]))
    console.print(f"Fits: {plan.worst.total / GIB:.1f} of {_capacity(plan) / GIB:.1f} GiB.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ppomax plan", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "config",
        nargs="*",
        metavar="CONFIG.toml | section.field=value",
        help="a TOML file of the stage, and values that override it; folders that are not there are planned by "
        "[model.init]",
    )
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="ranks of the run")
    parser.add_argument(
        "--gpu",
        required=True,
        metavar="NAME",
        help=f"{', '.join(GPUS)}; or a file rates.json of measured rates, by ppomax.tools.measure_rates",
    )
    parser.add_argument("--stage", choices=STAGES, default="ppo", help="default: ppo")
    parser.add_argument("--model", metavar="NAME", help=f"shape of every role: {', '.join(MODELS)}")
    parser.add_argument("--search", action="store_true", help="propose the layouts that fit, fastest first")
    parser.add_argument("--prompt", type=int, metavar="TOKENS", help="mean prompt (default: 512 at most)")
    parser.add_argument(
        "--response", type=int, metavar="TOKENS", help="mean response (default: sampling.max_new_tokens)"
    )
    return parser


def _heading(plan: Plan, gpu: Gpu) -> str:
    work = plan.workload
    return (
        f"{plan.command} on {plan.world_size} x {gpu.name} ({_capacity(plan) / GIB:.1f} GiB each, {gpu.per_node} a "
        "node). "
        f"An iteration: {work.sequences} sequences of {work.prompt} + {work.response} tokens, at most {work.longest}."
    )


def _models(plan: Plan) -> Table:
    table = Table(
        "role", "parameters", "tp", "pp", "vpp", "dp", "largest share of a rank", "shape from", title="Models"
    )
    for role in plan.roles:
        layout = role.layout
        most = max(memory.numel for rank in plan.ranks for memory in rank.roles if memory.role == role)
        sizes = (str(size) for size in (layout.tp, layout.pp, layout.vpp, layout.dp))
        table.add_row(role.name, f"{role.shape.num_parameters():,}", *sizes, f"{most:,}", role.source)
    return table


def _memory(plan: Plan) -> Table:
    worst = plan.worst
    title = f"Memory of rank {worst.rank}, which has the most, GiB"
    table = Table("role", "phase", *(kind.replace("_", " ") for kind in KINDS), "sum", title=title)
    for memory in worst.roles:
        table.add_row(memory.role.name, "resident", *_gib(memory.resident))
        for phase, extra in memory.extra.items():
            table.add_row("", f"+ {phase}", *_gib(extra))
        table.add_section()
    for phase in worst.phases:
        table.add_row("all", phase, *_gib(worst.peak(phase)))
    return table


def _times(plan: Plan) -> Table:
    columns = ("role", "phase", "seconds", "tp, GB sent by a rank", "pp", "dp", "host", "storage, GB")
    caption = (
        f"An iteration: {plan.seconds:.1f} s, {plan.tokens_per_second:.0f} tokens per second and GPU. "
        "Predicted by docs/planning.md, not measured."
    )
    table = Table(*columns, title="Time and communication", caption=caption)
    for (role, phase), cost in plan.costs.items():
        moved = (cost.tp, cost.pp, cost.dp, cost.host, cost.storage)
        table.add_row(role, phase, f"{cost.seconds:.2f}", *(f"{part / 1e9:.2f}" if part else "" for part in moved))
    return table


def _proposed(found: Sequence[Found]) -> Table:
    table = Table("seconds an iteration", "GiB", "arguments", title="Layouts that fit, fastest first")
    for one in found:
        table.add_row(f"{one.plan.seconds:.1f}", f"{one.plan.worst.total / GIB:.1f}", " ".join(one.overrides()))
    return table


def _gib(part: Bytes) -> list[str]:
    values = [*(getattr(part, kind) for kind in KINDS), part.total]
    return [f"{value / GIB:.2f}" if value else "" for value in values]


def _capacity(plan: Plan) -> int:
    assert plan.capacity is not None
    return plan.capacity
