"""The unmodified 7B configuration builds: every rank of its layout, without 7B of memory."""

import json
import subprocess
import sys
from pathlib import Path

from ppomax.engine.parallel.layout import ParallelLayout
from ppomax.engine.plan.models import MODELS
from ppomax.engine.plan.weights import num_parameters, stage_parameters

WORKER = Path(__file__).with_name("build_7b_worker.py")
CONFIG = Path(__file__).resolve().parents[2] / "examples" / "configs" / "ppo_max_llama7b.toml"


def test_the_7b_policy_has_llamas_parameters_over_all_its_ranks() -> None:
    result = subprocess.run([sys.executable, str(WORKER), str(CONFIG)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-6000:]
    built = json.loads(result.stdout.splitlines()[-1])
    assert built["layout"] == [4, 2]
    assert built["unique"] == 6_738_415_616
    # Each rank holds an eighth, and the norms that all tp ranks have.
    assert built["per_rank"] == [842_399_744] * 4 + [842_403_840] * 4
    layout = ParallelLayout(tp=4, pp=2, dp=1)
    planned = [
        num_parameters(stage_parameters(MODELS["llama-7b"], layout, layout.coordinates(rank)[1])) for rank in range(8)
    ]
    assert planned == built["per_rank"]
