"""A service behind HTTP that misbehaves in every way: what is repeated, what is refused, and what never leaks."""

import email.utils
import threading
import time

import pytest

from ppomax.engine.errors import ConfigError, ServiceError
from ppomax.engine.service import RequestRefusedError, Service, ServiceConfig

QUICK = {"first_wait": 0.01, "longest_wait": 2.0, "retries": 3, "timeout_seconds": 5.0}


def post(json_service, **config):
    return Service(ServiceConfig(json_service.url, **(QUICK | config))).post("/chat", {"x": 1})


def answers(*given):
    """One after the other, the last one for ever."""
    return lambda number, body: given[min(number, len(given) - 1)]


@pytest.mark.parametrize(
    "fault",
    [
        (500, {}, b"oops"),
        (502, {}, b"<html>bad gateway</html>"),
        (429, {}, b'{"error": {"message": "slow down"}}'),
        (529, {"Retry-After": "soon"}, b""),
        (200, {}, b"not json"),
        (200, {}, b"[" * 100_000),
        (200, {"Content-Length": "100"}, b"{}"),
    ],
    ids=["500", "502", "429", "529", "no JSON", "deep JSON", "cut short"],
)
def test_a_passing_fault_is_repeated(json_service, fault):
    json_service.answer = answers(fault, fault, {"ok": True})
    assert post(json_service, timeout_seconds=0.5) == {"ok": True}
    assert [body["path"] for body in json_service.bodies] == ["/v1/chat"] * 3


def test_a_connection_that_ends_early_is_repeated(json_service):
    def answer(number, body):
        if number < 2:
            raise ConnectionAbortedError
        return {"ok": True}

    json_service.answer = answer
    assert post(json_service) == {"ok": True}


def test_a_fault_that_stays_ends_after_all_retries(json_service):
    json_service.answer = answers((500, {}, b'{"error": {"message": "no\\u001b[2J luck"}}'))
    with pytest.raises(ServiceError, match=r"4 attempts.*status 500, 'no\\x1b\[2J luck'"):
        post(json_service)
    assert len(json_service.bodies) == 4


@pytest.mark.parametrize("as_date", [False, True], ids=["seconds", "date"])
def test_retry_after_is_waited_for_by_every_thread(json_service, as_date):
    seconds = email.utils.format_datetime(email.utils.localtime().fromtimestamp(time.time() + 2).astimezone())
    json_service.answer = answers((429, {"Retry-After": seconds if as_date else "0.8"}, b""), {"ok": True})
    service = Service(ServiceConfig(json_service.url, **QUICK))
    started = time.monotonic()
    first = threading.Thread(target=service.post, args=("/chat", {}))
    first.start()
    while len(json_service.bodies) < 1:
        time.sleep(0.01)
    time.sleep(0.2)  # the answer has been read
    service.post("/chat", {})
    first.join()
    assert time.monotonic() - started > 0.7
    assert len(json_service.bodies) == 3


def test_a_longer_wait_than_is_allowed_ends_the_run_at_once(json_service):
    json_service.answer = answers((429, {"Retry-After": "3600"}, b""))
    with pytest.raises(ServiceError, match="asks to wait 3600 s"):
        post(json_service)
    assert len(json_service.bodies) == 1


def test_requests_per_minute_spaces_requests(json_service):
    service = Service(ServiceConfig(json_service.url, requests_per_minute=300, **QUICK))
    started = time.monotonic()
    for _ in range(4):
        service.post("/chat", {})
    assert time.monotonic() - started >= 0.6


def test_a_service_that_sends_byte_by_byte_is_given_up(json_service):
    json_service.answer = answers((200, {}, [b" "] * 40))
    started = time.monotonic()
    with pytest.raises(ServiceError, match=r"no answer within 0.35 s"):
        post(json_service, timeout_seconds=0.35, retries=1)
    assert time.monotonic() - started < 2.5


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_is_not_repeated(json_service, status):
    json_service.answer = answers((status, {}, b'{"error": {"message": "content filter"}}'))
    with pytest.raises(RequestRefusedError, match="content filter"):
        post(json_service)
    assert len(json_service.bodies) == 1


@pytest.mark.parametrize("status", [301, 401, 403, 404])
def test_a_refusal_of_everything_ends_the_run(json_service, status, monkeypatch):
    key = "sk-secret-1234567890"
    monkeypatch.setenv("SOME_KEY", key + "\n")
    json_service.answer = answers((status, {"Location": "http://127.0.0.1:1/"}, f"bad key {key}".encode()))
    with pytest.raises(ServiceError) as raised:
        post(json_service, key_variable="SOME_KEY")
    assert json_service.headers[0]["Authorization"] == f"Bearer {key}"
    assert key not in str(raised.value)
    assert "[key]" in str(raised.value)
    assert len(json_service.bodies) == 1


def test_no_key_is_sent_unless_a_variable_is_named(json_service, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    post(json_service)
    assert "Authorization" not in json_service.headers[0]


@pytest.mark.parametrize(
    ("url", "key", "message"),
    [
        ("ftp://host", None, "no base address"),
        ("host/v1", None, "no base address"),
        ("http://host:99999/v1", None, "no base address"),
        ("https://user:sk-secret@host/v1", None, "has a user"),
        ("https://host/v1?key=sk-secret", None, "has a user, a query"),
        ("http://host/v1", "sk-secret", "in the clear"),
        ("https://host/v1", "", "is empty"),
        ("https://host/v1", "sk-secret\nX: y", "holds no key"),
    ],
)
def test_an_unusable_address_or_key_is_named_without_the_key(url, key, message, monkeypatch):
    if key is not None:
        monkeypatch.setenv("SOME_KEY", key)
    with pytest.raises(ConfigError, match=message) as raised:
        Service(ServiceConfig(url, key_variable="" if key is None else "SOME_KEY"))
    assert "sk-secret" not in str(raised.value)


def test_stop_ends_a_waiting_thread(json_service):
    json_service.answer = answers((500, {}, b""))
    service = Service(ServiceConfig(json_service.url, first_wait=60, longest_wait=60))
    faults = []

    def wait():
        try:
            service.post("/chat", {})
        except ServiceError as error:
            faults.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    while not json_service.bodies:
        time.sleep(0.01)
    service.stop()
    thread.join(timeout=5)
    assert not thread.is_alive()
    assert "given up" in faults[0]
