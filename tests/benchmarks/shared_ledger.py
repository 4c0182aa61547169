"""A ledger on a real Redis server: what it costs a request, whether limits hold over hosts, and a gateway with it."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import shutil
import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import bench_ledger
from commands import BIOLLM
from gateway import AT_ONCE, BUSY, Door, free_port, load, started
from redis_server import RedisServer
from setting import KEY, ROUNDS, Bar, interleaved, waterfall

from biollm.config import Limit
from biollm.ledger import Claim, Ledger, Refused

HOSTS, EACH, SECONDS = 4, 2, 6.0
PER_SECOND = 40


def measure(address: str, scratch: Path, env: Mapping[str, str]) -> tuple[list[Bar], list[str]]:
    """Measure all of it; nothing where there is no redis-server."""
    if not shutil.which("redis-server"):
        return [], ["Left out: redis-server is not installed."]
    (folder := scratch / "redis").mkdir()
    server = RedisServer(folder)
    try:
        costs, cost_table = _costs(scratch, server)
        gateways, gateway_table = _gateways(address, scratch, env, server)
        return [*costs, *_windows(scratch, server), *gateways], [*cost_table, *gateway_table]
    finally:
        server.stop()


def _costs(scratch: Path, server: RedisServer) -> tuple[list[Bar], list[str]]:
    how = {"server": server.server}
    waits, costs = bench_ledger.alone(scratch / "redis-alone", how)
    table = [f"- one process: reserve {bench_ledger.figures(waits)}; with finish {bench_ledger.figures(costs)}"]
    bars = [Bar("Redis: reserve and finish, one process, p50", statistics.median(costs), 0.5, "ms")]
    for pause in (0.0, 0.01):
        server.call("FLUSHALL")
        waits, kept, made = bench_ledger.together(scratch / f"redis-together-{pause}", how, pause)
        apart = f"16 processes, {pause * 1000:.0f} ms apart"
        table.append(f"- {apart}: wait {bench_ledger.figures(waits)}; {kept} of {made} attempts kept")
    p99 = sorted(waits)[int(len(waits) * 0.99)]
    return [*bars, Bar("Redis: reservation, 16 processes 10 ms apart, p99", p99, 10, "ms")], table


def _host(folder: Path, ahead: float, server: Any, start: Any, out: Any) -> None:
    """Ask all the time, as one process on a host with a clock of its own; put the times of what was granted."""
    real = time.time
    time.time = lambda: real() + ahead
    ledger, granted = Ledger(folder, clock=time.time, server=server), list[float]()
    claim = Claim("bench/hosts", (Limit("requests", PER_SECOND, "s"),))

    async def ask() -> None:
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            if not isinstance(await ledger.reserve(claim), Refused):
                granted.append(time.monotonic())  # one clock for all processes of this machine
            await asyncio.sleep(0.002)

    start.wait()
    asyncio.run(ask())
    ledger.close()
    out.put(granted)


def _windows(scratch: Path, server: RedisServer) -> list[Bar]:
    spawn = multiprocessing.get_context("spawn")
    start, out = spawn.Barrier(HOSTS * EACH), spawn.Queue()
    children = [
        spawn.Process(target=_host, args=(scratch / f"host-{host}", 10.0 * host, server.server, start, out))
        for host in range(HOSTS)
        for _ in range(EACH)
    ]
    for child in children:
        child.start()
    times = sorted(at for _ in children for at in out.get())
    for child in children:
        child.join()
    most = max(sum(0 <= later - at < 1 for later in times) for at in times)
    what = f"Redis: {PER_SECOND}/s over {HOSTS} hosts x {EACH} processes"
    least = PER_SECOND * int(SECONDS / 1.1)
    return [
        Bar(
            f"{what}: requests that any second had too many", max(0, most - PER_SECOND), 0, "", f"{len(times)} granted"
        ),
        Bar(f"{what}: requests that were refused without need", max(0, least - len(times)), 0, ""),
    ]


def _gateways(address: str, scratch: Path, env: Mapping[str, str], server: RedisServer) -> tuple[list[Bar], list[str]]:
    doors: dict[str, Door] = {}
    with ExitStack() as stack:
        for name, ledger in (("SQLite", {}), ("Redis", {"url": server.server.url})):
            folder = waterfall(scratch / f"ledger-{name}", first=f"{address}/ok/v1")
            written = json.loads((folder / "providers.yaml").read_text())
            (folder / "providers.yaml").write_text(json.dumps(written | ({"ledger": ledger} if ledger else {})))
            (run := scratch / f"run-{name}").mkdir(mode=0o700)
            doors[name] = Door(port := free_port())
            mine = {**env, "BENCH_KEY": "sk-provider", "BIOLLM_GATEWAY_KEY": KEY, "XDG_RUNTIME_DIR": str(run),
                    "BIOLLM_CONFIG_DIR": str(folder), "BIOLLM_STATE_DIR": str(scratch / f"state-{name}")}  # fmt: skip
            stack.enter_context(started([BIOLLM, "serve", "--port", str(port)], doors[name], mine, run))
            asyncio.run(load(doors[name], 100, 4))
        found = interleaved(
            {
                name: (lambda door=door: asyncio.run(load(door, BUSY, AT_ONCE))[1] / BUSY)
                for name, door in doors.items()
            },
            2 * ROUNDS,
        )
    beside = statistics.median(one / other for one, other in zip(found["Redis"], found["SQLite"], strict=True))
    table = [f"- gateway, {AT_ONCE} at once, with {name}: {1000 / statistics.median(took):.0f} requests/s"
             for name, took in found.items()]  # fmt: skip
    return [Bar("gateway with Redis beside SQLite: time per request", beside, 1 / 0.9, note="requests/s: 0.9 x")], table
