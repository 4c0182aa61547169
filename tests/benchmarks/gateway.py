"""The gateway beside the LiteLLM proxy and Portkey's, `biollm complete` through it beside `llm`, and 50 streams at once."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import loopback
from commands import BIOLLM, timed
from programs import CACHE, end, litellm_proxy
from setting import KEY, PROMPT, ROUNDS, Bar, interleaved, ratio, waterfall

from biollm.routing import litellm_private

PORTKEY = "@portkey-ai/gateway@1.15.2"
STARTS, ALONE, BUSY, AT_ONCE = 3, 100, 320, 16
TWO = "biollm serve, two workers"
MANY, CHUNKS = 200, 21  # streams at once, and their chunks
STREAMS, SECONDS, PER_SECOND = 50, 60, loopback.PER_SECOND
Figures = dict[str, list[float]]


@dataclass(frozen=True)
class Door:
    """Where a server listens: a port of this host, or a socket; and what it wants in a request's head."""

    at: int | Path
    headers: tuple[str, ...] = ()
    model: str = "biollm"
    path: str = "/v1"

    def request(self, content: str, **more: object) -> bytes:
        body = json.dumps({"model": self.model, "messages": [{"role": "user", "content": content}], **more})
        lines = (f"POST {self.path}/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json",
                 f"Content-Length: {len(body)}", f"Authorization: Bearer {KEY}", *self.headers, "", body)  # fmt: skip
        return "\r\n".join(lines).encode()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if isinstance(self.at, Path):
            return await asyncio.open_unix_connection(self.at)
        return await asyncio.open_connection("127.0.0.1", self.at)


