"""metrics.jsonl holds JSON whatever the numbers are."""

import json
import math

from ppomax.engine.config import RunConfig
from ppomax.engine.metrics import RunLog


def test_what_is_not_a_number_is_null(tmp_path):
    config = RunConfig.model_validate({"train": {"output": str(tmp_path / "run")}})
    log = RunLog(config, "sft", is_writer=True, resumed=False)
    log.step(1, 2, {"loss": math.nan, "grad_norm": math.inf, "learning_rate": 0.1})
    (line,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=lambda name: f"not JSON: {name}")
    assert (record["loss"], record["grad_norm"], record["learning_rate"]) == (None, None, 0.1)
