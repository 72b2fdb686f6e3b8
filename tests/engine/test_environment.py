"""Ranks that would not compute the same are named before the first collective; a missing one is, too."""

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from ppomax.engine.config import RunConfig
from ppomax.engine.errors import ConfigError, PeerFailedError
from ppomax.engine.parallel import environment
from ppomax.engine.parallel.environment import (
    check_same_everywhere,
    differences,
    keep_to_this_host,
    settings,
    source_digest,
    tell_first,
    versions,
)


def compare(
    facts: list[dict[str, str] | None], seconds: float = 20, store: dist.Store | None = None
) -> list[Exception | None]:
    """What each rank that takes part ends with; None in `facts` is a rank that never comes."""
    store = store or dist.HashStore()

    def of_rank(rank: int) -> Exception | None:
        told = facts[rank]
        assert told is not None
        try:
            check_same_everywhere(store, rank, len(facts), told, seconds)
        except Exception as error:
            return error
        return None

    with ThreadPoolExecutor(len(facts)) as pool:
        return list(pool.map(of_rank, [rank for rank, told in enumerate(facts) if told is not None]))


def test_equal_ranks_go_on() -> None:
    assert compare([versions()] * 3) == [None] * 3


def test_ranks_that_are_started_again_hear_nothing_of_those_before_them() -> None:
    """torchrun keeps the store when it starts the ranks of a run again; the first one is the last to come back."""
    store = dist.HashStore()
    assert compare([{"x": "1"}] * 2, store=store) == [None] * 2
    assert all(isinstance(error, ConfigError) for error in compare([{"x": "1"}, {"x": "2"}], store=store))
    ours: list[dist.Store] = []
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            second = pool.submit(check_same_everywhere, store, 1, 2, {"x": "3"}, 20)
            time.sleep(0.3)
            assert not second.done()
            first = pool.submit(check_same_everywhere, store, 0, 2, {"x": "3"}, 20)
            first.result().set("address", "here")
            assert second.result().get("address") == b"here"
            ours.append(second.result())
    ours[0].set("address", "of the first attempt")
    assert ours[1].get("address") == b"here"


def test_every_rank_hears_what_differs_and_where() -> None:
    errors = compare([{"torch": "2.13.0", "train.seed": "1"}] * 2 + [{"torch": "2.12.0", "train.seed": "1"}])
    host = socket.gethostname()
    for error in errors:
        assert isinstance(error, ConfigError)
        assert f"torch: 2.13.0 on ranks 0-1 ({host}); 2.12.0 on rank 2 ({host})" in str(error)
        assert "train.seed" not in str(error)


def test_a_rank_that_does_not_come_is_named_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "SLACK_SECONDS", 2.0)
    errors = compare([{"a": "1"}, {"a": "1"}, None, None, {"a": "1"}], seconds=0.5)
    assert [type(error) for error in errors] == [PeerFailedError] * 3
    assert all("ranks 2-3 did not start within 0.5 s" in str(error) for error in errors)


def test_without_the_first_rank_the_others_do_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "SLACK_SECONDS", 0.2)
    (error,) = compare([None, {"a": "1"}], seconds=0.2)
    assert isinstance(error, PeerFailedError)
    assert "rank 0" in str(error)


def test_a_fact_that_one_rank_lacks_differs() -> None:
    assert differences([{"a": "1"}, {}], ["x", "y"]) == ["a: 1 on rank 0 (x); unknown on rank 1 (y)"]


def test_the_first_rank_hears_what_others_tell_and_none_for_the_rest() -> None:
    store = dist.HashStore()
    assert tell_first(store, "topic", 2, 3, {"here": 2}, 1) is None
    assert tell_first(store, "topic", 0, 3, "first", 0.2) == ["first", None, {"here": 2}]


def test_settings_name_every_field() -> None:
    config = RunConfig()
    found = settings(config)
    assert found["train.seed"] == "42"
    assert len(found) == sum(len(type(getattr(config, name)).model_fields) for name in RunConfig.model_fields)


def test_the_digest_changes_with_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    for folder in ("engine/parallel", "kernels"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "engine/parallel/environment.py"))
    source = tmp_path / "kernels" / "op.py"
    source.write_text("a")
    before = source_digest()
    (tmp_path / "kernels" / "notes.txt").write_text("not code")
    assert source_digest() == before
    source.write_text("b")
    assert source_digest() != before


@pytest.fixture
def no_interfaces(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that what the function sets is undone after the test
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_run_of_one_host_listens_on_loopback(no_interfaces: pytest.MonkeyPatch) -> None:
    no_interfaces.setenv("WORLD_SIZE", "4")
    no_interfaces.setenv("LOCAL_WORLD_SIZE", "4")
    keep_to_this_host()
    assert os.environ["GLOO_SOCKET_IFNAME"] == environment.loopback()
    assert os.environ["NCCL_SOCKET_IFNAME"] == f"={environment.loopback()}"


def test_what_the_user_has_set_stays(no_interfaces: pytest.MonkeyPatch) -> None:
    no_interfaces.setenv("GLOO_SOCKET_IFNAME", "eth7")
    keep_to_this_host()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


@pytest.mark.parametrize(("name_of_host", "expected"), [("127.0.1.1", "eth0"), ("10.0.0.5", None)])
def test_on_many_hosts_gloo_leaves_loopback(
    no_interfaces: pytest.MonkeyPatch, name_of_host: str, expected: str | None
) -> None:
    no_interfaces.setenv("WORLD_SIZE", "4")
    no_interfaces.setenv("LOCAL_WORLD_SIZE", "2")
    no_interfaces.setattr(environment, "gloo_address", lambda: name_of_host)
    no_interfaces.setattr(environment, "route_to", lambda address: ("eth0", "10.0.0.5"))
    keep_to_this_host()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == expected
    assert "NCCL_SOCKET_IFNAME" not in os.environ
