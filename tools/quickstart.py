"""`ppomax quickstart`: the whole recipe on the embedded data set, in a few minutes on a laptop's CPU (or on the GPU if
there is one).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ppomax.engine.errors import ConfigError
from ppomax.tools.quickstart_gold import follows_rule
from ppomax.tools.recipe import run_recipe

CONFIGS = Path("examples/configs/quickstart")


def main(argv: Sequence[str]) -> None:
    """`ppomax quickstart [--output FOLDER] [section.field=value ...]`, from the root of the repository."""
    parser = argparse.ArgumentParser(prog="ppomax quickstart", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="default: runs/quickstart")
    parser.add_argument("overrides", nargs="*", help="section.field=value, applied to every stage")
    arguments = parser.parse_args(argv)
    if not CONFIGS.is_dir():
        raise ConfigError(f"{CONFIGS} is not here; run `ppomax quickstart` from the root of a clone of the repository")
    run_recipe(CONFIGS, arguments.output, overrides=arguments.overrides, gold=follows_rule)
