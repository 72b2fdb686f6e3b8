"""The sinks with the packages themselves, where they are installed: what their own readers find in what was written.

test_sinks.py has what reaches them, with objects in their place.
"""

import json
import struct
from pathlib import Path

import pytest

from ppomax.engine.config import RunConfig
from ppomax.engine.metrics import RunLog

VALUES = {
    **{"reward": 1.5, "kl": float("nan"), "optimizer_steps": 4},
    "reward_histogram": {"edges": [0.0, 1.0, 2.0], "counts": [3.0, 1.0]},
}
EVENT = {
    **{"step": 2, "detector": "kl_runaway", "severity": "critical", "message": "away from <b>it</b>"},
    **{"evidence": {}, "samples": [], "action": "rollback"},
}


def logged(output: Path, **monitor: object) -> None:
    """Two steps, a rollback to the first one, and the second one again."""
    config = RunConfig.model_validate({"train": {"output": str(output)}, "monitor": monitor})
    log = RunLog(config, "ppo", is_writer=True, resumed=False)
    log.step(1, 2, VALUES)
    log.step(2, 2, {"reward": 2.0})
    log.event(EVENT)
    log.rollback(1, 2, {"kl_factor": 2.0})
    log.step(2, 2, {"reward": 3.0})
    log.timing(2, {"rollout_seconds": 0.5})
    log.evaluation(2, {"reward": 2.5})
    log.close()


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logged(tmp_path / "run", tensorboard=True)
    found = reader.EventAccumulator(str(tmp_path / "run/tensorboard"))
    found.Reload()
    scalars = {name: [(x.step, x.value) for x in found.Scalars(name)] for name in found.Tags()["scalars"]}
    assert scalars["ppo/reward"] == [(1, 1.5), (2, 2.0), (2, 3.0)]  # both ways through a step that came again
    assert scalars["ppo/optimizer_steps"] == [(1, 4.0)]
    ((step, kl),) = scalars["ppo/kl"]
    assert step == 1
    assert kl != kl  # not a number
    assert scalars["timing/rollout_seconds"] == [(2, 0.5)]
    assert scalars["evaluation/reward"] == [(2, 2.5)]
    (histogram,) = found.Histograms("ppo/reward_histogram")
    value = histogram.histogram_value
    assert (value.num, value.sum, list(value.bucket_limit), list(value.bucket)) == (4, 3.0, [1.0, 2.0], [3.0, 1.0])
    (text,) = found.Tensors("event/kl_runaway/text_summary")
    assert text.step == 2
    assert text.tensor_proto.string_val[0].decode() == "`away from <b>it</b> (rollback)`"


def wandb_records(path: Path) -> list[bytes]:
    """Of a file of an offline run: seven bytes, then the log format of LevelDB, whose checksums are not looked at."""
    content, block = path.read_bytes(), 32768
    assert content.startswith(b":W&B")
    found, position, parts = [], 7, b""
    while position + 7 <= len(content):
        if block - position % block < 7:  # no room for another header
            position += block - position % block
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(parts)
            parts = b""
    return found


def test_weights_and_biases_keeps_what_was_written_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged(tmp_path / "run", wandb="my-project")
    wandb.teardown()  # as at the end of a process: its own one writes the rest
    (path,) = (tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb")
    rows, runs, alerts = [], [], []
    for data in wandb_records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = {".".join(x.nested_key) or x.key: json.loads(x.value_json) for x in record.history.item}
            rows.append({name: value for name, value in items.items() if not name.startswith("_")})
        runs += [record.run] if record.HasField("run") else []
        alerts += [record.alert] if record.HasField("alert") else []
    assert runs[0].project == "my-project"
    assert runs[0].display_name == "run"
    assert rows[0]["step"] == 1
    assert rows[0]["ppo/reward"] == 1.5
    assert rows[0]["ppo/kl"] != rows[0]["ppo/kl"]
    assert [(row["step"], row["ppo/reward"]) for row in rows if "ppo/reward" in row] == [(1, 1.5), (2, 2.0), (2, 3.0)]
    assert {"step": 2, "event/kl_runaway": 1} in rows
    assert {"step": 2, "timing/rollout_seconds": 0.5} in rows
    assert {"step": 2, "evaluation/reward": 2.5} in rows
    assert [(alert.title, alert.text) for alert in alerts] == [("kl_runaway at step 2", "away from <b>it</b>")]
