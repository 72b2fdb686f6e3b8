"""`ppomax monitor RUN`: the alarms that the stability monitor would have raised on the records of a run."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ppomax.engine.config_file import load_config
from ppomax.engine.errors import ConfigError, DataError
from ppomax.engine.monitor.state import MonitorState, observe


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="ppomax monitor",
        description="Replays the detectors of [monitor] on the metrics.jsonl of a run of ppo: docs/monitor.md.",
    )
    parser.add_argument("run", help="folder of a run of ppo")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="section.field=value",
        help="other settings than the run's: monitor.limits.kl=0.2",
    )
    arguments = parser.parse_args(argv)
    folder = Path(arguments.run)
    config = load_config(str(folder / "config.toml"), ["monitor.action=warn", *arguments.settings], command="ppo")
    records = read_records(folder / "metrics.jsonl")
    if not records:
        raise ConfigError(f"{folder}: metrics.jsonl has no record of ppo; give the folder of a run of ppo")
    console = Console()
    state, num_alarms = MonitorState(), 0
    before: dict[int, MonitorState] = {}
    for record in records:
        state = before.setdefault(int(record["step"]), state)
        state, alarms = observe(state, record, config.monitor, max_length=config.sampling.max_new_tokens)
        for alarm in alarms:
            console.print(Text(f"step {alarm.step}  {alarm.detector.name}  {alarm.detector.severity}"))
            console.print(Text(f"  {alarm.message}\n  the paper: {alarm.detector.paper}"))
        num_alarms += len(alarms)
    console.print(Text(f"{num_alarms} alarms in {len(records)} records; how far each signal is from its limit now:"))
    for name, phase in state.phases.items():
        console.print(Text(f"  {name:<20}{phase.score:6.2f}"))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of `ppo` in a metrics.jsonl. Raises DataError."""
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # text may hold other separators
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}; give the folder of a run") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break  # a run that was killed while it wrote
            raise DataError(f"{path}, line {number}: not JSON ({error})") from error
        if isinstance(record, dict) and record.get("kind") == "ppo":
            if not isinstance(record.get("step"), int):
                raise DataError(f"{path}, line {number}: a record of ppo without a whole step")
            records.append(record)
    return records
