"""The worker pool of the session: `on_ranks(4, function, *args)` runs a function on four ranks."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def pool() -> Any:
    """The class `Pool`, for tests that need one of their own."""
    spec = importlib.util.spec_from_file_location("_by_path_pool", Path(__file__).with_name("pool.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Pool


@pytest.fixture(scope="session")
def on_ranks(pool: Any) -> Iterator[Callable[..., list[Any]]]:
    """`Pool.run`: (num_ranks, function, *args, timeout=...) -> what the function returned on each rank."""
    shared = pool()
    yield shared.run
    shared.close()
