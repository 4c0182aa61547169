"""The gateway on a Unix socket, over a waterfall written in one line."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from conftest import until
from starlette.types import ASGIApp

from biollm.client import Client
from biollm.gateway import app as gateway


@contextmanager
def serving(app: ASGIApp, path: Path) -> Generator[httpx.Client]:
    """Serve `app` on a Unix socket in a thread; give a client of it."""
    server = uvicorn.Server(uvicorn.Config(app, uds=str(path), lifespan="off", log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://x", timeout=60) as client:
            yield client
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


@pytest.fixture
def serve(waterfall: Callable[..., Path], tmp_path: Path) -> Generator[Callable[..., httpx.Client]]:
    """Serve a waterfall, written as `waterfall` takes it."""
    stack: list[Any] = []

    def start(*top: Mapping[str, Any], touched: Callable[[int], None] | None = None, **rungs: Any) -> httpx.Client:
        waterfall(*top, **rungs)
        running = serving(gateway.app(Client(), touched=touched), tmp_path / "s")
        stack.append(running)
        return running.__enter__()

    yield start
    for running in stack:
        running.__exit__(None, None, None)
