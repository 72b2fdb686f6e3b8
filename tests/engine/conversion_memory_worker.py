"""Run by test_conversion_memory.py as a process of its own: converts a folder there and back, prints peaks of memory.

Prints the largest resident set of this process in MiB: before anything is read, and after each direction.
"""

import sys
from pathlib import Path

from ppomax.engine.compare_models import compare_models
from ppomax.engine.conversion import hf_to_megatron, megatron_to_hf
from ppomax.engine.models.megatron_names import Split
from ppomax.engine.models.stored_model import open_model


def peak() -> float:
    """MiB. File pages that are mapped into this process count."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    root, tp = Path(sys.argv[1]), int(sys.argv[2])
    print(peak())
    hf_to_megatron(str(root / "hf"), str(root / "megatron"), split=Split(tp=tp))
    print(peak())
    megatron_to_hf(str(root / "megatron"), str(root / "back"))
    print(peak())
    assert not any(entry.largest for entry in compare_models(open_model(root / "hf"), open_model(root / "back")))
    print(peak())
