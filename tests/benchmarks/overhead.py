"""What a request costs beside its peers, at several concurrencies, with a provider that answers at once.

Each contestant lives in a process of its own, forked after LiteLLM's import, and warm. A bare Router gets the same
deployments and settings, and runs where biollm's runs: on a background loop, asked from threads or from another loop.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from setting import KEY, PROMPT, Bar, interleaved, model_list, ratio

REQUESTS = {1: 40, 16: 96, 64: 192}  # concurrency -> requests of one run
LLM_REQUESTS = {1: 5, 16: 16, 64: 64}  # it makes a new HTTP client for each
MESSAGES = [{"role": "user", "content": PROMPT}]
BODY = {"model": "small", "messages": MESSAGES}
Run = Callable[[int], float]  # concurrency -> milliseconds per request


def _from_threads(ask: Callable[[], Any]) -> Run:
    pools = {concurrency: ThreadPoolExecutor(concurrency) for concurrency in REQUESTS}

    def run(concurrency: int) -> float:
        count = REQUESTS[concurrency]
        began = time.perf_counter()
        for one in [pools[concurrency].submit(ask) for _ in range(count)]:
            one.result()
        return (time.perf_counter() - began) * 1000 / count

    return run


def _from_a_loop(ask: Callable[[], Awaitable[Any]]) -> Run:
    runner = asyncio.Runner()

    async def several(concurrency: int) -> None:
        waiting = iter(range(REQUESTS[concurrency]))

        async def one_after_another() -> None:
            for _ in waiting:
                await ask()

        await asyncio.gather(*(one_after_another() for _ in range(concurrency)))

    def run(concurrency: int) -> float:
        began = time.perf_counter()
        runner.run(several(concurrency))
        return (time.perf_counter() - began) * 1000 / REQUESTS[concurrency]

    return run


def _httpx(address: str, _: Path) -> Run:
    import httpx

    client = httpx.AsyncClient(limits=httpx.Limits(max_connections=None))
    url, headers = f"{address}/ok/v1/chat/completions", {"Authorization": f"Bearer {KEY}"}
    return _from_a_loop(lambda: client.post(url, json=BODY, headers=headers))


def _openai(address: str, _: Path) -> Run:
    import openai

    client = openai.AsyncOpenAI(base_url=f"{address}/ok/v1", api_key=KEY)
    return _from_a_loop(lambda: client.chat.completions.create(model="small", messages=MESSAGES))  # pyright: ignore


def _router(folder: Path) -> Any:
    import litellm

    from biollm.config import load_config
    from biollm.routing.router_config import router_settings

    return litellm.Router(model_list=model_list(folder), **router_settings(load_config(folder)))


def _router_plain(_: str, folder: Path) -> Run:
    router = _router(folder)
    return _from_a_loop(lambda: router.acompletion(model="biollm", messages=MESSAGES))


def _router_behind_a_loop(folder: Path) -> Callable[[], Any]:
    router, loop = _router(folder), asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return lambda: asyncio.run_coroutine_threadsafe(router.acompletion(model="biollm", messages=MESSAGES), loop)


def _router_async(_: str, folder: Path) -> Run:
    submit = _router_behind_a_loop(folder)
    return _from_a_loop(lambda: asyncio.wrap_future(submit()))


def _router_sync(_: str, folder: Path) -> Run:
    submit = _router_behind_a_loop(folder)
    return _from_threads(lambda: submit().result())


def _biollm_async(_: str, folder: Path) -> Run:
    from biollm.client import Client

    client = Client(config_dir=folder)
    return _from_a_loop(lambda: client.acomplete(PROMPT))


def _biollm_sync(_: str, folder: Path) -> Run:
    from biollm.client import Client

    client = Client(config_dir=folder)
    return _from_threads(lambda: client.complete(PROMPT))


CONTESTANTS: dict[str, Callable[[str, Path], Run]] = {
    "httpx": _httpx,
    "openai": _openai,
    "Router": _router_plain,
    "Router, background loop, async": _router_async,
    "biollm, async": _biollm_async,
    "Router, background loop, sync": _router_sync,
    "biollm, sync": _biollm_sync,
}


def _contestant(make: Callable[[str, Path], Run], address: str, folder: Path, asked: Connection) -> None:
    run = make(address, folder)
    while concurrency := asked.recv():
        asked.send(run(concurrency))
    os._exit(0)  # nothing of a forked parent's is to be closed here


def measure(address: str, folder: Path, llm: Path, env: Mapping[str, str]) -> tuple[list[Bar], dict[str, list[float]]]:
    """Return the bars, and milliseconds per request of every contestant at every concurrency."""
    forked = multiprocessing.get_context("fork")
    lines: dict[str, Connection] = {}
    for name, make in CONTESTANTS.items():
        ours, theirs = forked.Pipe()
        forked.Process(target=_contestant, args=(make, address, folder, theirs), daemon=True).start()
        lines[name] = ours
    peer = subprocess.Popen(
        [str(llm.with_name("python")), str(Path(__file__).with_name("peer_llm.py")), json.dumps(LLM_REQUESTS)],
        env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert peer.stdin
    assert peer.stdout

    def ask(name: str, concurrency: int) -> float:
        lines[name].send(concurrency)
        return lines[name].recv()

    def ask_llm(concurrency: int) -> float:
        print(concurrency, file=peer.stdin, flush=True)
        return float(peer.stdout.readline())  # pyright: ignore[reportOptionalMemberAccess]

    askers = {name: partial(ask, name) for name in CONTESTANTS} | {"llm": ask_llm}
    for asker in askers.values():
        asker(1)
    measured: dict[str, list[float]] = {}
    for concurrency in REQUESTS:
        one_run = {f"{name}, c={concurrency}": partial(asker, concurrency) for name, asker in askers.items()}
        for each in one_run.values():
            each()
        measured |= interleaved(one_run)
    for line in lines.values():
        line.send(0)
    peer.communicate()
    bars = [
        Bar(
            f"client, {kind}, {concurrency} at once, beside a bare Router on a background loop",
            ratio(
                measured[f"biollm, {kind}, c={concurrency}"],
                measured[f"Router, background loop, {kind}, c={concurrency}"],
            ),
            1.15,
        )
        for kind in ("sync", "async")
        for concurrency in REQUESTS
    ]
    return bars, measured
