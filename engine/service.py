"""A JSON service behind HTTP: POST requests with deadlines, bounded retries and rate limits. Standard library only.

What it does not do: follow redirects (a key would go to another host), keep or print the key, wait without end. Many
threads may share one `Service`; what the bodies mean is left to its users.
"""

import contextlib
import email.utils
import http.client
import json
import math
import os
import random
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any

from ppomax.engine.errors import ConfigError, ServiceError

LARGEST_ANSWER = 16 * 2**20
"""Bytes of one answer; more is a fault of the service."""
RETRIED = (408, 425, 429, 500, 502, 503, 504, 529)
"""HTTP statuses after which the same request may succeed (529: overloaded, of some vendors)."""
BUSY = (429, 503, 529)
"""Those after which all requests wait, not only the one that met it."""
REFUSED = (400, 413, 422)
"""Statuses that are about this one request: too long, filtered, not understood."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class ServiceConfig:
    """url: base address, without query. key_variable: environment variable that holds the key; empty: none is sent.

    timeout_seconds: of one attempt from connecting to the last byte. retries: attempts after the first one.
    requests_per_minute: 0 is no limit. first_wait, longest_wait: seconds between attempts, doubling from the one to the
    other; a service that asks for longer than longest_wait ends the run.
    """

    url: str
    key_variable: str = ""
    timeout_seconds: float = 120.0
    retries: int = 6
    requests_per_minute: float = 0.0
    first_wait: float = 1.0
    longest_wait: float = 120.0


class RequestRefusedError(Exception):
    """The service answered, and will not answer this one request; its others may be fine. status: of HTTP."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class _Fault:
    """Why an attempt failed that may be repeated. wait: seconds that the service asks for."""

    text: str
    wait: float | None = None
    is_busy: bool = False


