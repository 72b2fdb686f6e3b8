"""What a run leaves behind: its folder with the resolved configuration, versions, metrics.jsonl, timing.jsonl, and the
lines on the console. docs/metrics.md has the format and every metric.
"""

import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ppomax.engine.config import RunConfig
from ppomax.engine.config_file import write_config
from ppomax.engine.errors import ConfigError
from ppomax.engine.monitor.live import LiveView
from ppomax.engine.monitor.sinks import Sink, open_sinks
from ppomax.engine.run_records import ROLLBACK, drop_later, goes_on_here, is_same_run, lock_folder

PACKAGES = ("ppomax", "torch", "megatron-core", "transformers", "triton", "flash-attn", "numpy")
CONSOLE = {
    "sft": ("loss", "learning_rate", "grad_norm"),
    "reward": ("loss", "accuracy", "learning_rate", "grad_norm"),
    "critic": ("value_loss", "reward", "explained_variance", "grad_norm"),
    "ppo": ("reward", "kl", "response_length", "perplexity", "policy_loss", "value_loss", "grad_norm"),
}
NEW_FOLDER = "give another folder, or remove this one"


class RunLog:
    """Writes a run's records; only the first rank writes, the others keep quiet."""

    def __init__(
        self, config: RunConfig, command: str, *, is_writer: bool, resumed: bool, resumed_step: int | None = None
    ) -> None:
        """resumed_step: the step of the checkpoint that the run goes on from: later records are moved aside before the
        first new one.
        """
        self.evaluated: dict[int, dict[str, float]] = {}
        self._resumed_step, self._trimmed = resumed_step, set[str]()
        self.folder = Path(config.train.output)
        self.command, self.every, self.is_writer = command, config.train.log_every, is_writer
        self.started = self.last = time.perf_counter()
        self._sinks: list[Sink] = []
        self._live: LiveView | None = None
        if not is_writer:
            return
        records = self.folder / "metrics.jsonl"
        # A run that ended before its first record (a bad row, say) left nothing that could be lost.
        has_records = records.exists() and records.stat().st_size > 0
        if resumed and has_records and not goes_on_here(config, self.folder):
            raise ConfigError(
                f"train.output {self.folder} already holds a run, and train.resume = {config.train.resume!r} is no "
                f"checkpoint of it; {NEW_FOLDER}, or set train.resume=auto to go on with the run that it holds"
            )
        if not resumed and has_records:
            is_finished = (self.folder / "hf").exists()
            if config.train.resume == "auto" and (is_finished or not is_same_run(config, self.folder)):
                why = "is finished" if is_finished else "had another configuration"
                raise ConfigError(
                    f"train.output {self.folder} holds a run without a checkpoint, which {why}; {NEW_FOLDER}"
                )
            self._resumed_step = -1  # killed before its first checkpoint: it starts again
        if not resumed and has_records and config.train.resume != "auto":
            raise ConfigError(f"train.output {self.folder} already holds a run; {NEW_FOLDER}, or set train.resume=auto")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = lock_folder(self.folder)
            write_config(config, self.folder / "config.toml")
            (self.folder / "versions.json").write_text(json.dumps(versions(), indent=1))
            (self.folder / "metrics.jsonl").touch()
        except OSError as error:
            raise ConfigError(f"train.output {self.folder} cannot be written: {error}") from error
        self._sinks = open_sinks(config)
        if config.monitor.live and sys.stdout.isatty():
            self._live = LiveView(command, CONSOLE[command])

    def close(self) -> None:
        """The run has ended."""
        if self._live is not None:
            self._live.close()
        self._live = None
        for sink in self._sinks:
            sink.close()

    def step(self, step: int, num_steps: int, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, and every train.log_every steps one on the console. Steps count from 1."""
        if not self.is_writer:
            return
        now = time.perf_counter()
        record = {"step": step, "seconds": round(now - self.last, 4), **values}
        self.last = now
        self._append({"kind": self.command, **record})
        for sink in self._sinks:
            sink.record(self.command, step, record)
        if self._live is not None:
            self._live.step(step, num_steps, values, record["seconds"])
        elif step % self.every == 0 or step in (1, num_steps):
            shown = "  ".join(f"{name} {values[name]:.4g}" for name in CONSOLE[self.command] if name in values)
            self.say(
                f"{self.command} {step}/{num_steps} {progress_bar(step, num_steps)}  {shown}  {record['seconds']:.2f} s"
            )

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """One held-out evaluation."""
        if not self.is_writer:
            return
        self._append({"kind": "evaluation", "step": step, **values})
        self.evaluated = {step: dict(values)}
        for sink in self._sinks:
            sink.record("evaluation", step, values)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, float | int))
        self.say(f"{self.command} {step} held out: {shown}")

    def event(self, event: Mapping[str, Any]) -> None:
        """What the monitor saw (engine/monitor/events.py), in metrics.jsonl and on the console."""
        if not self.is_writer:
            return
        self._append({"kind": "event", **event})
        text = f"monitor, step {event['step']}: {event['message']} ({event['action']})"
        for sink in self._sinks:
            sink.event(event)
        if self._live is not None:
            self._live.event(text)
        self.say(text)

    def rollback(self, step: int, from_step: int, constraint: Mapping[str, float]) -> None:
        """The run goes on from `step`, under this constraint (engine/monitor/actions.py): a resume reads it."""
        if self.is_writer:
            self._append({"kind": ROLLBACK, "step": step, "from_step": from_step, "constraint": constraint})

    def timing(self, step: int, values: Mapping[str, float]) -> None:
        """One line of timing.jsonl: what depends on the machine, and not only on configuration and seed."""
        if self.is_writer:
            self._append({"kind": self.command, "step": step, **values}, "timing.jsonl")
            for sink in self._sinks:
                sink.record("timing", step, values)

    def write_json(self, name: str, content: Any) -> None:
        if self.is_writer:
            (self.folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False))

    def write_lines(self, name: str, rows: list[dict[str, Any]]) -> None:
        """A jsonl file of its own."""
        if self.is_writer:
            lines = (json.dumps(row, ensure_ascii=False) for row in rows)
            (self.folder / name).write_text("".join(line + "\n" for line in lines))

    def say(self, text: str) -> None:
        if self._live is not None:
            self._live.say(text)
        elif self.is_writer:
            print(text, flush=True)

    def _append(self, record: Mapping[str, Any], name: str = "metrics.jsonl") -> None:
        if self._resumed_step is not None and name not in self._trimmed:
            drop_later(self.folder / name, self._resumed_step)
            self._trimmed.add(name)
        with (self.folder / name).open("a") as file:
            file.write(json.dumps(_finite(record), ensure_ascii=False) + "\n")


def _finite(x: Any) -> Any:
    """x with null for each number that is none: JSON has no NaN."""
    if isinstance(x, Mapping):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def progress_bar(step: int, num_steps: int, width: int = 12) -> str:
    done = round(width * step / max(1, num_steps))
    return "[" + "#" * done + "." * (width - done) + "]"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers."""
    command = re.sub(r"://[^/@\s]+@", "://***@", " ".join(sys.argv[1:]))  # credentials in an address
    found = {"python": platform.python_version(), "platform": platform.platform(), "command": command}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["world_size"] = os.environ.get("WORLD_SIZE", "1")
    return found
