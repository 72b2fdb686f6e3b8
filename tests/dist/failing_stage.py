"""Run by torchrun: `ppomax ARGUMENTS`, in which one rank dies, raises, stops or sleeps in a phase of the first PPO
iteration.

failing_stage.py PHASE KIND RANK FILE ARGUMENTS...; the time of the failure goes into FILE.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

PLACES = {
    "load": ("models.roles", "load_weights"),
    "rollout": ("rollout.generate", "_run"),
    "scoring": ("ppo.scoring", "sequence_scores"),
    "experience": ("ppo.experience", "token_experience"),
    "policy_update": ("ppo.losses", "PolicyObjective.__call__"),
    "critic_update": ("ppo.losses", "ValueObjective.__call__"),
    "checkpoint": ("checkpoint", "_sharded_state"),
    "copy": ("checkpoint_saver", "plan_role"),
    "write": ("checkpoint_writers", "write_chunks"),  # of a process that writes for itself
    "pointer": ("checkpoint_folders", "point_to"),  # the folder has its name, `latest` is still the one before
    "export": ("session", "save_hf"),
}


def main() -> None:
    phase, kind, rank, file, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    if os.environ["RANK"] == rank:
        module, name = PLACES[phase]
        owner = import_module(f"ppomax.engine.{module}")
        *parents, name = name.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, failure(kind, Path(file)))
    cli = import_module("ppomax.engine.cli")
    cli.leave(cli.main(arguments))


def failure(kind: str, file: Path) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> None:
        file.write_text(str(time.time()))
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if kind == "sleep":
            time.sleep(3600)
        raise OSError("the test's own failure")

    return fail


if __name__ == "__main__":
    main()
