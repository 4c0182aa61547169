"""The page in a real Chromium: it renders, follows what happens, shows what failed, and tells no secret."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import struct
import subprocess
import time
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from picture import group
from programs import end
from provider import Loopback

from biollm.client import get_model_client
from biollm.monitoring import page

pytestmark = pytest.mark.real
UPDATE = os.environ.get("BIOLLM_UPDATE") == "1"
SCREENSHOT = Path(__file__).parents[2] / "examples" / "dashboard.png"
Write = Callable[..., Path]


class Tab:
    """One tab, driven by Chromium's own protocol; `events` holds what it told."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number, self.events = socket, 0, list[Any]()

    async def send(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while (answer := await self._socket.receive_json(timeout=60)).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    async def js(self, expression: str) -> Any:
        result = await self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, expression: str) -> None:
        deadline = time.monotonic() + 60
        while not await self.js(expression):
            assert time.monotonic() < deadline, (expression, await self.js("document.body.innerText"))
            await asyncio.sleep(0.1)

    async def open(self, url: str, there: str = "!!document.querySelector('[data-rung]')") -> None:
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self.send(f"{domain}.enable")
        await self.send("Page.navigate", url=url)
        await self.until(f"document.readyState === 'complete' && {there}")

    def of(self, method: str) -> list[Any]:
        return [event["params"] for event in self.events if event.get("method") == method]

    def complaints(self) -> list[Any]:
        logged = [each for each in self.of("Log.entryAdded") if each["entry"]["level"] != "verbose"]
        return [*self.of("Runtime.exceptionThrown"), *logged, *self.of("Runtime.consoleAPICalled")]


def browse(program: str, profile: Path, visit: Callable[[Tab], Awaitable[None]]) -> None:
    """Open a browser with one tab, let `visit` use it, and end it."""
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--remote-debugging-port=0", f"--user-data-dir={profile}", "--window-size=1200,900", "--hide-scrollbars"]  # fmt: skip
    with (profile.parent / "chromium.log").open("w") as log:
        process = subprocess.Popen([program, *flags, "about:blank"], stdout=log, stderr=log)
    try:
        asyncio.run(_visit(profile / "DevToolsActivePort", visit))
    finally:
        end(process, 20)


async def _visit(ready: Path, visit: Callable[[Tab], Awaitable[None]]) -> None:
    async with asyncio.timeout(60):
        while not ready.exists() or len(ready.read_text().splitlines()) < 2:
            await asyncio.sleep(0.1)
    port = ready.read_text().splitlines()[0]
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            tabs = json.loads(await answer.text())
        url = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        async with session.ws_connect(url, max_msg_size=0) as socket:
            await visit(Tab(socket))


def test_it_follows_a_request_and_shows_who_failed(
    chromium: str, gateway: Callable[..., dict[str, Any]], net: Loopback, waterfall: Write, tmp_path: Path, state: Path
) -> None:
    waterfall(first=net.refusing(), second=net.serve())
    url = f"{gateway('--port', '0')['url']}/"
    key = (state / "gateway.key").read_text().strip()

    async def visit(tab: Tab) -> None:
        await tab.open(url.replace("//", f"//any:{key}@"), "document.querySelectorAll('[data-rung]').length === 2")
        await tab.until("document.getElementById('live').textContent === 'live'")
        assert await tab.js("document.getElementById('requests').textContent") == "0"
        states = "[...document.querySelectorAll('[data-rung] .state')].map(e => e.classList[1]).join()"
        assert await tab.js(states) == "ready,ready"
        await asyncio.to_thread(get_model_client().complete, "a prompt that nobody may see")
        await tab.until("document.querySelectorAll('[data-rung] .ago')[1].textContent.endsWith('ago')")
        assert await tab.js(f"['cooling,ready', 'failing,ready'].includes({states})")
        assert await tab.js("document.querySelector('[data-rung] .why').textContent.length > 10")
        assert "100%" in await tab.js("document.getElementById('tiles').innerText")
        everything = await tab.js("document.documentElement.outerHTML")
        for secret in ("planted", "nobody may see", key):
            assert secret not in everything
        asked = [
            request["request"]["url"].replace(f"any:{key}@", "").removeprefix(url)
            for request in tab.of("Network.requestWillBeSent")
        ]
        assert asked[-2:] == ["", "events"], "one request paints; not even an icon is asked for"
        assert [each for each in tab.complaints() if "401" not in str(each)] == []

    browse(chromium, tmp_path / "profile", visit)


