"""Hugging Face folders on four ranks: `hf_layouts_worker.py` holds the checks, this file starts it once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("hf_layouts_worker.py")


@pytest.mark.dist
def test_every_layout_of_four_ranks_computes_and_exports_the_same_model(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    result = subprocess.run(
        [*launch, str(WORKER), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-20000:]