async def pieces(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Yield the body of a response as it comes. httpx would be the slowest part of what is measured."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    assert b" 200 " in head.split(b"\r\n", 1)[0], head + await reader.read(2000)
    if (at := head.find(b"content-length:")) >= 0:
        yield await reader.readexactly(int(head[at + 15 :].split(b"\r\n", 1)[0]))
        return
    while size := int(await reader.readline(), 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readline()


async def load(door: Door, count: int, at_once: int) -> tuple[list[float], float]:
    """Return the milliseconds of each request, and those of all of them together."""
    took: list[float] = []
    asked = door.request(PROMPT)

    async def caller() -> None:
        reader, writer = await door.connect()
        for _ in range(count // at_once):
            began = time.perf_counter()
            writer.write(asked)
            body = b"".join([piece async for piece in pieces(reader)])
            took.append((time.perf_counter() - began) * 1000)
            assert b"All is well." in body, body
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(at_once)))
    return took, (time.perf_counter() - began) * 1000


def rss(pid: int) -> float:
    """Return the MB that a process has in memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


@contextmanager
def started(
    command: Sequence[str | Path], door: Door, env: Mapping[str, str], folder: Path
) -> Iterator[tuple[int, float]]:
    """Run a server; give its pid, and the milliseconds from its start to its first answer."""
    folder.mkdir(exist_ok=True)
    began = time.perf_counter()
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
    try:
        while True:
            try:
                asyncio.run(asyncio.wait_for(load(door, 1, 1), 60))
                break
            except (OSError, EOFError, AssertionError):
                said = (folder / "server.log").read_text()[-2000:]
                assert process.poll() is None and time.perf_counter() - began < 180, said
                time.sleep(0.05)
        yield process.pid, (time.perf_counter() - began) * 1000
    finally:
        end(process)


def free_port() -> int:
    """Return a port at which nobody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def portkey() -> Path | None:
    """Return Portkey's program, installed if need be; None without Node.js."""
    folder = CACHE / "bench-portkey"
    program = folder / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
    if shutil.which("npm") and not program.exists():
        folder.mkdir(parents=True, exist_ok=True)
        quiet = ("--no-audit", "--no-fund", "--silent", "--ignore-scripts", "--prefix", ".")
        subprocess.run(["npm", "install", *quiet, PORTKEY], cwd=folder, check=True)
    return program if program.exists() else None


def contestants(
    address: str, scratch: Path, env: Mapping[str, str]
) -> dict[str, tuple[list[str | Path], Door, dict[str, str]]]:
    """Return each server's command, door and environment; all have the same three deployments."""
    (run := scratch / "run").mkdir(mode=0o700, exist_ok=True)
    ports = [free_port() for _ in range(5)]
    mine = {**env, "BENCH_KEY": "sk-provider", "BIOLLM_GATEWAY_KEY": KEY, "XDG_RUNTIME_DIR": str(run)}
    printed = subprocess.run(
        [BIOLLM, "config", "--litellm"], env=env, check=True, capture_output=True, text=True
    ).stdout
    (scratch / "proxy.yaml").write_text(printed)
    theirs = {**env, "LITELLM_MASTER_KEY": KEY, "HOME": str(scratch)}
    proxy = [litellm_proxy(), "--config", scratch / "proxy.yaml", "--host", "127.0.0.1", "--port"]
    (two := scratch / "run-two").mkdir(mode=0o700, exist_ok=True)
    workers = [BIOLLM, "serve", "--port", str(ports[4]), "--workers", "2"]
    found: dict[str, tuple[list[str | Path], Door, dict[str, str]]] = {
        "biollm serve": ([BIOLLM, "serve", "--port", str(ports[0])], Door(ports[0]), mine),
        TWO: (workers, Door(ports[4]), {**mine, "XDG_RUNTIME_DIR": str(two)}),
        "LiteLLM proxy": ([*proxy, str(ports[1])], Door(ports[1]), theirs),
        # As `biollm serve` has it; the bars are about the proxy as it comes.
        "LiteLLM proxy, without OpenAI's SDK": ([*proxy, str(ports[3])], Door(ports[3]), {**theirs, litellm_private.OWN_HANDLER: "True"}),
    }  # fmt: skip
    if program := portkey():
        headers = ("x-portkey-provider: openai", f"x-portkey-custom-host: {address}/ok/v1")
        door = Door(ports[2], headers, "small")
        found["Portkey"] = (["node", program, "--headless", f"--port={ports[2]}"], door, dict(env))
    return found


def beside_proxies(address: str, scratch: Path, env: Mapping[str, str]) -> tuple[list[Bar], list[str]]:
    """Measure start, added latency, throughput and memory of the gateways, one worker each."""
    servers = contestants(address, scratch, env)
    doors = {name: door for name, (_, door, _) in servers.items()}
    direct = Door(int(address.rpartition(":")[2]), model="small", path="/ok/v1")
    figures: dict[str, Figures] = {name: {"start": []} for name in servers}
    for name in [*servers] * (STARTS - 1):
        with started(*servers[name], scratch / name.replace(" ", "-")) as (_, took):
            figures[name]["start"].append(took)
    with ExitStack() as stack:
        pids: dict[str, int] = {}
        for name, server in servers.items():
            pids[name], took = stack.enter_context(started(*server, scratch / name.replace(" ", "-")))
            figures[name]["start"].append(took)
        doors["biollm serve, its socket"] = Door(scratch / "run" / "biollm" / "gateway.sock")
        figures["biollm serve, its socket"] = {}
        for door in doors.values():
            asyncio.run(load(door, 100, 4))

        def added(door: Door) -> float:
            alone = asyncio.run(load(direct, ALONE, 1))[0]
            return statistics.median(asyncio.run(load(door, ALONE, 1))[0]) - statistics.median(alone)

        for what, measure in (
            ("added", added),
            ("busy", lambda door: asyncio.run(load(door, BUSY, AT_ONCE))[1] / BUSY),
        ):
            found = interleaved({name: (lambda door=door: measure(door)) for name, door in doors.items()}, 2 * ROUNDS)
            for name, values in found.items():
                figures[name][what] = values
        for name, pid in pids.items():
            figures[name]["memory"] = [rss(pid)]
    one, other = figures["biollm serve"], figures["LiteLLM proxy"]
    bars = [
        Bar(f"gateway, beside the LiteLLM proxy: {what}", ratio(one[key], other[key]), bound, note=note)
        for what, key, bound, note in (
            ("added latency, p50", "added", 0.4, ""),
            (f"time per request, {AT_ONCE} at once", "busy", 1 / 3, "requests/s: 3 x"),
            ("memory after the load", "memory", 0.3, ""),
            ("start to first answer", "start", 0.45, ""),
        )
    ]
    if other := figures.get("Portkey"):
        bars += [
            Bar(f"gateway, beside Portkey: {what}", ratio(figures[name][key], other[key]), bound, note=note)
            for what, name, key, bound, note in (
                ("added latency, p50", "biollm serve", "added", 1.2, ""),
                (f"time per request, {AT_ONCE} at once", "biollm serve", "busy", 1 / 1.5, "requests/s: 1.5 x"),
                (f"time per request, {AT_ONCE} at once, two workers", TWO, "busy", 1 / 2, "requests/s: 2 x"),
                ("start to first answer", "biollm serve", "start", 2.0, ""),
            )
        ]
    columns = {
        "start": "start, ms",
        "added": "added p50, ms",
        "busy": f"requests/s, c={AT_ONCE}",
        "memory": "memory, MB",
    }
    table = [f"| | {' | '.join(columns.values())} |", "|---" * (1 + len(columns)) + "|"]
    for name, found in figures.items():
        middle = {key: statistics.median(values) for key, values in found.items()}
        middle["busy"] = 1000 / middle["busy"]
        table.append(f"| {name} | {' | '.join(f'{middle[key]:.4g}' if key in middle else '-' for key in columns)} |")
    return bars, table


def beside_llm(env: Mapping[str, str], llm: Path, scratch: Path) -> tuple[list[Bar], Figures]:
    """Measure one answer of `biollm complete` by a running gateway, and of `llm`."""
    (run := scratch / "run-cli").mkdir(mode=0o700, exist_ok=True)
    mine = {**env, "XDG_RUNTIME_DIR": str(run)}
    subprocess.run([BIOLLM, "serve", "--detach"], env=mine, check=True, capture_output=True)
    try:
        runs = {
            "llm": timed([str(llm), "-m", "bench", "--no-stream", PROMPT], mine),
            "biollm complete": timed([BIOLLM, "complete", PROMPT], mine),
        }
        figures = interleaved(runs, 3 * ROUNDS)
    finally:
        subprocess.run([BIOLLM, "serve", "stop"], env=mine, check=True, capture_output=True)
    figures["python -c pass"] = interleaved({"": timed([sys.executable, "-c", "print()"], mine)})[""]
    what = "`biollm complete` with a gateway running, beside llm"
    return [Bar(what, ratio(figures["biollm complete"], figures["llm"]), 0.3)], figures


def many_streams(scratch: Path, env: Mapping[str, str]) -> list[Bar]:
    """Measure 200 streams at once of 21 chunks, 50 ms apart: how late they end, and what a chunk costs."""
    (run := scratch / "run-many").mkdir(mode=0o700, exist_ok=True)
    with loopback.process() as (address, _):
        folder = waterfall(scratch / "many", first=f"{address}/stream/v1")
        mine = {**env, "BIOLLM_CONFIG_DIR": str(folder), "XDG_RUNTIME_DIR": str(run)}
        subprocess.run([BIOLLM, "serve", "--detach"], env=mine, check=True, capture_output=True)
        try:
            status = subprocess.run([BIOLLM, "serve", "status", "--json"], env=mine, check=True, capture_output=True)
            gateway = json.loads(status.stdout)
            return asyncio.run(_many(Door(Path(gateway["socket"])), int(gateway["pid"])))
        finally:
            subprocess.run([BIOLLM, "serve", "stop"], env=mine, check=True, capture_output=True)


def cpu(pid: int) -> float:
    """Return the milliseconds of CPU that a process has used."""
    used = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(used[11]) + int(used[12])) * 1000 / os.sysconf("SC_CLK_TCK")


