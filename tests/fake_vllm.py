"""A stand-in for `vllm serve` that starts at once: takes vLLM's arguments, loads the middleware, answers.

    python fake_vllm.py serve MODEL --port N --middleware MODULE.CLASS [--fake WHAT] ...

Without --fake, a file `fake` in the folder MODEL tells WHAT.

Only for tests of the supervisor's own behaviour; what vLLM does is tested with the real one. WHAT: `crash`
(exit 3 at once), `mute` (never listens, as vLLM on a taken port), `die:S` (exit 5 after S seconds), `slow:S`
(answers completions after S seconds), `refuse` (completions fail), `stubborn` (ignores TERM), `eat` (2 GB).
"""

import argparse
import asyncio
import importlib
import json
import os
import signal
import sys
from pathlib import Path


def application(what: str, served: str):
    async def app(scope, receive, send):
        request = await receive()
        while request.get("more_body"):
            request = await receive()
        status, body = 200, {}
        if scope["path"] == "/v1/models":
            body = {"data": [{"id": served}]}
        elif scope["path"] in ("/v1/completions", "/v1/chat/completions"):
            await asyncio.sleep(float(what.partition(":")[2] or 0) if what.startswith("slow") else 0)
            status = 500 if what == "refuse" else 200
            choice = {
                "index": 0,
                "text": "hi",
                "message": {"role": "assistant", "content": "hi"},
                "finish_reason": "stop",
            }
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            body = {
                "id": "1",
                "object": "chat.completion",
                "created": 1,
                "model": served,
                "usage": usage,
                "choices": [choice],
            }
        elif scope["path"] not in ("/health", "/metrics"):
            status = 404
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})

    return app


async def converse(app, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve one connection, request by request, as uvicorn does."""
    while True:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):  # the client went away
            writer.close()
            return
        method, target, _ = head[0].split(" ")
        path, _, query = target.partition("?")
        pairs = [line.split(": ", 1) for line in head[1:] if line]
        headers = [(name.lower().encode(), value.encode()) for name, value in pairs]
        body = await reader.readexactly(int(dict(headers).get(b"content-length", 0)))

        async def receive(body=body):
            return {"type": "http.request", "body": body}

        started = {}

        async def send(message, started=started):
            if message["type"] == "http.response.start":
                started.update(message)
                return
            writer.write(f"HTTP/1.1 {started['status']} -\r\ncontent-length: {len(message['body'])}\r\n".encode())
            writer.write(b"".join(b"%s: %s\r\n" % pair for pair in started["headers"]) + b"\r\n" + message["body"])

        scope = {"type": "http", "method": method, "path": path, "query_string": query.encode(), "headers": headers}
        await app(scope, receive, send)
        await writer.drain()


async def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("serve")
    parser.add_argument("model")
    for name in ("--host", "--served-model-name", "--middleware"):
        parser.add_argument(name)
    parser.add_argument("--port", type=int)
    parser.add_argument("--fake", default="")
    options, _ = parser.parse_known_args()
    told = Path(options.model, "fake")
    what = options.fake or (told.read_text() if told.exists() else "")
    print("fake vLLM:", *sys.argv[1:], flush=True)
    if what == "crash":
        print("ValueError: the weights are broken", file=sys.stderr)
        sys.exit(3)
    stopped = asyncio.Event()
    stop = (lambda: None) if what == "stubborn" else stopped.set
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    if what == "eat":
        eaten = b"x" * 2_000_000_000
        await stopped.wait()
        sys.exit(len(eaten) % 2)
    if what.startswith("die"):
        asyncio.get_running_loop().call_later(float(what.partition(":")[2]), sys.exit, 5)
    module, _, name = options.middleware.rpartition(".")
    app = getattr(importlib.import_module(module), name)(application(what, options.served_model_name))
    if what == "mute":
        await stopped.wait()
        return
    await asyncio.start_server(lambda r, w: converse(app, r, w), options.host, options.port, reuse_address=True)
    await stopped.wait()
    os._exit(0)  # requests in flight are cut, as by vLLM itself: whoever stops it has drained it before


asyncio.run(main())
