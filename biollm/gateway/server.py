"""Runs the gateway on a private Unix socket and, with --port, on TCP for clients with a key.

LiteLLM's proxy serves TCP only, without a key by default, and drops its streams on SIGTERM.
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import json
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biollm._files import private_folder, write_private
from biollm._ownership import is_private
from biollm._runtime import background, ledger, start_background
from biollm.client.remote import RECORD, SOCKET, connect, folders, identity, record
from biollm.config.paths import own_dir, state_dir
from biollm.errors import ConfigError, UnavailableError, UsageError, install_command
from biollm.slurm import scaling

if TYPE_CHECKING:
    import uvicorn

    from biollm.client import Client
    from biollm.config import Config

Record = dict[str, Any]
IDLE = 2 * 3600.0  # seconds without a request until a detached gateway ends
_RUNNING = "A gateway is already running, or still draining."
_SEE = "See `biollm serve status`; `biollm serve stop` stops it."
_LONGEST = 107  # bytes of a Unix socket's path, without the 0 at its end
_CONNECTIONS = 256  # at once, of the TCP port
_ALERTS = 60.0  # seconds between two looks at the alerts
_LOOK = 10.0  # seconds between two looks at whether the socket is still there, and at the scaled models
_FLUSH = 5.0  # seconds for the last bytes of the last answers, when somebody keeps the page open


class _Busy:
    """How many requests each worker has in flight, and since when there were none; in memory that they share.

    Its last byte says whether the gateway is draining: a balancer is to send requests elsewhere.
    """

    _ROW = struct.Struct("qd")  # requests, monotonic seconds

    def __init__(self, workers: int = 1) -> None:
        self._rows, self.worker = mmap.mmap(-1, workers * self._ROW.size + 1), 0
        for self.worker in reversed(range(workers)):
            self.touched(0)

    @property
    def count(self) -> int:
        """Return the requests that this worker has in flight."""
        return self._ROW.unpack_from(self._rows, self.worker * self._ROW.size)[0]

    @property
    def draining(self) -> bool:
        """Return whether all workers are to end soon."""
        return bool(self._rows[-1])

    def drain(self) -> None:
        """Let all workers know that they are to end soon."""
        self._rows[-1] = 1

    def touched(self, count: int) -> None:
        """Note the requests that this worker has in flight now."""
        self._ROW.pack_into(self._rows, self.worker * self._ROW.size, count, time.monotonic())

    def left(self, idle: float | None) -> float:
        """Return the seconds until all workers have been idle for too long."""
        counts, since = zip(*self._ROW.iter_unpack(self._rows[:-1]), strict=True)
        return float("inf") if idle is None or any(counts) else max(since) + idle - time.monotonic()


def serve(
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    idle: float | None = None,
    workers: int = 1,
    drain: float = 0.0,
    names: Sequence[str] = (),
    say: Callable[[str], None],
) -> None:
    """Serve until SIGTERM, SIGINT or `idle` seconds without a request; requests in flight are finished.

    Args:
        host, port: Where to listen for clients with a key as well; port 0 is a free one.
        idle: Seconds.
        workers: Processes that share the sockets. Limits hold over all of them, as over any processes.
        drain: Seconds after a signal for which requests are still taken, while /health and /ready answer 503 and each
            connection is closed after its answer: a balancer then sends the next ones elsewhere.
        names: Further host names by which clients reach it, such as a balancer's.
        say: Called with each line of where it listens.

    Raises:
        UsageError: A gateway is running, the port is taken, or there is no suitable folder for the socket.
    """
    make_app = module("app").app
    from biollm.client import Client

    os.environ["BIOLLM_GATEWAY"] = "off"  # it answers itself
    mine, busy, end = identity(), _Busy(workers), threading.Event()
    with Client(sender="direct") as client, _alone(home()) as folder:
        app = make_app(client, touched=busy.touched, draining=lambda: busy.draining)
        path, url, where = folder / SOCKET, None, None
        listening, notes = [(_server(app), _unix(path))], [f"listening on {path} (pid {os.getpid()})"]
        if port is not None:
            server, listener, url, where = _with_keys(app, client.config, host, port, names)
            listening.append((server, listener))
            notes.append(f"and on {url}/v1 for the key in {where}")
        parent, children = os.getpid(), _fork(workers - 1)
        busy.worker = 0 if os.getpid() == parent else len(children) + 1
        _end_on_signals(end)
        _use_uvloop()
        running = [_start(server, listener) for server, listener in listening]
        servers, inode = [server for server, _ in listening], path.stat().st_ino
        if os.getpid() != parent:
            _warm_up(client)
            _until_the_end(end, busy, None, path, inode, parent)
            _drain(servers, running, busy)
            ledger(client.config).close()
            os._exit(0)  # the files in the folder are the parent's
        facts = {"pid": os.getpid(), "started": time.time(), "identity": mine, "url": url, "keys": where}
        write_private(folder / RECORD, json.dumps({**facts, "lacks": _lacks(client.config)}))
        for line in notes:
            say(line)
        _watch(client.config, end, say)
        _warm_up(client)
        try:
            _until_the_end(end, busy, idle, path, inode)
            busy.drain()
            (folder / RECORD).unlink(missing_ok=True)
            if end.is_set():
                time.sleep(drain)
        finally:
            (folder / RECORD).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            for child in children:
                os.kill(child, signal.SIGTERM)
        end.set()
        _drain(servers, running, busy)
        for child in children:
            os.waitpid(child, 0)


def _watch(config: Config, end: threading.Event, say: Callable[[str], None]) -> None:
    """Evaluate the alerts and scale the models, each in a thread of its own, where they are configured."""
    for name, wanted, work in (
        ("alerts", config.alerts.active, _alert),
        ("scaling", scaling.scaled(config), _scale),
    ):
        if wanted:
            threading.Thread(target=work, args=(config, end, say), name=f"biollm-{name}", daemon=True).start()


def _use_uvloop() -> None:
    with suppress(ImportError):
        import uvloop

        start_background(uvloop.new_event_loop())


def _fork(count: int) -> list[int]:
    """Start so many workers, before there is any thread; return their process ids, as far as a worker knows them."""
    children: list[int] = []
    while len(children) < count and (child := os.fork()):
        children.append(child)
    return children


def module(name: str) -> Any:
    """Return a module of the gateway that needs the packages of the extra `serve`.

    Raises:
        UnavailableError: They are not installed.
    """
    try:
        return import_module(f"biollm.gateway.{name}")
    except ImportError as error:
        raise UnavailableError(f"{error.name} is not installed.", hint=install_command("serve")) from None


def _warm_up(client: Client) -> None:
    """Import LiteLLM now if the first deployment needs it, so that the first request need not wait for it."""
    from biollm.routing import direct, import_router

    first = next((each.deployment for each in client.explain() if each.status == "ready"), None)
    if client.config.routing.sender == "litellm" or (first and not direct.speaks(first)):
        import_router()
    gc.collect()
    gc.freeze()  # what there is now stays: no collection need look at it again


def _with_keys(
    app: Any, config: Config, host: str, port: int, names: Sequence[str]
) -> tuple[uvicorn.Server, socket.socket, str, str]:
    """Return a server for clients with a key, its socket and URL, and where the keys are."""
    from biollm.gateway.auth import Admission
    from biollm.gateway.keys import keys
    from biollm.gateway.request_id import RequestId

    known, where = keys()
    listener = _tcp(host, port)
    url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    return (
        _server(RequestId(Admission(app, known, host, config, names)), limit_concurrency=_CONNECTIONS),
        listener,
        url,
        where,
    )


def _lacks(config: Config) -> list[str]:
    """Return the variables that should hold keys, and are not set here."""
    accounts = [account for provider in config.providers for account in provider.accounts]
    names = [each.env_key for each in accounts if each.env_key and not each.key_file]
    return sorted({name for name in names if not os.environ.get(name)})


def _alert(config: Config, end: threading.Event, say: Callable[[str], None]) -> None:
    """Evaluate the rules of `alerts:` every minute, in a thread of its own, so that no target delays an answer."""
    from biollm.monitoring import alerts
    from biollm.monitoring.snapshot import Collector

    top = Collector.of_process(config)
    while not end.is_set():
        try:
            alerts.check(config, ledger(config), top.snapshot(), state_dir(), say, log=True)
        except Exception as error:  # the next look may be better
            say(f"The alerts could not be evaluated: {error}")
        end.wait(_ALERTS)


def _scale(config: Config, end: threading.Event, say: Callable[[str], None]) -> None:
    """Start and stop servers with the demand, unless another process does."""
    from biollm.monitoring.usage import ending_budgets

    while not end.is_set():
        try:
            with scaling.controlling(config.cluster) as alone:
                while alone and not end.is_set():
                    for model, decision in scaling.look(
                        config, ledger(config), ending_budgets(config, ledger(config))
                    ).items():
                        if decision.change:
                            say(f"{model}: {decision.line}")
                    end.wait(_LOOK)
            end.wait(_LOOK)
        except Exception as error:  # the next look may be better
            say(f"Scaling failed: {error}")
            end.wait(_ALERTS)


def _end_on_signals(end: threading.Event) -> None:
    def on_signal(_number: int, _frame: object) -> None:
        if end.is_set():  # the second signal: at once
            os._exit(1)
        end.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)


def _server(app: Any, **limits: Any) -> uvicorn.Server:
    import uvicorn

    config = uvicorn.Config(
        app, lifespan="off", log_config=None, access_log=False, ws="none", server_header=False, proxy_headers=False,
        timeout_keep_alive=75, **limits,
    )  # fmt: skip
    return uvicorn.Server(config)


def _start(server: uvicorn.Server, listener: socket.socket) -> Future[None]:
    """Serve on the waterfall's loop, so that a request crosses no thread."""
    future = asyncio.run_coroutine_threadsafe(server.serve([listener]), background().loop)
    while not (server.started or future.done()):
        time.sleep(0.005)
    if future.done():
        future.result()
    return future


