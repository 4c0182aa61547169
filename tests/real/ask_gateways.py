"""Asks gateways behind a balancer from several clients at once, and prints one JSON line per request.

python ask_gateways.py URL KEY CLIENTS SECONDS stream|whole
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import httpx

DEADLINE = 20.0


async def ask(client: httpx.AsyncClient, stream: bool) -> str:
    body = {"model": "small", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
    try:
        answer = await client.post("/chat/completions", json=body)
    except httpx.TimeoutException:
        return "late"
    except httpx.HTTPError as error:
        return f"{type(error).__name__}: {error}"
    if stream and answer.status_code == 200:
        return "ok" if answer.text.endswith("data: [DONE]\n\n") else f"cut: {answer.text[-200:]}"
    return "ok" if answer.status_code == 200 else f"HTTP {answer.status_code}: {answer.text[:200]}"


async def one(url: str, key: str, until: float, stream: bool) -> None:
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=DEADLINE, trust_env=False) as client:
        while time.time() < until:
            began = time.time()
            outcome = await ask(client, stream)
            print(json.dumps({"at": began, "s": round(time.time() - began, 3), "outcome": outcome}), flush=True)
            await asyncio.sleep(0.02)


async def main(url: str, key: str, clients: str, seconds: str, how: str) -> None:
    until = time.time() + float(seconds)
    await asyncio.gather(*(one(url, key, until, how == "stream") for _ in range(int(clients))))


asyncio.run(main(*sys.argv[1:]))