class Service:
    """Sends requests to one base address. `stop` ends all waiting, in every thread."""

    def __init__(self, config: ServiceConfig) -> None:
        """Raises ConfigError for an address or a key that cannot be used. Opens no connection."""
        self.config = config
        self._url = _checked_url(config.url)
        self._key = _read_key(config.key_variable, self._url)
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._next_slot = self._held_until = 0.0
        self._jitter = random.Random(0)
        self._open: set[http.client.HTTPConnection] = set()

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON that answers a JSON body.

        Raises RequestRefusedError where the service will not answer this body, ServiceError where it refuses all (a
        wrong key or address), does not answer in time after all retries, asks for too long a wait, or after `stop`.
        """
        data = json.dumps(body).encode()
        fault = _Fault("")
        for attempt in range(self.config.retries + 1):
            self._wait_for_slot()
            answer = self._attempt(path, data)
            if not isinstance(answer, _Fault):
                return answer.value
            fault = answer
            if attempt < self.config.retries:
                self._back_off(attempt, fault)
        raise ServiceError(
            f"{self.config.url} did not answer in {self.config.retries + 1} attempts; the last one: {fault.text}"
        )

    def stop(self) -> None:
        """Ends all waiting, for a turn and for answers; requests that are under way fail."""
        self._stopping.set()
        for connection in list(self._open):
            _hang_up(connection)

    def _wait_for_slot(self) -> None:
        """Waits for the rate limit, and while the service has asked for a pause."""
        with self._lock:
            slot = max(time.monotonic(), self._next_slot)
            if self.config.requests_per_minute > 0:
                self._next_slot = slot + 60 / self.config.requests_per_minute
        while (pause := max(slot, self._held_until) - time.monotonic()) > 0:
            self._sleep(pause)
        self._sleep(0)

    def _back_off(self, attempt: int, fault: _Fault) -> None:
        """Waits after a failed attempt as long as the service asks for, else twice as long as after the one before."""
        longest = self.config.longest_wait
        wait = fault.wait
        if wait is None:
            with self._lock:
                wait = min(longest, self.config.first_wait * 2**attempt) * self._jitter.uniform(0.5, 1)
        if wait > longest:
            raise ServiceError(
                f"{self.config.url} asks to wait {wait:.0f} s ({fault.text}), longer than the {longest:.0f} s that a "
                "request may wait; start again after that time"
            )
        if fault.is_busy:
            with self._lock:
                self._held_until = max(self._held_until, time.monotonic() + wait)
        self._sleep(wait)

    def _sleep(self, seconds: float) -> None:
        if self._stopping.wait(seconds):
            raise ServiceError(f"{self.config.url}: the run ends, a waiting request is given up")

    def _attempt(self, path: str, data: bytes) -> "_Answer | _Fault":
        try:
            status, headers, content = self._send(path, data)
        except ssl.SSLCertVerificationError as error:
            raise ServiceError(f"{self.config.url}: its certificate is not valid: {error.verify_message}") from None
        except TimeoutError:
            return _Fault(f"no answer within {self.config.timeout_seconds:g} s")
        except (OSError, http.client.HTTPException) as error:
            return _Fault(f"{type(error).__name__}: {self._shown(str(error))}")
        if status == 200:
            try:
                return _Answer(json.loads(content))
            except (ValueError, RecursionError):
                return _Fault("status 200 with a body that is not JSON")
        text = f"status {status}{self._reason(content)}"
        if status in RETRIED:
            return _Fault(text, wait=_retry_after(headers.get("Retry-After")), is_busy=status in BUSY)
        if status in REFUSED:
            raise RequestRefusedError(status, text)
        if 300 <= status < 400:
            raise ServiceError(f"{self.config.url} redirects ({text}), which is not followed; give the final address")
        raise ServiceError(f"{self.config.url} refuses all requests: {text}; check address, key and name of the model")

    def _send(self, path: str, data: bytes) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Status, headers and body of one exchange. Raises TimeoutError where it takes too long in all."""
        deadline = time.monotonic() + self.config.timeout_seconds
        connection, target = self._connection(self._url.path.rstrip("/") + path)
        is_late = threading.Event()

        def give_up() -> None:
            # A socket's own time-out starts anew with every byte, so a slow service could hold a request for ever.
            is_late.set()
            _hang_up(connection)

        timer = threading.Timer(self.config.timeout_seconds, give_up)
        timer.daemon = True
        timer.start()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._open.add(connection)
        try:
            connection.request("POST", target, data, headers)
            response = connection.getresponse()
            content = response.read(LARGEST_ANSWER + 1)
        except (OSError, http.client.HTTPException) as error:
            raise TimeoutError if is_late.is_set() or time.monotonic() > deadline else error from None
        finally:
            timer.cancel()
            self._open.discard(connection)
            connection.close()
        if is_late.is_set():
            raise TimeoutError
        if len(content) > LARGEST_ANSWER:
            raise http.client.HTTPException(f"an answer of more than {LARGEST_ANSWER} bytes")
        return response.status, response.headers, content

    def _connection(self, path: str) -> tuple[http.client.HTTPConnection, str]:
        """A connection, through the proxy that the environment names, and what to ask for on it."""
        host, port = self._url.hostname or "", self._url.port
        is_https = self._url.scheme == "https"
        kind = http.client.HTTPSConnection if is_https else http.client.HTTPConnection
        timeout = self.config.timeout_seconds
        proxy = None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(self._url.scheme)
        if proxy is None:
            return kind(host, port, timeout=timeout), path
        via = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
        connection = kind(via.hostname or "", via.port or 80, timeout=timeout)
        if is_https:
            connection.set_tunnel(host, port)
            return connection, path
        return connection, f"http://{self._url.netloc}{path}"

    def _reason(self, content: bytes) -> str:
        """What an answer with an error status says, shortened."""
        try:
            value = json.loads(content)
            error = value.get("error", value) if isinstance(value, dict) else value
            text = error.get("message", error) if isinstance(error, dict) else error
        except (ValueError, RecursionError):
            text = content[:300].decode("utf-8", "replace")
        return f", {self._shown(str(text))}" if text else ""

    def _shown(self, text: str) -> str:
        """Text of a stranger for a message: short, without the key, in printable ASCII."""
        if self._key:
            text = text.replace(self._key, "[key]")
        return ascii(text[:200])


@dataclass(frozen=True)
class _Answer:
    value: Any


def _hang_up(connection: http.client.HTTPConnection) -> None:
    """Makes a thread that waits on this connection fail."""
    if connection.sock is not None:
        with contextlib.suppress(OSError):
            connection.sock.shutdown(socket.SHUT_RDWR)


def _checked_url(url: str) -> urllib.parse.SplitResult:
    try:
        parts = urllib.parse.urlsplit(url)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_good = False
    if not is_good or not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(f"{url!r} is no base address; expected http://HOST[:PORT]/PATH or https://...")
    if parts.query or parts.fragment or parts.username is not None:
        # Not shown: such a part often is a secret.
        raise ConfigError("the base address has a user, a query or a fragment; expected http[s]://HOST[:PORT]/PATH")
    return parts


def _read_key(variable: str, url: urllib.parse.SplitResult) -> str:
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"the environment variable {variable} is empty; set it to the key of {url.hostname}")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(f"the environment variable {variable} holds no key: expected printable ASCII without spaces")
    if url.scheme == "http" and url.hostname not in LOOPBACK:
        raise ConfigError(f"a key would go to {url.hostname} in the clear; use https, or name no variable for a key")
    return key


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date; None where it cannot be read."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
