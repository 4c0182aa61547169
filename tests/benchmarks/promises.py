"""What a dead first rung and a stored answer cost, whether quotas hold over processes, and how long 500 deployments take to load."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from loopback import CAP, WINDOW, arrivals
from setting import PROMPT, ROUNDS, Bar, waterfall

PROCESSES, EACH = 8, 100
DEPLOYMENTS = 500


def _forked(work: Callable[[], Any]) -> Any:
    """Return what `work` returns in a fork of this process, in which LiteLLM has sent nothing yet."""
    forked = multiprocessing.get_context("fork")
    ours, theirs = forked.Pipe()

    def child(out: Connection) -> None:
        out.send(work())
        os._exit(0)

    process = forked.Process(target=child, args=(theirs,))
    process.start()
    theirs.close()
    result = ours.recv()
    process.join()
    return result


def _ms(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1000


def dead_first(address: str, scratch: Path) -> tuple[list[Bar], dict[str, list[float]]]:
    """Measure the first failure of a process, with a client that is warm but for it, and the call after it."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # taken, and nobody listens
        refusing = f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
        dead = {"refused": refusing, "HTTP 429": f"{address}/429/v1", "HTTP 500": f"{address}/500/v1"}
        bars: list[Bar] = []
        measured: dict[str, list[float]] = {}
        for how, url in dead.items():
            folders = [scratch / f"dead-{how}-{number}" for number in range(ROUNDS)]
            found = [_forked(partial(_one_failure, url, address, folder)) for folder in folders]
            without, first, following = zip(*found, strict=True)
            measured |= {f"{how}: without the dead rung": list(without), f"{how}: first call": list(first),
                         f"{how}: next call": list(following)}  # fmt: skip
            more = statistics.median(a - b for a, b in zip(first, without, strict=True))
            bars.append(Bar(f"a dead first rung ({how}): first answer later by", more, 100, "ms"))
            bars.append(Bar(f"a dead first rung ({how}): next call", statistics.median(following), 25, "ms"))
    return bars, measured


def _one_failure(dead: str, address: str, scratch: Path) -> tuple[float, float, float]:
    from biollm.client import Client

    os.environ["BIOLLM_STATE_DIR"] = str(scratch / "state")
    client = Client(config_dir=waterfall(scratch, dead=dead, alive=f"{address}/ok/v1"))
    client.complete(PROMPT, provider="alive")
    without = _ms(lambda: client.complete(PROMPT, provider="alive"))
    first = _ms(lambda: client.complete(PROMPT))
    return without, first, _ms(lambda: client.complete(PROMPT))


def stored(address: str, scratch: Path) -> list[Bar]:
    """Ask again, with the cache, for what was answered: with a short prompt and with a log."""
    folder = waterfall(scratch / "stored", first=f"{address}/ok/v1")
    found = {"a short prompt": PROMPT, "a log of 100 kB": "2026-11-24 10:15:01 step 12 of 900 is done\n" * 2400}
    os.environ["BIOLLM_STATE_DIR"] = str(scratch / "stored-state")
    return [
        Bar(f"a stored answer, {what}", statistics.median(_forked(partial(_hits, folder, prompt))), 2, "ms")
        for what, prompt in found.items()
    ]


def _hits(folder: Path, prompt: str) -> list[float]:
    from biollm.client import Client

    client = Client(config_dir=folder, cache=True)
    client.complete(prompt)
    answers: list[Any] = []
    times = [_ms(lambda: answers.append(client.complete(prompt))) for _ in range(200)]
    assert all(answer.cached for answer in answers)
    return times


def quota(address: str, scratch: Path) -> list[Bar]:
    """Send from 8 processes, half of them async, at 60/min; the server counts, and refuses what is too much."""
    os.environ["BIOLLM_STATE_DIR"] = str(scratch / "quota-state")
    capped = {"base_url": f"{address}/capped/v1", "rate_limit": f"{CAP}/min"}
    folder = waterfall(scratch / "quota", capped=capped, spill=f"{address}/ok/v1")
    forked = multiprocessing.get_context("fork")
    processes = [forked.Process(target=_sender, args=(folder, number % 2 == 0)) for number in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    came = arrivals(address)
    times = [at for at, _ in came]
    most = max(sum(0 <= later - at < WINDOW for later in times) for at in times)
    refused = sum(status == 429 for _, status in came)
    finished = sum(process.exitcode == 0 for process in processes)
    note = f"{PROCESSES} processes x {EACH} over {times[-1] - times[0]:.0f} s: {len(came)} arrived"
    return [
        Bar("quota of 60/min: requests that any 60 s had too many", max(0, most - CAP), 0, "", note),
        Bar("quota of 60/min: requests that a full minute had too few", CAP - most + (len(came) < 2 * CAP), 0, ""),
        Bar("quota of 60/min: 429s that the server sent", refused, 0, ""),
        Bar("quota of 60/min: requests without an answer", (PROCESSES - finished) * EACH, 0, ""),
    ]


def _sender(folder: Path, use_async: bool) -> None:
    from biollm.client import Client

    client = Client(config_dir=folder)

    def burst(count: int) -> None:
        if use_async:
            asyncio.run(_gathered(client, count))
            return
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: client.complete(PROMPT), range(count)))
        assert all(answers)

    burst(EACH // 2)
    time.sleep(WINDOW + 1.5)  # what the first burst sent leaves the ledger's window a second after a minute
    burst(EACH // 2)
    with client:
        pass  # the ledger is written
    os._exit(0)


async def _gathered(client: Any, count: int) -> None:
    answers = await client.acomplete_many([PROMPT] * count, concurrency=4)
    assert not any(isinstance(answer, Exception) for answer in answers)


def many(address: str, scratch: Path) -> tuple[list[Bar], dict[str, list[float]]]:
    """Load 500 deployments, and answer from the first, in a process that has LiteLLM imported."""
    names = [f"p{number}" for number in range(DEPLOYMENTS // 10)]
    models = [f"m{number}" for number in range(10)]
    rungs = {name: {"base_url": f"https://{name}.example.org/v1", "models": models} for name in names}
    folder = waterfall(scratch / "many", **rungs | {"p0": {"base_url": f"{address}/ok/v1", "models": models}})
    os.environ["BIOLLM_STATE_DIR"] = str(scratch / "many-state")
    found = [_forked(lambda: _load(folder)) for _ in range(ROUNDS)]
    load, route = (list(column) for column in zip(*found, strict=True))
    total = statistics.median(a + b for a, b in zip(load, route, strict=True)) / 1000
    bars = [Bar(f"{DEPLOYMENTS} deployments: load and route", total, 2, "s")]
    return bars, {"500 deployments: load": load, "500 deployments: first answer": route}


def _load(folder: Path) -> tuple[float, float]:
    from biollm.client import Client

    clients: list[Client] = []
    load = _ms(lambda: clients.append(Client(config_dir=folder)))
    return load, _ms(lambda: clients[0].complete(PROMPT))
