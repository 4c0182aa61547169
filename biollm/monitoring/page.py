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
    page = (Path(__file__).parent / "page.html").read_text()
    script, style = (_hash(page, tag) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {"POLICY": policy, "SNAPSHOT": _json(snapshot), "PLAIN": markup.escape(render(snapshot, 110))}
    return re.sub(r"__(POLICY|SNAPSHOT|PLAIN)__", lambda found: parts[found[1]], page)


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


def _hash(page: str, tag: str) -> str:
    text = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