def _until_the_end(
    end: threading.Event, busy: _Busy, idle: float | None, path: Path, inode: int, parent: int | None = None
) -> None:
    """Wait for a signal, for `idle` seconds without a request, or until the parent or the socket is gone: systemd takes
    XDG_RUNTIME_DIR away after the last logout."""
    while _is_there(path, inode) and (left := busy.left(idle)) > 0 and not end.wait(min(left, _LOOK)):
        if parent not in (None, os.getppid()):
            return


def _is_there(path: Path, inode: int) -> bool:
    with suppress(OSError):
        return path.stat().st_ino == inode
    return False


def _drain(
    servers: Sequence[uvicorn.Server], running: Sequence[Future[None]], busy: _Busy, flush: float = _FLUSH
) -> None:
    """Accept no more requests, finish those in flight, and close what is left: pages that follow the events."""
    for server in servers:
        server.should_exit = True
    while busy.count:
        time.sleep(0.05)
    wait(running, flush)
    for server in servers:
        server.force_exit = True
    wait(running, 1)


def home() -> Path:
    """Return the folder for the socket; it is made if missing.

    Raises:
        UsageError: No folder is private, or its path is too long.
    """
    for folder in folders():
        with suppress(OSError):
            if folder.parent.is_dir() and is_private(private_folder(folder)):
                if len(os.fsencode(folder / SOCKET)) > _LONGEST:
                    hint = "Set XDG_RUNTIME_DIR to a private folder with a shorter path."
                    raise UsageError(f"{folder / SOCKET} is too long for a socket: over {_LONGEST} bytes.", hint=hint)
                return folder
    last = folders()[-1]
    raise UsageError(f"{last} is not private.", hint="Set XDG_RUNTIME_DIR to a folder of yours with mode 0700.")