def test_a_file_needs_no_server_and_fits_a_desk_a_phone_and_the_night(
    chromium: str, waterfall: Write, tmp_path: Path
) -> None:
    file = tmp_path / "now.html"
    file.write_text(page.html(group(waterfall, tmp_path).snapshot()))
    refusal = tmp_path / "key.html"
    refusal.write_text(page.key_needed("Send a key of this gateway."))
    shots: dict[str, bytes] = {}

    async def visit(tab: Tab) -> None:
        await tab.open(file.as_uri())
        looks = (
            ("desk", 1280, "light"),
            ("night", 1280, "dark"),
            ("phone", 390, "light"),
            ("phone-night", 390, "dark"),
        )
        for name, width, scheme in looks:
            size = {"width": width, "height": 960, "deviceScaleFactor": 1, "mobile": width < 500}
            await tab.send("Emulation.setDeviceMetricsOverride", **size)
            await tab.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            assert await tab.js("document.documentElement.scrollWidth <= window.innerWidth"), (
                "nothing to scroll sideways"
            )
            assert await tab.js("window.innerWidth") == width
            shots[name] = base64.b64decode((await tab.send("Page.captureScreenshot", format="png"))["data"])
        text = await tab.js("document.body.innerText")
        for part in (
            "not live",
            "2100-01-01",
            "lightning/gpt-oss-20b",
            "cooling 42 s",
            "15 of 15/min",
            "budget: openai",
            "job 4711",
        ):
            assert part in text
        asked = {request["request"]["url"] for request in tab.of("Network.requestWillBeSent")}
        assert asked <= {file.as_uri(), "data:,"}
        await tab.open(refusal.as_uri(), "!!document.querySelector('.alert')")
        assert "system-ui" in await tab.js("getComputedStyle(document.body).fontFamily")
        shots["key"] = base64.b64decode((await tab.send("Page.captureScreenshot", format="png"))["data"])
        assert tab.complaints() == []

    browse(chromium, tmp_path / "profile", visit)
    for name, shot in shots.items():
        (tmp_path / f"{name}.png").write_bytes(shot)
    if UPDATE:
        SCREENSHOT.write_bytes(shots["desk"])
    light, dark = _pixels(shots["desk"]), _pixels(shots["night"])
    assert sum(light) / len(light) > 180 > 100 > sum(dark) / len(dark)
    assert len(set(light)) > 50, "not blank"
    assert shots["desk"][16:24] == SCREENSHOT.read_bytes()[16:24], "BIOLLM_UPDATE=1 takes it"


def _pixels(png: bytes) -> bytes:
    """Return the bytes of a PNG's rows, undone of their filters."""
    width, _, depth, kind = struct.unpack(">IIBB", png[16:26])
    assert (depth, kind) in ((8, 2), (8, 6))
    data, at = b"", 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        data += png[at + 8 : at + 8 + length] if png[at + 4 : at + 8] == b"IDAT" else b""
        at += 12 + length
    step = 3 if kind == 2 else 4
    raw, size, before, rows = zlib.decompress(data), width * step, bytearray(width * step), bytearray()
    for start in range(0, len(raw), size + 1):
        method, row = raw[start], bytearray(raw[start + 1 : start + 1 + size])
        for i in range(size):
            left, up, corner = (row[i - step], before[i], before[i - step]) if i >= step else (0, before[i], 0)
            if method == 4:
                guess = left + up - corner
                row[i] = (row[i] + min((left, up, corner), key=lambda each: abs(guess - each))) & 255
            else:
                row[i] = (row[i] + (0, left, up, (left + up) // 2)[method]) & 255
        before = row
        rows += row
    return bytes(rows)
