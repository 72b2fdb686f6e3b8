"""The unmodified 7B configuration builds: every rank of its layout, without 7B of memory."""

import json
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).with_name("build_7b_worker.py")
CONFIG = Path(__file__).resolve().parents[2] / "examples" / "configs" / "ppo_max_llama7b.toml"


def test_the_7b_policy_has_llamas_parameters_over_all_its_ranks() -> None:
    result = subprocess.run([sys.executable, str(WORKER), str(CONFIG)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-6000:]
    built = json.loads(result.stdout.splitlines()[-1])
    assert built["layout"] == [4, 2]
    assert built["unique"] == 6_738_415_616
    # Each rank holds an eighth, and the norms that all tp ranks have.
    assert len(built["per_rank"]) == 8
    assert all(6_738_415_616 / 8 <= size < 6_738_415_616 / 8 * 1.001 for size in built["per_rank"])
