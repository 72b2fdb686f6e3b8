"""Hugging Face folders on four ranks: `hf_layouts_worker.py` holds the checks, this file runs it on the pool."""

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("hf_layouts_worker.py")


def run_worker(folder: Path) -> None:
    runpy.run_path(str(WORKER))["main"](folder)


@pytest.mark.dist
def test_every_layout_of_four_ranks_computes_and_exports_the_same_model(
    on_ranks: Callable[..., list[None]], tmp_path: Path
) -> None:
    on_ranks(4, run_worker, tmp_path)
