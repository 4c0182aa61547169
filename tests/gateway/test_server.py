"""The gateway's process: where it listens, that there is one, how it starts and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Ran, full_disk, until
from provider import Loopback

from biollm._ownership import is_private
from biollm.client import StreamChunk, get_model_client
from biollm.errors import UsageError, install_command
from biollm.gateway import server as _serve

pytestmark = pytest.mark.slow  # each takes seconds

Biollm = Callable[..., Ran]
Waterfall = Callable[..., Path]
Gateway = Callable[..., dict[str, Any]]


def mode(path: Path) -> str:
    return oct(path.stat().st_mode & 0o777)


def alive(pid: int) -> bool:
    """Does the process run? One that has ended and was our child is waited for."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == 0
    except ChildProcessError:
        return Path(f"/proc/{pid}").exists()


def test_it_runs_in_the_background_answers_and_stops(
    net: Loopback, waterfall: Waterfall, runtime: Path, state: Path, biollm: Biollm
) -> None:
    folder = waterfall(first=net.serve(text="from the gateway"))
    assert biollm("serve", "status").out == "Gateway is not running.\n"
    started = biollm("serve", "--detach")
    assert started.code == 0, started.err
    assert started.out.startswith(f"listening on {runtime}/gateway.sock (pid ")
    assert f"exits after 2 h without a request; log: {state}/gateway.log" in started.out
    names = ("", "gateway.sock", "gateway.json", "gateway.lock")
    assert [mode(runtime / name) for name in names] == ["0o700", "0o600", "0o600", "0o600"]
    assert mode(state / "gateway.log") == "0o600"
    told = biollm("serve", "status", "--json").json
    assert (told["running"], told["same_configuration"], told["url"]) == (True, True, None)
    assert "sk-planted" not in (runtime / "gateway.json").read_text()

    answer = biollm("complete", "hi", "-v")
    assert (answer.code, answer.out) == (0, "from the gateway\n")
    assert "asking the gateway" in answer.err

    again = biollm("serve")
    assert (again.code, again.err.split("\n")[0]) == (
        2,
        "biollm: A gateway is already running, or still draining.",
    )
    assert biollm("serve", "--detach").code == 2

    (folder / "providers.yaml").write_text((folder / "providers.yaml").read_text() + "\n")
    assert biollm("serve", "status", "--json").json["same_configuration"] is False
    assert "The configuration has changed since it started" in biollm("serve", "status").out

    assert biollm("serve", "stop").out == "Stopped.\n"
    assert sorted(path.name for path in runtime.iterdir()) == ["gateway.lock"]
    until(lambda: not alive(told["pid"]))
    assert biollm("serve", "stop").out == "Gateway is not running.\n"
    assert biollm("serve", "status", "--json").json == {"running": False}


class Paused(BaseHTTPRequestHandler):
    """A provider that streams one word, and the next when it is let."""

    first, go = threading.Event(), threading.Event()

    def do_POST(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self.rfile.read(int(self.headers["content-length"]))
        for said, end in (("one ", None), ("two", None), (None, "stop")):
            delta = {"content": said} if said else {}
            chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "small",
                     "choices": [{"index": 0, "delta": delta, "finish_reason": end}]}  # fmt: skip
            self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
            self.first.set()
            self.go.wait(60)
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def paused() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Paused)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    Paused.go.set()
    server.shutdown()
    server.server_close()


def test_told_to_end_it_finishes_its_streams(
    waterfall: Waterfall, gateway: Gateway, runtime: Path, paused: str
) -> None:
    waterfall(first=paused)
    pid = gateway()["pid"]
    pieces = get_model_client().stream("hi")
    said = [str(next(pieces))]
    os.kill(pid, signal.SIGTERM)
    until(lambda: not (runtime / "gateway.sock").exists())
    assert _serve.running() is None
    assert alive(pid)
    with pytest.raises(UsageError, match="A gateway is already running"):  # it ends, but is not gone
        _serve.serve(say=print)
    Paused.go.set()
    rest = [piece for piece in pieces if isinstance(piece, StreamChunk)]
    assert "".join([*said, *map(str, rest)]) == "one two"
    assert rest[-1].completion
    until(lambda: not alive(pid))


def test_it_ends_when_nobody_asks(net: Loopback, waterfall: Waterfall, gateway: Gateway, runtime: Path) -> None:
    waterfall(first=net.serve())
    pid = gateway("--idle-timeout", "1")["pid"]
    until(lambda: not alive(pid))
    assert not (runtime / "gateway.sock").exists()


def test_a_request_puts_the_end_off() -> None:
    busy = _serve._Busy(workers=2)
    assert busy.left(-1) < 0
    busy.worker = 1
    busy.touched(1)
    busy.worker = 0
    assert busy.left(-1) == float("inf"), "another worker has a request in flight"
    assert busy.count == 0
    busy.worker = 1
    busy.touched(0)
    assert 50 < busy.left(60) <= 60
    assert busy.left(None) == float("inf")


