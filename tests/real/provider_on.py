"""Serves the loopback provider of the tests on another address, and says how many completions it was asked for.

python provider_on.py ADDRESS [START_ID KEY]

A stream takes 4 s. Port 9000 is the provider, 9001 answers with the number.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from behaviours import Behaviour
from provider import Loopback, Request


def behave(request: Request) -> Behaviour:
    return Behaviour(fragments=20, every=0.2) if request.body.get("stream") else Behaviour()


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


async def main(address: str, *proof: str) -> None:
    with Loopback() as net:
        server = net.serve(then=behave, text="fine " * 20, models=("small", "mine"))
        if proof:
            server.start_id, server.key = proof
        port = int(server.url.rsplit(":", 1)[1].split("/")[0])

        async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, back = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.gather(copy(reader, back), copy(there, writer))

        async def count(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            body = str(len(server.completions))
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode())
            writer.close()

        await asyncio.start_server(forward, address, 9000)
        await asyncio.start_server(count, address, 9001)
        print("ready", flush=True)
        await asyncio.Event().wait()


asyncio.run(main(*sys.argv[1:]))
