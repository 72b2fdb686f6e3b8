#!/usr/bin/env bash
""":" # To bash this line is the no-op `:`; to Python it opens the docstring that the last line of the bash part closes.
PATH="$PATH:$(dirname "$0")/../.venv/bin" exec torchrun --standalone --nproc-per-node="${GPUS_PER_NODE:-8}" "$0" "$@"
":"""
# PPO-max at 7B. See examples/README.md.
import sys
from pathlib import Path

from ppomax.engine.cli import leave, main

if __name__ == "__main__":
    config = Path(__file__).parent / "configs" / "ppo_max_llama7b.toml"
    leave(main(["ppo", str(config), *sys.argv[1:]]))
