"""The command `ppomax`: one subcommand per stage of the paper, and a few tools.

Started alone, or by torchrun (`torchrun -m ppomax.engine.cli ppo CONFIG.toml`), where every rank runs `main`. It checks
the configuration before anything heavy is imported, and turns each error into a message and an exit code.
"""

import argparse
import difflib
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from importlib import metadata
from typing import NoReturn

from ppomax.engine.config_checks import check_paths, roles_in_use
from ppomax.engine.config_file import load_config, to_toml
from ppomax.engine.config_help import describe
from ppomax.engine.errors import (
    ENDED_BY_SIGTERM,
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    DoesNotFitError,
    PeerFailedError,
    PpomaxError,
    RewardError,
    RunStopped,
    ServiceError,
)
from ppomax.engine.parallel.layout import check_layout
from ppomax.engine.stage import stage_function

STAGES = {
    "sft": "supervised fine-tuning on dialogues",
    "reward": "reward model from preference pairs",
    "critic": "critic pre-training with a frozen policy",
    "ppo": "PPO-max",
    "evaluate": "held-out reward, KL, perplexity and sample dialogues of a policy",
}
TOOLS = {
    "generate": "responses of a model to a file of prompts, one JSON row each; also under torchrun",
    "chat": "talk to a model in this terminal",
    "compare": "win / tie / lose of two models by a reward model, a chat endpoint or people (`ppomax compare --help`)",
    "evaluate-reward": "accuracy, calibration, length bias of a reward model on preference pairs; also under torchrun",
    "multiple-choice": "accuracy on multiple-choice questions by log-likelihood (alignment tax); also under torchrun",
    "plan": "memory per GPU and predicted time of a stage, before launch: does it fit, what to change; no GPU needed",
    "doctor": "is this environment ready? versions, GPUs, network, folders; under torchrun all ranks and links",
    "convert": "Hugging Face to Megatron and back, inspect, verify, reshard, weight diffs (`ppomax convert --help`)",
    "quickstart": "all five stages on a small embedded data set",
    "recipe": "all five stages on your data: a folder of configurations in, results and plots out",
    "report": "what runs did, as one HTML file: curves, events, samples, rollouts token by token, configuration",
    "monitor": "which alarms of the stability monitor a run of ppo would set off, with its limits or others",
    "watch": "the report of a run while it grows, in a browser on this machine (127.0.0.1)",
    "prepare-data": "split a preference file, train a tokenizer on it",
    "help": "this text, or `help SECTION`, `help SECTION.FIELD`, `help exit-codes`",
    "version": "versions of ppomax and what it runs on",
}
ERRORS = (
    ConfigError,
    DoesNotFitError,
    DataError,
    CheckpointError,
    DivergedError,
    PeerFailedError,
    ServiceError,
    RewardError,
)
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""
SECONDS_FOR_THE_FIRST_RANK = 5.0
"""How long a silent rank lets the first one of its node say what is wrong. Under torchrun it is stopped before that."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `ppomax ARGV...` and returns its exit code; argv is None for the process's own arguments."""
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except RunStopped as reason:
        sys.stderr.write(_prefixed(f"ppomax: {reason}\n"))
        return 0
    except PpomaxError as error:
        _report(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("ppomax: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        peer = _peer_failure(error)
        if peer is None:
            sys.stderr.write(_prefixed(traceback.format_exc()))
            return 1
        _report(peer)
        return peer.exit_code


def leave(code: int) -> NoReturn:
    """Ends the process. After an error of one of several ranks at once: what belongs to the process group may wait,
    while the interpreter ends, for ranks that never answer.
    """
    if code != 0 and _is_joined():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code == 0:
        # All is done. While the interpreter ends it would die of a request to stop, and torchrun report a failure.
        for signum in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(signum, signal.SIG_IGN)
    sys.exit(code)


def command() -> NoReturn:
    """What `ppomax` runs."""
    leave(main())


def exit_codes() -> str:
    """The table of `ppomax help exit-codes`."""
    rows = [
        (0, "Done, or stopped by SIGTERM or SIGUSR1 after saving a checkpoint (the last line says so)."),
        (1, "Anything unexpected; a traceback says what."),
    ]
    rows += [(error.exit_code, (error.__doc__ or "").strip()) for error in ERRORS]
    rows.append((INTERRUPTED, "Interrupted by Ctrl-C."))
    rows.append((ENDED_BY_SIGTERM, "Ended by SIGTERM before a checkpoint could be saved."))
    note = "torchrun itself ends with 1 when a rank fails; its summary names the rank's own exit code."
    return "\n".join(["Exit codes", *(f"  {code:>3}  {meaning}" for code, meaning in rows), "", note])


def _dispatch(argv: list[str]) -> int:
    """Runs a command; returns the exit code of one that ends without an error."""
    # megatron-core reports at import each optional accelerator that it does without.
    warnings.filterwarnings("ignore", module="megatron")
    command, *rest = argv or ["help"]
    if command in ("-h", "--help"):
        command = "help"
    if command in STAGES:
        _stage(command, rest)
    elif command == "generate":
        from ppomax.tools.generate import main as generate

        generate(rest)
    elif command == "chat":
        from ppomax.tools.chat import main as chat

        chat(rest)
    elif command == "compare":
        from ppomax.tools.compare import main as compare

        compare(rest)
    elif command == "evaluate-reward":
        from ppomax.tools.evaluate_reward import main as evaluate_reward

        evaluate_reward(rest)
    elif command == "multiple-choice":
        from ppomax.tools.multiple_choice import main as multiple_choice

        multiple_choice(rest)
    elif command == "plan":
        from ppomax.tools.plan import main as plan

        plan(rest)
    elif command == "doctor":
        from ppomax.tools.doctor import main as doctor

        return doctor(rest)
    elif command == "convert":
        from ppomax.tools.convert import main as convert

        convert(rest)
    elif command == "quickstart":
        from ppomax.tools.quickstart import main as quickstart

        quickstart(rest)
    elif command == "recipe":
        from ppomax.tools.recipe import main as recipe

        recipe(rest)
    elif command == "report":
        from ppomax.tools.report import main as report

        report(rest)
    elif command == "monitor":
        from ppomax.tools.monitor import main as monitor

        monitor(rest)
    elif command == "watch":
        from ppomax.tools.watch import main as watch

        watch(rest)
    elif command == "prepare-data":
        from ppomax.tools.prepare_data import main as prepare_data

        prepare_data(rest)
    elif command == "help":
        print(_help(rest))
    elif command in ("version", "--version"):
        print(_versions())
    else:
        guess = difflib.get_close_matches(command, [*STAGES, *TOOLS], n=1)
        hint = f"did you mean {guess[0]}?" if guess else f"expected one of {', '.join([*STAGES, *TOOLS])}"
        raise ConfigError(f"{command!r}: no such command; {hint}")
    return 0


def _stage(command: str, argv: list[str]) -> None:
    arguments = _stage_parser(command).parse_intermixed_args(argv)
    paths = [argument for argument in arguments.config if "=" not in argument]
    if len(paths) > 1:
        raise ConfigError(f"{', '.join(paths)}: expected one configuration file and section.field=value arguments")
    overrides = [argument for argument in arguments.config if "=" in argument]
    config = load_config(paths[0] if paths else None, overrides, command=command)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if arguments.world_size is not None:
        if not arguments.dry_run:
            raise ConfigError("--world-size is for --dry-run; a run takes its ranks from torchrun")
        if arguments.world_size < 1:
            raise ConfigError(f"--world-size {arguments.world_size}: expected a number of ranks, 1 or more")
        world_size = arguments.world_size
    check_layout(config, world_size, roles_in_use(config, command))
    check_paths(config, command)
    from ppomax.engine.dry_run import check_inputs, check_memory, check_models

    lines = check_models(config, command)
    if not arguments.dry_run:
        stage_function(command)(config)
    elif _local_rank() == 0:
        lines = check_inputs(config, command) + lines + check_memory(config, command, world_size)
        print(to_toml(config), end="")
        print("\n".join(f"# {line}" for text in lines for line in text.splitlines()))


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are ConfigErrors, so that they leave by the same door as all others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\n{self.format_usage().strip()}")


def _stage_parser(command: str) -> _Parser:
    parser = _Parser(
        prog=f"ppomax {command}",
        usage=f"ppomax {command} [CONFIG.toml] [section.field=value ...] [--dry-run [--world-size N]]",
        description=f"{command}: {STAGES[command]}.",
        epilog=f"Many ranks: torchrun --nproc-per-node N -m ppomax.engine.cli {command} CONFIG.toml ... "
        "Fields: ppomax help SECTION. Exit codes: ppomax help exit-codes.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "config",
        nargs="*",
        metavar="CONFIG.toml | section.field=value",
        help="a TOML file, and values that override it: ppo.lam=0.95 parallel.tp=2 ppo.value_clip=none",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="resolve the configuration, check folders, data files and layout, print it as TOML, and stop",
    )
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="with --dry-run: check the layout for N ranks (default: $WORLD_SIZE, else 1)",
    )
    return parser


def _help(topics: list[str]) -> str:
    topic = topics[0] if topics else None
    if topic == "exit-codes":
        return exit_codes()
    if topic is not None:
        return describe(topic)
    width = max(map(len, [*STAGES, *TOOLS])) + 2
    stages = [f"  {name:<{width}}{text}" for name, text in STAGES.items()]
    tools = [f"  {name:<{width}}{text}" for name, text in TOOLS.items()]
    return "\n".join(
        [
            "ppomax STAGE [CONFIG.toml] [section.field=value ...] [--dry-run [--world-size N]]",
            "torchrun --nproc-per-node N -m ppomax.engine.cli STAGE [CONFIG.toml] [section.field=value ...]",
            "",
            "Stages, in the order of the paper (`ppomax STAGE --help`):",
            *stages,
            "",
            "Other commands:",
            *tools,
            "",
            describe(None),
        ]
    )


def _versions() -> str:
    python = ".".join(map(str, sys.version_info[:3]))
    packages = ("ppomax", "torch", "megatron-core", "transformers", "pydantic")
    return "\n".join([*(f"{package} {metadata.version(package)}" for package in packages), f"python {python}"])


def _peer_failure(error: Exception) -> PeerFailedError | None:
    """What an unexpected error says about another rank, where the ranks are joined."""
    if not _is_joined():
        return None
    from ppomax.engine.parallel.collectives import peer_failure

    return peer_failure(error)


def _is_joined() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _report(error: PpomaxError) -> None:
    """One message on standard error.

    Before the ranks are joined, all of a node meet the same fault of configuration, data or plan: its first rank
    speaks. The others wait, because torchrun stops every rank as soon as one has failed, and would stop the speaker
    too. A rank that lost another waits for the same reason: torchrun is to see first, and name, the one that failed.
    """
    is_common = isinstance(error, ConfigError | DataError | DoesNotFitError)
    is_speaker = _local_rank() == 0 or _is_joined() or not is_common
    if is_speaker:
        sys.stderr.write(_prefixed(f"ppomax: {type(error).__name__}: {error}\n"))
        sys.stderr.flush()
    if not is_speaker or isinstance(error, PeerFailedError):
        time.sleep(SECONDS_FOR_THE_FIRST_RANK)


def _prefixed(text: str) -> str:
    """Every line marked with the rank that wrote it, where there are several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return text
    return "".join(f"[rank {os.environ.get('RANK', '?')}] {line}" for line in text.splitlines(keepends=True))


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


if __name__ == "__main__":
    command()
