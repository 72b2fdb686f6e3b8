"""A headless browser for the tests of pages, spoken to in the DevTools protocol over two pipes."""

import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *(
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-extensions",
        "--disable-dev-shm-usage",
    ),
    *("--hide-scrollbars", "--remote-debugging-pipe", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"),
)
SECONDS = 90


class Browser:
    """One process, one page at a time. complaints: what the console, the policy or an exception said since `open`."""

    def __init__(self, process: subprocess.Popen, read: int, write: int) -> None:
        self.process, self._read, self._write = process, read, write
        self._rest, self._number, self._session, self._target = b"", 0, None, None
        self.complaints: list[str] = []
        self.requests: list[str] = []

    def open(self, url: str, *, width: int = 1300, height: int = 900, dark: bool = False) -> None:
        """A new page, loaded; its scripts have run."""
        if self._target:
            self._call("Target.closeTarget", targetId=self._target, session=None)
        self.complaints, self.requests, self._session = [], [], None
        self._target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Page", "Network"):
            self._call(f"{domain}.enable")
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("Emulation.setEmulatedMedia", features=features)
        self._call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && document.querySelector('main section')")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        result = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = SECONDS) -> None:
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({expression})"):
            assert time.monotonic() < end, f"{expression} is not true after {seconds} s; {self.complaints}"
            time.sleep(0.1)

    def mouse(self, kind: str, x: float, y: float) -> None:
        """kind: mouseMoved, mousePressed, mouseReleased."""
        button = {"button": "left", "buttons": 0 if kind == "mouseReleased" else 1} if kind != "mouseMoved" else {}
        self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, clickCount=1, **button)

    def screenshot(self) -> bytes:
        import base64

        return base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"])

    def _call(self, method: str, session: Any = ..., **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        session = self._session if session is ... else session
        if session and not method.startswith("Target."):
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        number, end = self._number, time.monotonic() + SECONDS
        while True:
            answer = self._receive(end)
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self._note(answer)

    def _receive(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            received = os.read(self._read, 1 << 16)
            assert received, "the browser has ended"
            self._rest += received
        line, self._rest = self._rest.split(b"\0", 1)
        return json.loads(line)

    def _note(self, event: dict[str, Any]) -> None:
        content = event.get("params", {})
        if event["method"] == "Runtime.consoleAPICalled":
            self.complaints.append(str([one.get("value") for one in content["args"]]))
        elif event["method"] == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(content["exceptionDetails"])[:2000])
        elif event["method"] == "Log.entryAdded":
            self.complaints.append(content["entry"]["text"])
        elif event["method"] == "Network.requestWillBeSent":
            self.requests.append(content["request"]["url"])


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser on PATH ({', '.join(NAMES)})")
    profile = tmp_path_factory.mktemp("browser")
    with _started(program, profile) as browser:
        yield browser


@contextlib.contextmanager
def _started(program: str, profile: Path) -> Iterator[Browser]:
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    # The protocol is on descriptors 3 and 4 of the browser; a shell puts them there.
    script = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
    command = ["/bin/bash", "-c", script, program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(
        command, pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Browser(process, ours_in, ours_out)
    finally:
        os.close(ours_out)  # the end of its pipe ends the browser
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(ours_in)


HOSTILE = (
    "<script>window.pwned = 1</script>",
    "</script><script>window.pwned = 2</script>",
    "<img src=x onerror='window.pwned = 3'>",
    "{{window.pwned = 4}} ${window.pwned = 4}",
    "a\u202eb\u2066c\u200bd\u2028e\u2029",
    "\x1b[31mred\x00\x07",
    "<!--<script>",
    "]]>&lt;b&gt;&#x41;",
    '"><svg onload=window.pwned=5>',
    "half of a pair: \ud800",
)
"""Texts that a page must show as they are."""


class FakeRun:
    """Writes a run folder as a ppo stage leaves it, with hostile texts and numbers that are none."""

    hostile = HOSTILE

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def steps(self, first: int, last: int, **more: Any) -> "FakeRun":
        lines = []
        for step in range(first, last + 1):
            record = {"kind": "ppo", "step": step, "seconds": 2.0, "seconds_rollout": 1.0, "seconds_update": 0.5}
            record |= {"reward": step / 10, "kl": 0.01 * step, "perplexity": 9.0, "ref_perplexity": 8.0, "odd_one": 1.5}
            record |= {"grad_norm": None if step == first + 1 else 1.0, "response_length": 20.0 + step}
            record |= {"reward_histogram": {"edges": [0.0, 1.0, 2.0], "counts": [3, 1]}} | more
            lines.append(json.dumps(record))
        return self.append(*lines)

    def append(self, *lines: str | dict[str, Any], end: str = "\n") -> "FakeRun":
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write("".join(text + end for text in texts))
        return self

    def event(self, step: int, message: str) -> "FakeRun":
        rows = [{"prompt": text, "response": text} for text in HOSTILE]
        event = {"kind": "event", "step": step, "detector": "kl_runaway", "severity": "alarm", "message": message}
        return self.append(event | {"evidence": {"kl": 0.2, HOSTILE[0]: HOSTILE[1]}, "samples": rows, "action": "stop"})

    def samples(self, step: int, reward: float = 0.0) -> "FakeRun":
        rows = [
            {
                "prompt": [{"role": "human", "text": f"{n} {text}"}],
                "response": f"{text} at {step}",
                "reward": reward + n,
            }
            for n, text in enumerate(HOSTILE)
        ]
        return self.lines(f"samples_{step:06d}.jsonl", rows)

    def rollouts(self, step: int) -> "FakeRun":
        rows = []
        for index, text in enumerate(HOSTILE):
            pieces = [*(text[i : i + 4] for i in range(0, len(text), 4)), "", "\u4e2d", "\n", "</s>"]
            numbers = [(-1) ** t * t / 10 for t in range(len(pieces))]
            columns = ("logprobs", "ref_logprobs", "kl", "advantages", "values", "token_rewards")
            row = {"step": step, "index": index, "prompt": f"Human: {text}", "response": text, "finished": index > 0}
            row |= {"score": index / 2, "length": len(pieces), "tokens": [*range(len(pieces))], "pieces": pieces}
            rows.append(row | {name: [scale * x for x in numbers] for scale, name in enumerate(columns, 1)})
        (self.folder / "rollouts").mkdir(exist_ok=True)
        return self.lines(f"rollouts/step_{step:06d}.jsonl", rows)

    def lines(self, name: str, rows: list[dict[str, Any]]) -> "FakeRun":
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return self


@pytest.fixture
def fake_run(tmp_path: Path) -> FakeRun:
    """Twelve steps, an event, two evaluations, two dumps of rollouts, and a last line without its end."""
    run = FakeRun(tmp_path / "runs" / "ppo").steps(1, 12).event(6, f"KL ran away {HOSTILE[0]}")
    run.append({"kind": "evaluation", "step": 0, "reward": 0.0}, {"kind": "evaluation", "step": 12, "reward": 1.0})
    run.samples(0).samples(12, 3.0).rollouts(6).rollouts(12)
    return run.append('{"kind": "ppo", "st', end="")
