"""The picture of now as a web page: one file with everything in it, and its changes as server-sent events."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import html as markup
import json
import re
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict
from pathlib import Path

from biollm._runtime import apart
from biollm.monitoring.dashboard import render
from biollm.monitoring.snapshot import Snapshot


def html(snapshot: Snapshot) -> str:
    """Return the page: it shows the snapshot, and follows the server it came from, if one did.

    Nothing in the snapshot can become markup: it is JSON without "<", and the script writes text only. The policy
    admits this page's own script and style alone, by their hashes.
    """
    page = _template()
    script, style = (_hash(page, tag) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {"POLICY": policy, "SNAPSHOT": _json(snapshot), "PLAIN": markup.escape(render(snapshot, 110))}
    return re.sub(r"__(POLICY|SNAPSHOT|PLAIN)__", lambda found: parts[found[1]], page)


def key_needed(message: str) -> str:
    """Return the page that a browser shows when its user gives no key, in the style of the other."""
    style = _inside(_template(), "style")
    policy = f"default-src 'none'; style-src {_hash(_template(), 'style')}; img-src data:"
    login = "Reload this page to try again: any user name, and a key of this gateway as the password."
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>biollm</title><link rel="icon" href="data:,">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><meta name="color-scheme" content="light dark">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head><body><main>'
        f'<header><h1>biollm</h1></header><div class="alert">{markup.escape(message)}</div><p>{login}</p></main></body></html>'
    )


async def events(take: Callable[[], Snapshot], interval: float = 1.0) -> AsyncGenerator[str, None]:
    """Yield a snapshot, taken in a thread, as a server-sent event every `interval` seconds."""
    yield "retry: 2000\n\n"
    while True:
        yield f"data: {_json(await apart(take))}\n\n"
        await asyncio.sleep(interval)


def _json(snapshot: Snapshot) -> str:
    facts = asdict(snapshot)
    facts["rungs"] = facts.pop("candidates")  # the name on the wire
    text = json.dumps(facts, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _template() -> str:
    return (Path(__file__).parent / "page.html").read_text()


def _inside(page: str, tag: str) -> str:
    return page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]


def _hash(page: str, tag: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(_inside(page, tag).encode()).digest()).decode()}'"