async def _many(door: Door, pid: int) -> list[Bar]:
    async def stream(number: int, length: int = CHUNKS) -> None:
        reader, writer = await door.connect()
        writer.write(door.request(f"{number} {length}", stream=True))
        body = b"".join([piece async for piece in pieces(reader)])
        assert body.count(b'"content":') == length, body
        writer.close()

    await asyncio.gather(*(stream(number) for number in range(20)))
    took: list[float] = []
    costs: dict[int, list[float]] = {1: [], CHUNKS: []}  # what a request costs with one chunk, and with all
    for _ in range(ROUNDS):
        for length, found in costs.items():
            before, began = cpu(pid), time.perf_counter()
            await asyncio.gather(*(stream(number, length) for number in range(MANY)))
            found.append((cpu(pid) - before) / MANY)
            if length == CHUNKS:
                took.append(time.perf_counter() - began)
    ideal = CHUNKS / PER_SECOND
    chunk = (statistics.median(costs[CHUNKS]) - statistics.median(costs[1])) / (CHUNKS - 1)
    what = f"{MANY} streams of {CHUNKS} chunks, 50 ms apart"
    return [
        Bar(f"{what}: time beside the ideal", statistics.median(took) / ideal, 1.3),
        Bar(f"{what}: CPU per chunk", 1000 * chunk, 50, "us", note="the kernel's share included"),
    ]


