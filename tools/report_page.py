"""The page of a report: one HTML file that loads nothing, or the same page fed by `ppomax watch`.

What a model wrote can reach the page only as data: JSON in which no character can end the element or be markup, shown
through text nodes (`report_assets/dom.js`). The content security policy allows this page's own script and style, by
their hashes, and nothing else: no other script, no image, font or address.
"""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent / "report_assets"
SCRIPTS = ("dom.js", "chart.js", "tables.js", "panels.js", "rollouts.js", "main.js")
ICON = "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Cpath d='M2 12l4-5 3 3 5-7' fill='none' stroke='%233b6fd9' stroke-width='2'/%3E%3C/svg%3E"  # noqa: E501


def render_page(data: dict[str, Any] | None) -> str:
    """The page with its data; without data one that fetches them from the server it came from (`policy(live=True)`)."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy(live=data is None)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<link rel="icon" href="{ICON}">\n<title>ppomax</title>\n<style>{_style()}</style>\n</head>\n<body>\n'
        "<noscript>This report draws its curves with the script inside of it: allow scripts for this file.</noscript>\n"
        f'<script id="data" type="application/json">{safe_json(data)}</script>\n'
        f"<script>{_script()}</script>\n</body>\n</html>\n"
    )


def policy(*, live: bool) -> str:
    """The content security policy of the page. live: it may fetch from its own server."""
    connect = "; connect-src 'self'" if live else ""
    return (
        f"default-src 'none'; script-src '{_hash(_script())}'; style-src '{_hash(_style())}'; img-src data:{connect}; "
        "base-uri 'none'; form-action 'none'"
    )


def safe_json(content: Any) -> str:
    """JSON that an HTML parser and a script read the same way: ASCII, without <, > and &. Refuses NaN."""
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _script() -> str:
    """The scripts share one scope and run in the order of SCRIPTS."""
    parts = "".join((ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return f'(() => {{\n"use strict";\n{parts}}})();\n'


def _style() -> str:
    return (ASSETS / "style.css").read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