def test_code_in_the_working_directory_is_not_run(
    net: Loopback, waterfall: Waterfall, runtime: Path, tmp_path: Path, biollm: Biollm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cloned repository must not be able to send a key: agents are started in one."""
    waterfall(first=net.serve())
    marker = tmp_path / "it ran"
    for name in ("biollm/__init__.py", "uvicorn.py", "pip/__main__.py"):
        (module := tmp_path / "cloned" / name).parent.mkdir(parents=True, exist_ok=True)
        module.write_text(f"from pathlib import Path; Path({str(marker)!r}).touch()")
    monkeypatch.chdir(tmp_path / "cloned")
    started = biollm("serve", "--detach")
    assert started.code == 0, started.err
    assert biollm("complete", "hi").code == 0
    assert biollm("serve", "stop").code == 0
    assert not marker.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="mounts a small file system")
def test_it_starts_where_its_log_is_on_a_full_disk(
    net: Loopback, waterfall: Waterfall, runtime: Path, state: Path, biollm: Biollm
) -> None:
    waterfall(first=net.serve(text="from the gateway"))
    with full_disk(state):
        started = biollm("serve", "--detach")
        assert (started.code, started.out.split("\n")[0]) == (
            0,
            "The gateway is running, but its log cannot be written.",
        )
        assert "from the gateway" in biollm("complete", "hi").out
        assert biollm("serve", "stop").code == 0


def test_workers_share_the_sockets_and_the_limits(
    net: Loopback, waterfall: Waterfall, runtime: Path, state: Path, biollm: Biollm
) -> None:
    server, second = net.serve(text="from first"), net.serve(text="from second")
    waterfall(first={"base_url": server.url, "rate_limit": "20/hour"}, second=second)
    started = biollm("serve", "--detach", "--workers", "3")
    assert started.code == 0, started.err
    parent = biollm("serve", "status", "--json").json["pid"]
    workers = [parent, *(int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split())]
    assert len(workers) == 3
    with ThreadPoolExecutor(6) as pool:
        texts = list(pool.map(lambda _: get_model_client().complete("hi").text, range(40)))
    counts = (texts.count("from first"), texts.count("from second"), len(server.completions))
    assert counts == (20, 20, 20), (state / "gateway.log").read_text()
    assert biollm("serve", "stop").out == "Stopped.\n"
    until(lambda: not any(alive(pid) for pid in workers))
    assert not (runtime / "gateway.sock").exists()


def test_workers_end_with_their_parent(net: Loopback, waterfall: Waterfall, runtime: Path, biollm: Biollm) -> None:
    waterfall(first=net.serve())
    biollm("serve", "--detach", "--workers", "2")
    parent = biollm("serve", "status", "--json").json["pid"]
    (child,) = (int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    os.kill(parent, signal.SIGKILL)
    until(lambda: not alive(child))
    assert biollm("serve", "--detach").code == 0, "the lock is free"
    biollm("serve", "stop")


def test_it_ends_when_its_socket_is_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    path.touch()
    inode = path.stat().st_ino
    path.rename(tmp_path / "old")
    path.touch()  # that of another gateway
    waits = threading.Thread(
        target=_serve._until_the_end, args=(threading.Event(), _serve._Busy(), None, path, inode), daemon=True
    )
    waits.start()
    waits.join(5)
    assert not waits.is_alive()


def test_it_forces_nothing_while_somebody_is_served() -> None:
    busy, server = _serve._Busy(), SimpleNamespace(should_exit=False, force_exit=False)
    busy.touched(1)
    drains = threading.Thread(target=_serve._drain, args=([server], [Future()], busy, 0.01), daemon=True)
    drains.start()
    until(lambda: server.should_exit)
    drains.join(1.5)  # longer than it waits once nobody is served
    assert drains.is_alive()
    assert not server.force_exit
    busy.touched(0)
    drains.join(30)
    assert server.force_exit


def test_what_is_wrong_is_told_at_once(waterfall: Waterfall, runtime: Path, net: Loopback, biollm: Biollm) -> None:
    folder = waterfall(first=net.serve())
    taken = net.refusing().split(":")[2].split("/")[0]
    ran = biollm("serve", "--detach", "--port", taken)
    assert (ran.code, ran.err) == (69, f"biollm: Cannot listen on 127.0.0.1, port {taken}: Address already in use.\n")
    (folder / "providers.yaml").write_text("providers: 7\n")
    ran = biollm("serve", "--detach")
    assert ran.code == 78, "a wrong configuration, as without --detach"
    assert f"{folder}/providers.yaml:1: providers" in ran.err


def test_an_answer_over_tcp_waits_for_no_acknowledgement() -> None:
    with _serve._tcp("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_sockets_folder_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # whose /tmp/biollm-54321 nobody can have made but root
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "absent"))
    try:
        with pytest.raises(UsageError, match="/tmp/biollm-54321 is not private"):
            _serve.home()
    finally:
        Path("/tmp/biollm-54321").rmdir()
    assert not (tmp_path / "absent").exists()


def test_a_folder_that_others_can_enter_is_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "biollm").mkdir(mode=0o755)
    assert not is_private(tmp_path / "biollm")
    (tmp_path / "biollm").chmod(0o700)
    assert _serve.home() == tmp_path / "biollm"


def test_a_sockets_path_has_107_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fits = tmp_path / ("x" * (107 - len(f"{tmp_path}//biollm/gateway.sock")))
    for folder in (fits, tmp_path / f"{fits.name}x"):
        folder.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(fits))
    _serve._unix(_serve.home() / "gateway.sock").close()
    monkeypatch.setenv("XDG_RUNTIME_DIR", f"{fits}x")
    with pytest.raises(UsageError, match="is too long for a socket: over 107 bytes"):
        _serve.home()


def test_without_the_extra_it_says_what_to_install(net: Loopback, waterfall: Waterfall, runtime: Path) -> None:
    waterfall(first=net.serve())
    code = (
        "import sys; sys.modules['starlette'] = None; sys.argv = ['biollm', 'serve']; import biollm.cli as c; c.main()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 69
    assert ran.stderr.splitlines()[-1] == install_command("serve")
