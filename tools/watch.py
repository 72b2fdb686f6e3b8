"""`ppomax watch RUN [RUN ...]`: the report of a run while it grows, in a browser on this machine.

The server listens on 127.0.0.1 and only reads. Any page that a browser has open can send requests to this address, so
none is answered unless it names this server in its Host header (a foreign name that was made to resolve to 127.0.0.1 is
refused), and answers are marked as not for other sites. Paths of requests never become paths of files.
"""

import argparse
import hashlib
import json
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ppomax.engine.errors import ConfigError, DataError
from ppomax.tools.report_data import report_data, rollout_tree
from ppomax.tools.report_page import policy, render_page, safe_json
from ppomax.tools.run_folder import Run, open_run, read_records, rollout_files, sample_files

ADDRESS = "127.0.0.1"
PORT = 8137
LARGEST_PORT = 65535
WRITTEN_WHOLE = ("config.toml", "versions.json", "plan.json")
PAUSE = 10
"""News are put together at most in one part of PAUSE of the time: a run of 10,000 steps takes seconds."""
SECONDS_FOR_A_REQUEST = 30.0


def main(argv: Sequence[str]) -> None:
    """`ppomax watch RUN [RUN ...] [--port N]`."""
    parser = argparse.ArgumentParser(prog="ppomax watch", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="train.output of a stage")
    parser.add_argument("--port", type=int, default=PORT, help=f"of {ADDRESS} (default {PORT}; 0: any free one)")
    arguments = parser.parse_args(argv)
    server = open_server(arguments.runs, arguments.port)
    print(f"watching {', '.join(map(str, arguments.runs))} at http://{ADDRESS}:{server.server_port}/", flush=True)
    print("Ctrl-C ends this, and not the run", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    finally:
        server.server_close()


def open_server(folders: Sequence[Path], port: int) -> ThreadingHTTPServer:
    """Raises DataError where a folder is missing, ConfigError where the port cannot be had."""
    if not 0 <= port <= LARGEST_PORT:
        raise ConfigError(f"--port {port}: expected 0 to {LARGEST_PORT}")
    watched = Watched([open_run(folder) for folder in folders])

    class Handler(_Handler):
        runs = watched

    try:
        return _Server((ADDRESS, port), Handler)
    except OSError as error:
        raise ConfigError(
            f"--port {port} of {ADDRESS}: {error.strerror}; name another one, or 0 for any free one"
        ) from None


class Watched:
    """Runs, and the last data that were put together of them; for many threads."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self._lock = threading.Lock()
        self._version = ""
        self._answer = b""
        self._next_time = 0.0

    def data(self, seen: str) -> bytes | None:
        """JSON {version, data}; None where `seen` is the newest version that there is."""
        with self._lock:
            started = time.monotonic()
            if started >= self._next_time:
                for run in self.runs:
                    read_records(run)
                version = hashlib.sha256(repr([_state(run) for run in self.runs]).encode()).hexdigest()
                if version != self._version:
                    tree = {"version": version, "data": report_data(self.runs, with_rollouts=False)}
                    self._version, self._answer = version, safe_json(tree).encode()
                    took = time.monotonic() - started
                    self._next_time = time.monotonic() + (PAUSE - 1) * took
            return None if seen == self._version else self._answer

    def rollouts(self, run: int, step: int) -> bytes:
        """JSON {rows} of one file. Raises DataError where there is none."""
        files = rollout_files(self.runs[run].folder) if run < len(self.runs) else {}
        if step not in files:
            raise DataError(f"run {run} has no rollouts of step {step}")
        return safe_json({"rows": rollout_tree(files[step])}).encode()


def _state(run: Run) -> list[Any]:
    """Changes when anything that is shown of the run does."""
    files = [*sample_files(run.folder).values(), *(run.folder / name for name in WRITTEN_WHOLE)]
    stamps = []
    for path in files:
        try:
            status = path.stat()
            stamps.append((path.name, status.st_mtime_ns, status.st_size))
        except OSError:
            continue
    places = [(one.inode, one.position, one.tail) for one in (run.metrics, run.timing)]
    return [places, stamps, list(rollout_files(run.folder))]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # A client that keeps its connection does not hold up the end.
    block_on_close = False


class _Handler(BaseHTTPRequestHandler):
    """GET of /, /data.json and /rollouts.json."""

    runs: Watched
    timeout = SECONDS_FOR_A_REQUEST
    server: _Server

    def do_GET(self) -> None:
        own = [f"{name}:{self.server.server_port}" for name in (ADDRESS, "localhost")]
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or hosts[0].lower() not in own:
            self._answer(HTTPStatus.FORBIDDEN, b"this server answers to 127.0.0.1 and localhost only", "text/plain")
            return
        address = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(address.query, max_num_fields=8).items()}
        try:
            if address.path == "/":
                self._answer(HTTPStatus.OK, render_page(None).encode(), "text/html")
            elif address.path == "/data.json":
                data = self.runs.data(query.get("seen", ""))
                self._answer(HTTPStatus.OK if data else HTTPStatus.NO_CONTENT, data or b"", "application/json")
            elif address.path == "/rollouts.json":
                rows = self.runs.rollouts(_whole(query.get("run", "")), _whole(query.get("step", "")))
                self._answer(HTTPStatus.OK, rows, "application/json")
            else:
                self._answer(HTTPStatus.NOT_FOUND, b"nothing here", "text/plain")
        except DataError as error:
            self._answer(HTTPStatus.NOT_FOUND, json.dumps({"error": str(error)}).encode(), "application/json")

    def _answer(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", f"{policy(live=True)}; frame-ancestors 'none'")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        try:
            self.wfile.write(content)
        except OSError:
            self.close_connection = True  # the page was closed meanwhile

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are not news."""


def _whole(text: str) -> int:
    """Raises DataError for what is no whole number."""
    if not (text.isascii() and text.isdecimal() and len(text) <= 12):
        raise DataError(f"{text[:40]!r}: expected a whole number")
    return int(text)
