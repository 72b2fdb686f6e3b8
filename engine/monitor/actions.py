"""From alarms to what happens: events for metrics.jsonl, and a tighter constraint on the policy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ppomax.engine.config import RunConfig
from ppomax.engine.config_monitor import MonitorConfig
from ppomax.engine.data.tokenizer import Tokenizer
from ppomax.engine.errors import CheckpointError
from ppomax.engine.metrics import RunLog
from ppomax.engine.monitor.state import Alarm, MonitorState, action_of, is_number, observe
from ppomax.engine.ppo.types import Rollout

STRENGTH = ("off", "warn", "raise_kl", "rollback", "stop")
"""Of several alarms at once the last of these decides."""


@dataclass(frozen=True)
class Constraint:
    """What the monitor has tightened so far. kl_factor, min_kl_coef: of the weight of the KL penalty. lr_factor: of
    both peak learning rates. num_rollbacks: of the run.
    """

    kl_factor: float = 1.0
    min_kl_coef: float = 0.0
    lr_factor: float = 1.0
    num_rollbacks: int = 0

    @staticmethod
    def from_json(content: Any) -> "Constraint":
        names = {item.name for item in fields(Constraint)}
        if not isinstance(content, dict) or content.keys() != names or not all(map(is_number, content.values())):
            raise CheckpointError(
                f"the constraint of the monitor is damaged: {content!r}, expected numbers {sorted(names)}; take "
                "another step_N folder"
            )
        return Constraint(**content)

    def kl_coef(self, coef: float, config: MonitorConfig) -> float:
        """The weight of the KL penalty; coef: without the monitor."""
        raised = max(coef * self.kl_factor, self.min_kl_coef)
        return max(coef, min(raised, config.max_kl_coef))

    def raised(self, config: MonitorConfig) -> "Constraint":
        """With a larger weight of the KL penalty."""
        floor = max(self.min_kl_coef * config.kl_factor, config.min_kl_coef)
        return replace(self, kl_factor=self.kl_factor * config.kl_factor, min_kl_coef=floor)

    def after_rollback(self, config: MonitorConfig) -> "Constraint":
        """With a lower learning rate too."""
        tighter = self.raised(config)
        return replace(tighter, lr_factor=self.lr_factor * config.lr_factor, num_rollbacks=self.num_rollbacks + 1)


@dataclass(frozen=True)
class Verdict:
    """What one record leads to: the monitor's new state, the action ("off" for none) and what it rests on."""

    state: MonitorState
    action: str
    reason: str


def judge(
    state: MonitorState,
    constraint: Constraint,
    record: Mapping[str, Any],
    config: RunConfig,
    log: RunLog,
    *,
    responses: Mapping[str, Sequence[float]],
    rollout: Rollout,
    tokenizer: Tokenizer,
) -> Verdict:
    """Looks at the record of one iteration of `ppo`, and logs an event for each alarm. The same on every rank.

    record: its metrics, with `step`. responses: numbers of the rollout's responses, as `rollout_statistics` gives them.
    """
    monitor = config.monitor
    state, alarms = observe(state, record, monitor, max_length=config.sampling.max_new_tokens)
    wanted = action = decide(alarms, monitor)
    if wanted == "rollback" and (state.healthy_step is None or constraint.num_rollbacks >= monitor.max_rollbacks):
        action = "stop"  # there is nothing to go back to, or going back has not helped
    for alarm in alarms if log.is_writer else ():
        own = action_of(alarm.detector, monitor)
        taken = action if own == wanted else own
        log.event(make_event(alarm, taken, responses, rollout, tokenizer, monitor.event_samples))
    return Verdict(state, action, "; ".join(alarm.message for alarm in alarms))


def decide(alarms: Sequence[Alarm], config: MonitorConfig) -> str:
    """The strongest action of alarms of one record; "off" for none."""
    return max((action_of(alarm.detector, config) for alarm in alarms), key=STRENGTH.index, default="off")


def make_event(
    alarm: Alarm,
    action: str,
    responses: Mapping[str, Sequence[float]],
    rollout: Rollout,
    tokenizer: Tokenizer,
    num_samples: int,
) -> dict[str, Any]:
    """An event (docs/metrics.md) with the responses that show it best.

    responses: numbers of single responses, as `rollout_statistics` gives them.
    """
    return {
        "step": alarm.step,
        "detector": alarm.detector.name,
        "severity": alarm.detector.severity,
        "message": alarm.message,
        "evidence": alarm.evidence,
        "samples": _samples(alarm, responses, rollout, tokenizer, num_samples),
        "action": action,
    }


def _samples(
    alarm: Alarm,
    responses: Mapping[str, Sequence[float]],
    rollout: Rollout,
    tokenizer: Tokenizer,
    num_samples: int,
) -> list[dict[str, Any]]:
    name = alarm.detector.worst.lstrip("-")
    sign = 1 if alarm.detector.worst.startswith("-") else -1
    order = sorted(range(len(responses[name])), key=lambda b: sign * responses[name][b])[:num_samples]
    samples = []
    for b in order:
        ids = rollout.tokens[b].tolist()
        start, end = int(rollout.prompt_lengths[b]), int(rollout.lengths[b])
        numbers = {key: responses[key][b] for key in ("reward", "response_length", "kl", "nll", "distinct_4")}
        samples.append(
            {
                "index": b,
                "prompt": tokenizer.decode(ids[:start]),
                "response": tokenizer.decode(ids[start:end]),
                "finished": bool(responses["finished"][b]),
                **numbers,
            }
        )
    return samples
