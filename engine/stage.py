"""From the name of a stage to the function that runs it. Importing one brings torch and megatron along."""

from collections.abc import Callable

from ppomax.engine.config import RunConfig


def stage_function(command: str) -> Callable[[RunConfig], None]:
    """`run` of the stage's file; command is "sft", "reward", "critic", "ppo" or "evaluate"."""
    if command == "sft":
        from ppomax.engine.train_sft import run
    elif command == "reward":
        from ppomax.engine.train_reward import run
    elif command == "critic":
        from ppomax.engine.train_critic import run
    elif command == "ppo":
        from ppomax.engine.train_ppo import run
    elif command == "evaluate":
        from ppomax.engine.evaluate import run
    else:
        raise ValueError(f"{command!r} is not a stage")
    return run