def streams(scratch: Path, env: Mapping[str, str]) -> list[Bar]:
    """Measure 50 streams at once whose rung dies halfway: what became of them, how late they were, what it cost."""
    (run := scratch / "run-streams").mkdir(mode=0o700, exist_ok=True)
    with ExitStack() as stack:
        first, second = (stack.enter_context(loopback.process()) for _ in range(2))
        folder = waterfall(scratch / "streams", first=f"{first[0]}/stream/v1", second=f"{second[0]}/stream/v1")
        mine = {**env, "BIOLLM_CONFIG_DIR": str(folder), "XDG_RUNTIME_DIR": str(run)}
        subprocess.run([BIOLLM, "serve", "--detach"], env=mine, check=True, capture_output=True)
        try:
            status = subprocess.run([BIOLLM, "serve", "status", "--json"], env=mine, check=True, capture_output=True)
            return asyncio.run(_streams(json.loads(status.stdout), first[1]))
        finally:
            subprocess.run([BIOLLM, "serve", "stop"], env=mine, check=True, capture_output=True)


async def _streams(gateway: Mapping[str, str], dying: subprocess.Popen[str]) -> list[Bar]:
    door, pid, tokens = Door(Path(gateway["socket"])), int(gateway["pid"]), SECONDS * PER_SECOND

    async def stream(number: int, length: int = tokens) -> tuple[str, float]:
        began, text, end = time.perf_counter(), "", "silent"
        reader, writer = await door.connect()
        restart = {"on_interrupt": "restart", "timeout": 4 * SECONDS}
        writer.write(door.request(f"{number} {length}", stream=True, biollm=restart))
        buffer = b""
        async for piece in pieces(reader):
            *frames, buffer = (buffer + piece).split(b"\n\n")
            for frame in frames:
                told = frame.removeprefix(b"data: ")
                if told == b"[DONE]":
                    end = "whole" if text == loopback.text(number, length) else "mixed"
                    continue
                chunk = json.loads(told)
                if "error" in chunk:
                    end = "error"
                    continue
                text = "" if chunk.get("biollm", {}).get("restarted") else text
                text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
        writer.close()
        return end, time.perf_counter() - began

    await asyncio.gather(*(stream(number, 5) for number in range(STREAMS)))  # makes every connection and buffer
    running = [asyncio.create_task(stream(number)) for number in range(STREAMS)]
    await asyncio.sleep(SECONDS / 6)
    before = rss(pid)
    await asyncio.sleep(SECONDS / 3)
    dying.kill()
    ended = await asyncio.gather(*running)
    after = rss(pid)
    lost = sum(end in ("silent", "mixed") for end, _ in ended)
    whole, late = sum(end == "whole" for end, _ in ended), max(took for _, took in ended) / (1.5 * SECONDS)
    what = f"{STREAMS} streams of {PER_SECOND} tokens/s, their rung dying halfway"
    note = f"{whole} whole, {STREAMS - whole - lost} ended by an error; ideal: {1.5 * SECONDS:.0f} s, the half that was lost included"
    return [
        Bar(f"{what}: mixed or silent", lost, 0, ""),
        Bar(f"{what}: time beside the ideal", late, 1.5, note=note),
        Bar(f"{what}: memory beside that before", after / before, 1.1, note=f"{before:.0f} to {after:.0f} MB"),
    ]
