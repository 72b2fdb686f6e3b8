"""The monitor over the records of a run: baselines, smoothing, confirmation, and which checkpoints are healthy.

`observe` is a pure function of its state, one record and the configuration; the state is part of a checkpoint, so a
resumed run sees what it would have seen without the stop.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ppomax.engine.config_monitor import MonitorConfig
from ppomax.engine.errors import CheckpointError
from ppomax.engine.monitor.detectors import DETECTORS, METRICS_READ, Detector, View

RELEASE = 0.8
"""Of the way to the limit: below it an alarm's signal counts as gone."""
CALM = 2 / 3
"""Of the way to the limit: a checkpoint is healthy if no detector was further in the next record, the first one of its
weights. The plateau of the paper's 10,000-step run lies below it, the rise that ends in collapse above."""


@dataclass(frozen=True)
class Phase:
    """Of one detector. score: of the last record. beyond, below: records in a row beyond the limit, and below RELEASE
    of it. age: records since its alarm, None where there is none or it is over.
    """

    score: float = 0.0
    beyond: int = 0
    below: int = 0
    age: int | None = None


@dataclass(frozen=True)
class MonitorState:
    """What the detectors know after some records.

    num_records: how many. counts, baseline: of each metric, how many records are in the mean of the first ones.
    recent: its last values. best_value_loss: least smoothed value loss. phases: by detector. healthy_step: of the
    newest healthy checkpoint, if there is one. candidate_step: of one whose weights no record has measured yet.
    """

    num_records: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    baseline: dict[str, float] = field(default_factory=dict)
    recent: dict[str, list[float]] = field(default_factory=dict)
    best_value_loss: float | None = None
    phases: dict[str, Phase] = field(default_factory=dict)
    healthy_step: int | None = None
    candidate_step: int | None = None

    @property
    def is_calm(self) -> bool:
        """Whether every signal is far from its limit."""
        return all(phase.score < CALM and phase.age is None for phase in self.phases.values())

    @staticmethod
    def from_json(content: Any) -> "MonitorState":
        if not isinstance(content, dict) or content.keys() != {item.name for item in fields(MonitorState)}:
            raise CheckpointError("the checkpoint's state of the monitor is damaged; take another step_N folder")
        phases = {name: Phase(**phase) for name, phase in content["phases"].items()}
        return MonitorState(**{**content, "phases": phases})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Alarm:
    """One detector's, at one record. evidence: what it saw, by name."""

    detector: Detector
    step: int
    evidence: dict[str, Any]

    @property
    def message(self) -> str:
        """One sentence with the numbers."""
        now, base = self.evidence["now"], self.evidence["baseline"]
        numbers = ", ".join(
            f"{name} {value:.4g}" + (f" (was {base[name]:.4g})" if name in base else "") for name, value in now.items()
        )
        return f"{self.detector.what}: {numbers}"


def observe(
    state: MonitorState, record: Mapping[str, Any], config: MonitorConfig, *, max_length: int
) -> tuple[MonitorState, list[Alarm]]:
    """The state after one more record, and the alarms that it sets off.

    record: a line of metrics.jsonl, with `step`; a metric that is missing or no number is passed over. max_length: the
    most tokens of a response.
    """
    before = state
    last = {name: float(record[name]) for name in METRICS_READ if is_number(record.get(name))}
    state = _remember(state, last, config)
    now = {name: sum(values) / len(values) for name, values in state.recent.items() if name in last}
    best = math.inf if state.best_value_loss is None else state.best_value_loss
    view = View(now, last, state.baseline, best, max_length, config.limits)
    phases, alarms = {}, []
    for detector in DETECTORS:
        if action_of(detector, config) == "off":
            continue
        phase = state.phases.get(detector.name, Phase())
        score = detector.score(view)
        if score is not None:
            confirm = config.confirm if detector.confirm else 1
            # The first records are the baseline themselves; what needs none may speak at once.
            counts = state.num_records > config.baseline or not detector.confirm
            phase, is_alarm = _advance(phase, score if counts else 0.0, confirm, config)
            if is_alarm:
                alarms.append(_alarm(detector, int(record["step"]), score, view))
        phases[detector.name] = phase
    if "value_loss" in now and state.num_records >= config.window:
        best = min(best, now["value_loss"])
    state = replace(state, phases=phases, best_value_loss=None if best == math.inf else best, candidate_step=None)
    # This record is of the weights that the last checkpoint holds.
    if before.candidate_step is not None and state.is_calm:
        state = replace(state, healthy_step=before.candidate_step)
    return state, alarms


def action_of(detector: Detector, config: MonitorConfig) -> str:
    """What monitor.actions, or else monitor.action, says."""
    return getattr(config.actions, detector.name) or config.action


def replay(
    records: Iterable[Mapping[str, Any]], config: MonitorConfig, *, max_length: int
) -> tuple[MonitorState, list[Alarm]]:
    """All records of a run, from its start. Where steps come again the run went back, and the state with it."""
    state, alarms = MonitorState(), []
    before: dict[int, MonitorState] = {}
    for record in records:
        step = int(record["step"])
        state = before.setdefault(step, state)
        state, found = observe(state, record, config, max_length=max_length)
        alarms += found
    return state, alarms


def _remember(state: MonitorState, last: Mapping[str, float], config: MonitorConfig) -> MonitorState:
    counts, baseline, recent = dict(state.counts), dict(state.baseline), dict(state.recent)
    for name, value in last.items():
        recent[name] = [*recent.get(name, []), value][-config.window :]
        count = counts.get(name, 0)
        if count < config.baseline:
            baseline[name] = (baseline.get(name, 0.0) * count + value) / (count + 1)
            counts[name] = count + 1
    return replace(state, num_records=state.num_records + 1, counts=counts, baseline=baseline, recent=recent)


def _advance(phase: Phase, score: float, confirm: int, config: MonitorConfig) -> tuple[Phase, bool]:
    """The phase after one more score, and whether it sets off an alarm."""
    beyond = phase.beyond + 1 if score >= 1 else 0
    below = phase.below + 1 if score < RELEASE else 0
    age = None if phase.age is None else phase.age + 1
    if age is not None and below >= config.confirm:
        age = None
    is_alarm = beyond >= confirm and (age is None or age >= config.patience)
    return Phase(score, beyond, below, 0 if is_alarm else age), is_alarm


def _alarm(detector: Detector, step: int, score: float, view: View) -> Alarm:
    values = view.now if detector.confirm else view.last
    evidence = {
        "score": score,
        "now": {name: values[name] for name in detector.metrics if name in values},
        "baseline": {name: view.baseline[name] for name in detector.metrics if name in view.baseline},
        "paper": detector.paper,
    }
    return Alarm(detector, step, evidence)


def is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)
