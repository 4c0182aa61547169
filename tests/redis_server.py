"""A real redis-server for the tests, and a proxy before it that delays or withholds what passes."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import debian
import pytest
import redis

from biollm.config.schema import LedgerServer


def required() -> None:
    """Skip the test where redis-server is missing; install it first, and insist on it, where the real parts are required."""
    if shutil.which("redis-server"):
        return
    if os.environ.get("BIOLLM_REQUIRE_REAL") != "1":
        pytest.skip("redis-server is not installed")
    debian.install("redis-server")
    assert shutil.which("redis-server"), "required, but missing: redis-server"


def free_port() -> int:
    """Return a port of loopback that nothing uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class RedisServer:
    """A redis-server on a free port of loopback that writes nothing to disk."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.options, self.port = folder, options, free_port()
        self.start()

    def start(self) -> None:
        """Start it, empty, and wait until it answers."""
        command = ("redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", self.folder)
        self._process = subprocess.Popen((*command, *self.options), stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with suppress(redis.ConnectionError), redis.Redis(port=self.port) as client:
                client.ping()
                return
            time.sleep(0.02)
        raise AssertionError("redis-server did not start")

    def stop(self) -> None:
        """Kill it: it loses its data."""
        self._process.send_signal(signal.SIGCONT)
        self._process.kill()
        self._process.wait()

    def pause(self, paused: bool) -> None:
        """Stop it from running, or let it go on; its connections stay."""
        self._process.send_signal(signal.SIGSTOP if paused else signal.SIGCONT)

    def call(self, *command: Any) -> Any:
        """Return what it answers to a command."""
        with redis.Redis(port=self.port, decode_responses=True) as client:
            return client.execute_command(*command)

    @property
    def product(self) -> str:
        """Return "Redis" or "Valkey": Debian's later releases install one as the other."""
        return subprocess.check_output(["redis-server", "--version"], text=True).split()[0]

    @property
    def server(self) -> LedgerServer:
        """Return what providers.yaml holds of it."""
        return LedgerServer(url=f"redis://127.0.0.1:{self.port}/0")


class SlowProxy:
    """A TCP proxy on loopback that delivers answers `delay` seconds late, or breaks the connection instead: `lose` times."""

    def __init__(self, port: int, delay: float) -> None:
        self._to, self.delay, self.lose = port, delay, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no further connection."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._to))
                for source, target in ((client, server), (server, client)):
                    threading.Thread(target=self._copy, args=(source, target, server), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                time.sleep(self.delay if source is server else 0)
                if source is server and self.lose:
                    self.lose -= 1
                    break
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
