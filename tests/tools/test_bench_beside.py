"""Peers beside ours: each part's results become ratios, and a run of the losses leaves a report."""

import json
from pathlib import Path
from typing import Any

import pytest

from ppomax.tools.bench_beside import PARTS, Ratio, main

RESULTS: dict[str, tuple[dict[str, Any], list[Ratio]]] = {
    "ppo": ({"results": [{"case": "eos", "trl / ours": 3.5}]}, [Ratio("ppo", "iteration, case eos", "TRL", 3.5)]),
    "rollout": (
        {
            "rows": [
                {"model": "1 M", "threads": 2, "what": "ours", "time / ours": 1.0},
                {"model": "1 M", "threads": 2, "what": "transformers generate", "time / ours": 2.5},
                {"model": "1 M", "threads": 2, "what": "milliseconds of a step of 32 requests"},
            ]
        },
        [Ratio("rollout", "1 M, 2 threads", "transformers generate", 2.5)],
    ),
    "losses": (
        {
            "rows": [
                {"op": "gae", "case": "4 x 8", "part": "forward", "version": "ours", "ratio": 1.0},
                {"op": "gae", "case": "4 x 8", "part": "forward", "version": "eager", "ratio": 2.0},
                {"op": "gae", "case": "4 x 8", "part": "forward", "version": "Liger", "ratio": None},
            ]
        },
        [Ratio("losses", "gae 4 x 8, forward", "eager", 2.0)],
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_results_of_a_part_become_ratios(part: str) -> None:
    content, expected = RESULTS[part]
    assert list(PARTS[part].ratios(content)) == expected


def test_without_a_python_for_trl_nothing_is_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--only", "ppo", "--output", str(tmp_path)])
    assert "left out" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["ratios"] == []


@pytest.mark.slow
def test_losses_run_beside_eager_and_compiled_ones(tmp_path: Path) -> None:
    main(["--only", "losses", "--output", str(tmp_path)])
    ratios = json.loads((tmp_path / "results.json").read_text())["ratios"]
    assert {"eager", "torch.compile"} <= {one["peer"] for one in ratios}
    assert all(one["ratio"] > 0 for one in ratios)
    assert (tmp_path / "losses" / "README.md").exists()