@contextmanager
def _alone(folder: Path) -> Generator[Path]:
    """Hold the folder's lock: one gateway per user and host."""
    handle = os.open(folder / "gateway.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        for _ in range(20):  # `stop` looks at the lock too, for a moment
            with suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.05)
        else:
            raise UsageError(_RUNNING, hint=_SEE)
        yield folder
    finally:
        os.close(handle)


def _unix(path: Path) -> socket.socket:
    if path.is_socket() and not path.is_symlink():  # left by a gateway that was killed
        path.unlink()
    elif os.path.lexists(path):
        raise UsageError(f"{path} is not a socket.", hint="Move it away: the gateway listens there.")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))  # in a private folder
    path.chmod(0o600)
    return listener


def _tcp(host: str, port: int) -> socket.socket:
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        why = str(error.strerror).partition(" (")[0]  # Python adds the address
        raise UsageError(f"Cannot listen on {host}, port {port}: {why}.") from None
    # asyncio does so only for sockets that it made itself; without it an answer waits 40 ms for an acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def running() -> Record | None:
    """Return the record of the running gateway; None if there is none."""
    for folder in folders():
        with suppress(OSError):
            connect(folder / SOCKET).close()
            if (told := record(folder)) and "pid" in told:
                return {**told, "socket": str(folder / SOCKET)}
    return None


def stop(patience: float) -> bool:
    """Stop the running gateway; return whether it has ended within `patience` seconds."""
    if (told := running()) is None:
        return True
    os.kill(told["pid"], signal.SIGTERM)
    deadline, lock = time.monotonic() + patience, Path(told["socket"]).with_name("gateway.lock")
    with lock.open() as handle:
        while time.monotonic() < deadline:
            with suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return True
            time.sleep(0.05)
    return False


def detach(arguments: Sequence[str], patience: float = 60) -> tuple[Record, Path]:
    """Run `biollm serve` with these arguments in a session of its own; return its record and log once it answers.

    Raises:
        UsageError: A gateway is already running.
        UnavailableError: It ended at once; the message is the end of its log.
    """
    if running():
        raise UsageError(_RUNNING, hint=_SEE)
    log = own_dir(state_dir()) / "gateway.log"
    write_private(log, "")
    command = [sys.executable, "-P", "-c", "from biollm.cli import main; main()", "serve", *arguments]
    with log.open("a") as file:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True)
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        found = running()
        if found and found["pid"] == child.pid:
            late = time.time() > found["started"] + 2  # on a full disk the log stays empty
            if late or "listening on" in log.read_text(errors="replace"):
                return found, log
        if child.poll() is not None:
            written = log.read_text(errors="replace").strip().removeprefix("biollm: ")
            error = UnavailableError(written[-2000:] or f"The gateway ended with exit code {child.returncode}.")
            if child.returncode == ConfigError.exit_code:  # as without --detach
                error.exit_code = child.returncode
            raise error
        time.sleep(0.02)
    child.terminate()
    raise UnavailableError(f"The gateway did not start within {patience:.0f} s.", hint=f"Its log is {log}.")
