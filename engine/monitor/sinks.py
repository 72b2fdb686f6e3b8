"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases; imported only where they are asked for."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from ppomax.engine.config import RunConfig
from ppomax.engine.errors import ConfigError


class Sink(Protocol):
    """Of one run, on its first rank."""

    def record(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl (kind: the stage, "evaluation") or of timing.jsonl ("timing")."""

    def event(self, event: Mapping[str, Any]) -> None:
        """One of the monitor's."""

    def close(self) -> None:
        """The run has ended."""


def open_sinks(config: RunConfig) -> list[Sink]:
    """Those of [monitor]. Raises ConfigError where a package is missing."""
    folder = Path(config.train.output)
    sinks: list[Sink] = []
    if config.monitor.tensorboard:
        sinks.append(TensorBoard(folder))
    if config.monitor.wandb:
        sinks.append(WeightsAndBiases(config, folder))
    return sinks


class TensorBoard:
    """Event files in the run's folder tensorboard/."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"monitor.tensorboard is set, but TensorBoard cannot be imported ({error}); "
                "pip install tensorboard, or set monitor.tensorboard = false"
            ) from error
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def record(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        for name, value in _numbers(values).items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)
        histogram = values.get("reward_histogram")
        if histogram is not None and sum(histogram["counts"]) > 0:
            self._add_histogram(f"{kind}/reward_histogram", histogram["edges"], histogram["counts"], step)
        self._writer.flush()

    def event(self, event: Mapping[str, Any]) -> None:
        # As code: the message is shown as markdown.
        self._writer.add_text(f"event/{event['detector']}", f"`{event['message']} ({event['action']})`", event["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add_histogram(self, name: str, edges: list[float], counts: list[float], step: int) -> None:
        centres = [(low + high) / 2 for low, high in pairwise(edges)]
        self._writer.add_histogram_raw(
            name,
            min=edges[0],
            max=edges[-1],
            num=int(sum(counts)),
            sum=sum(x * n for x, n in zip(centres, counts, strict=True)),
            sum_squares=sum(x * x * n for x, n in zip(centres, counts, strict=True)),
            bucket_limits=edges[1:],
            bucket_counts=counts,
            global_step=step,
        )


class WeightsAndBiases:
    """A run of the project monitor.wandb. The key and the mode (WANDB_MODE=offline needs no network) are the package's
    own business: it reads them from the environment or from its login; we neither take nor keep any.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f'monitor.wandb = "{config.monitor.wandb}", but wandb cannot be imported ({error}); '
                'pip install wandb, or set monitor.wandb = ""'
            ) from error
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=config.monitor.wandb,
            name=folder.name,
            group=folder.name,  # a resumed run is one more of the group
            dir=str(folder),
            config=config.model_dump(mode="json"),
        )
        # Steps come again after a rollback, which wandb's own step cannot do.
        self._run.define_metric("*", step_metric="step")

    def record(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({"step": step, **{f"{kind}/{name}": value for name, value in _numbers(values).items()}})

    def event(self, event: Mapping[str, Any]) -> None:
        self._run.log({"step": event["step"], f"event/{event['detector']}": 1})
        self._run.alert(title=f"{event['detector']} at step {event['step']}", text=event["message"])

    def close(self) -> None:
        self._run.finish()


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(x) for name, x in values.items() if isinstance(x, int | float) and name not in ("step", "kind")}
