"""`ppomax watch`: what it answers, to whom, while a run grows."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from ppomax.engine import cli
from ppomax.engine.errors import ConfigError, DataError
from ppomax.tools.watch import ADDRESS, open_server


@contextlib.contextmanager
def serving(*folders) -> Iterator[int]:
    """The port of a server in a thread."""
    server = open_server(folders, 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@pytest.fixture
def port(fake_run) -> Iterator[int]:
    with serving(fake_run.folder) as port:
        yield port


def ask(port, target, *, method="GET", host=None):
    """(status, headers, content)."""
    connection = http.client.HTTPConnection(ADDRESS, port, timeout=30)
    connection.putrequest(method, target, skip_host=True)
    for name in host if isinstance(host, list) else [host or f"{ADDRESS}:{port}"]:
        connection.putheader("Host", name)
    connection.endheaders()
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, response.headers, content


def tree(port, seen=""):
    status, _, content = ask(port, f"/data.json?seen={seen}")
    assert status == 200
    return json.loads(content)


def news(port, seen):
    """The data that follow `seen`; they are put together in a part of the time only."""
    end = time.monotonic() + 60
    while ask(port, f"/data.json?seen={seen}")[0] == 204:
        assert time.monotonic() < end
        time.sleep(0.05)
    return tree(port)


def test_only_this_machine_can_connect(port):
    others = [a[4][0] for a in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    for address in {*others, "127.0.0.2"} - {ADDRESS}:
        with pytest.raises(OSError, match=r"refused|unreachable|timed out"):
            socket.create_connection((address, port), timeout=2)


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example:{port}", "", []],
)
def test_a_foreign_host_name_is_refused(port, host):
    host = host.format(port=port) if isinstance(host, str) else [f"{ADDRESS}:{port}", "evil.example"]
    for target in ("/", "/data.json", "/rollouts.json?run=0&step=6"):
        status, _, content = ask(port, target, host=host if host else [""])
        assert status == 403
        assert b"runs" not in content


def test_own_host_names_are_answered(port):
    assert ask(port, "/", host=f"localhost:{port}")[0] == 200
    assert ask(port, "/")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_nothing_but_get_is_answered(port, method):
    assert ask(port, "/data.json", method=method)[0] == 501


@pytest.mark.parametrize(
    "target",
    [
        *("/metrics.jsonl", "/../metrics.jsonl", "//etc/passwd", "/..%2f..%2fetc/passwd", "/data.json/", "/%00"),
        *(
            "/rollouts.json",
            "/rollouts.json?run=0&step=7",
            "/rollouts.json?run=1&step=6",
            "/rollouts.json?run=-1&step=6",
        ),
        *(
            "/rollouts.json?run=0&step=../../config",
            "/rollouts.json?run=0&step=%31%00",
            "/rollouts.json?run=\u00b2&step=6",
        ),
    ],
)
def test_no_other_path_leads_anywhere(port, target):
    status, _, content = ask(port, target.encode("ascii", "ignore").decode() if "\u00b2" in target else target)
    assert status == 404
    assert b"kind" not in content


def test_answers_are_for_this_page_alone(port):
    for target in ("/", "/data.json", "/nothing"):
        _, headers, _ = ask(port, target)
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'sha256-")
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "Access-Control-Allow-Origin" not in headers


def test_news_are_sent_once_and_torn_lines_wait(fake_run, port):
    first = tree(port)
    assert first["data"]["runs"][0]["step"] == 12
    assert ask(port, f"/data.json?seen={first['version']}")[0] == 204
    fake_run.append('ep": 13, "rew', end="")
    second = news(port, first["version"])
    assert second["data"]["runs"][0]["step"] == 12
    fake_run.append('ard": 5.0}')
    third = news(port, second["version"])
    assert third["data"]["runs"][0]["curves"]["ppo"]["reward"]["last"] == 5.0


def test_rollouts_come_one_step_at_a_time(fake_run, port):
    assert tree(port)["data"]["runs"][0]["rollouts"] == [6, 12]
    assert tree(port)["data"]["runs"][0]["dumps"] == {}
    rows = json.loads(ask(port, "/rollouts.json?run=0&step=6")[2])["rows"]
    assert [row["index"] for row in rows] == [*range(len(fake_run.hostile))]
    (fake_run.folder / "rollouts/step_000006.jsonl").write_text("{")
    status, _, content = ask(port, "/rollouts.json?run=0&step=6")
    assert (status, "not JSON" in json.loads(content)["error"]) == (404, True)


def test_a_folder_without_a_record_waits_for_one(tmp_path, fake_run):
    folder = tmp_path / "new"
    folder.mkdir()
    with serving(folder) as port:
        first = tree(port)
        run = first["data"]["runs"][0]
        assert (run["step"], run["notes"]) == (0, ["no record yet"])
        type(fake_run)(folder).steps(1, 2)
        assert news(port, first["version"])["data"]["runs"][0]["step"] == 2


def test_a_client_that_says_nothing_holds_nobody_up(port):
    with socket.create_connection((ADDRESS, port)):
        assert ask(port, "/")[0] == 200


def test_a_missing_run_or_a_port_in_use_is_a_clear_error(tmp_path, fake_run, port):
    with pytest.raises(DataError, match="no such run folder"):
        open_server([tmp_path / "missing"], 0)
    with pytest.raises(ConfigError, match=r"in use; name another one"):
        open_server([fake_run.folder], port)
    with pytest.raises(ConfigError, match="expected 0 to 65535"):
        open_server([fake_run.folder], 65536)


def test_ctrl_c_ends_it_quietly(fake_run):
    command = [sys.executable, "-c", f"import sys; from {cli.__name__} import main; sys.exit(main())"]
    arguments = ["watch", str(fake_run.folder), "--port", "0"]
    process = subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background ignore it
    )
    try:
        line = process.stdout.readline()
        assert ask(int(line.rstrip("/\n").rpartition(":")[2]), "/")[0] == 200
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, errors) == (0, "")


def test_a_page_follows_the_run(fake_run, browser):
    with serving(fake_run.folder) as port:
        browser.open(f"http://{ADDRESS}:{port}/")
        browser.wait("document.querySelector('#overview [data-metric=reward] .last, #overview .plot svg')")
        assert browser.run("document.querySelector('.status').textContent") == "live"
        browser.wait("document.querySelectorAll('#rollouts .token').length")
        fake_run.append('ep": 13, "reward": 77.0, "kl": 0.5}').rollouts(13)
        browser.wait("document.querySelector('#values').textContent.includes('77')")
        browser.wait("[...document.querySelectorAll('#rollouts option')].some(one => one.value === '13')")
        assert browser.run("window.pwned") is None
        assert browser.complaints == []
        assert {url.split("?")[0] for url in browser.requests} == {
            f"http://{ADDRESS}:{port}/{name}" for name in ("", "data.json", "rollouts.json")
        }
    browser.wait("document.querySelector('.status.lost')")
    assert "no answer" in browser.run("document.querySelector('.status').textContent")
