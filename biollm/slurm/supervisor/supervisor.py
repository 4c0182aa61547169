"""Runs on the compute node as the job itself: starts the model servers, guards, publishes and stops them.

Standard library only (Python 3.9), since it runs under the serving environment's Python; not bash, which
loses signals in subshells. Beside it lies the middleware of the servers, STEM_guard.py.

What Slurm lacks: it knows jobs, not whether a server answers, is busy or idle; what vLLM lacks: a second
server on a taken port says that it started. So every start has an id that each of its answers names, and a
key, and is published only after a completion:

    records/START.json     the record, renewed every 5 s while the server answers; gone before the server is
    starts/START/key       the key (0600; readable by a group with --share)
    jobs/TICKET.events     one line of JSON for each change of state, written as it happens
    jobs/NAME.stop         written by `biollm down` for a ticket or a chain, and by an idle chain
"""

from __future__ import annotations

import argparse
import contextlib
import hmac
import http.client
import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

KILL_S = 10.0  # from TERM to KILL
HANDOVER_S = 20.0  # before the end of the job a predecessor leaves even without a successor
CANCEL_S = 20.0  # to finish requests after Slurm's TERM; its KILL comes 30 s after (KillWait)
ANYWHERE = "0.0.0.0"  # noqa: S104 - the guard asks for the key on every interface


class Ended(Exception):  # noqa: N818 - an end, not always an error
    """A server is over: its last state, why, and the exit code."""

    def __init__(self, state: str, reason: str, code: int) -> None:
        super().__init__(reason)
        self.state, self.reason, self.code = state, reason, code


class Job:
    """What the servers of one job share: spec, folders, the end of the walltime, the wish to leave."""

    def __init__(self, spec: dict[str, Any], options: argparse.Namespace) -> None:
        self.spec, self.options = spec, options
        self.id = os.environ.get("SLURM_JOB_ID", "0")
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        self.rank = int(os.environ.get("SLURM_PROCID") or 0) if spec["nodes"] > 1 else 0
        self.ticket: str = options.ticket or f"{spec['cluster']}-{self.id}"
        self.beat = float(spec.get("beat", 5))  # seconds between renewals; readers call a record dead after 20
        self.grace = float(spec.get("grace", 3))  # seconds for clients to see that a record is gone
        self.run = Path(spec["run_dir"])
        self.jobs = self.run / "jobs"
        self.rendezvous = self.jobs / f"{self.ticket}-{self.restart}.master"
        self.host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self.address, self.bind = self._addresses()
        self.why = ""  # why the job leaves; empty while it is to stay
        self.servers: list[Server] = []
        # Rendered, since Slurm tells a job its end only from 23.02 on, and by the controller's clock
        walltime = float(spec["walltime"])
        if told := os.environ.get("SLURM_JOB_END_TIME"):
            walltime = min(walltime, max(float(told) - time.time(), 60.0))
        self._end = time.monotonic() + walltime

    def _addresses(self) -> tuple[str, str]:
        """Return the address to publish (what the controller calls this node) and the one to listen on."""
        nodes: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError):
            nodes = json.loads((self.run / f"nodes-{self.spec['cluster']}.json").read_text())
        address = nodes.get(self.host, self.host)
        try:
            found = socket.gethostbyname(address)
            _hold(found).close()
        except OSError:  # unknown here, or the outer side of an address translation
            return address, ANYWHERE
        # Debian's /etc/hosts calls a machine's own name 127.0.1.1, which no other machine reaches
        return address, ANYWHERE if found.startswith("127.") and found != address else found

    def left(self) -> float:
        """Seconds of walltime left."""
        return self._end - time.monotonic()

    def leave(self, why: str) -> None:
        """Ask every server to drain and stop."""
        self.why = self.why or why
        for server in self.servers:
            server.wake.set()

    def told_to_stop(self) -> bool:
        """Has somebody written the stop mark of this ticket or chain?"""
        names = filter(None, (self.ticket, self.options.chain))
        return any((self.jobs / f"{name}.stop").exists() for name in names)

    def event(self, model: str, state: str, reason: str = "", **detail: Any) -> None:
        """Write one change of state: to the job's log, and where `biollm up` and `status` read it."""
        _say(f"{model} {state} {reason}")
        if self.rank and state != "failed":
            return  # the first node speaks for the server
        entry = {"at": time.time(), "model": model, "state": state, "reason": reason, "restart": self.restart}
        line = json.dumps({**entry, "job": self.id, "host": self.host, **detail}) + "\n"
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
            file = os.open(self.jobs / f"{self.ticket}.events", flags, 0o600)
            with os.fdopen(file, "a") as stream:
                stream.write(line)
        except OSError as error:
            _say(f"cannot write the state: {error}")

    def share(self, path: Path, mode: int) -> None:
        """Open `path` to the group of --share."""
        if self.options.share:
            shutil.chown(path, group=self.options.share)
            path.chmod(mode)

    def check_idle(self) -> None:
        """Leave once every server that still runs has been idle long enough: the GPUs are billed together."""
        limit = self.spec["idle_timeout"]
        if limit and all(server.idle >= limit for server in self.servers if server.code is None):
            if self.options.chain:
                with contextlib.suppress(OSError):
                    (self.jobs / f"{self.options.chain}.stop").touch()
            self.leave("idle")


class Server:
    """One model's server in its own process group, from its start to its end."""

    def __init__(self, job: Job, model: dict[str, Any], devices: str | None) -> None:
        self.job, self.model, self.devices = job, model, devices
        self.name: str = model["name"]
        self.idle = 0.0  # seconds; stays 0 until the first ready, so that a slow start is not idleness
        self.wake = threading.Event()  # set when the process ends or the job leaves
        self.code: int | None = None  # of the exit; None while it runs
        rank = f"-rank{job.rank}" if job.rank else ""
        self._log = Path(job.spec["log_dir"]) / f"{self.name.replace('/', '_')}-{job.id}{rank}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._began = time.monotonic()
        self._lifeline = self._port = -1
        self._start = self._key = ""

    def run(self) -> None:
        """Start, publish, renew, drain and stop; `code` is then the server's share of the job's exit code."""
        # inherited by the server, which it would kill: Slurm signals every process of a step
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        ended = Ended("failed", "the supervisor broke", 70)
        try:
            if self.job.rank:
                self._follow()
            else:
                self._lead()
        except Ended as end:
            ended = end
        except Exception as error:
            ended = Ended("failed", f"cannot run the server: {error!r}", 71)
        last = {"code": ended.code, "log": str(self._log)}
        if ended.state == "failed":  # said at once; stopped only when it has
            self.job.event(self.name, "failed", ended.reason, **last)
            self._clear()
        else:
            self._clear()
            self.job.event(self.name, "stopped", ended.reason, **last)
        self.code = ended.code

    def _lead(self) -> None:
        for _ in range(3 if self.job.spec["nodes"] == 1 else 1):
            with _hold(self.job.bind) as held:
                self._launch(held.getsockname()[1])
                ready = self._await_ready()
            if ready:
                break
            self.job.event(self.name, "restarting", f"another process answers on port {self._port}")
            self._clear()
        else:
            raise Ended("failed", "the ports it got were taken by other processes", 69)
        self._complete()
        self._publish()
        self._serve()
        self._drain()

    def _launch(self, port: int) -> None:
        """Start the server with an id and a key of its own; neither is in its arguments."""
        job, self._start, self._key, self._port = self.job, uuid.uuid4().hex, secrets.token_urlsafe(32), port
        self._folder.mkdir(parents=True)
        key_file = self._folder / "key"
        _write(key_file, self._key)
        job.share(key_file, 0o640)
        job.share(self._folder, 0o750)
        argv = [*self.model["argv"], "--host", job.bind, "--port", str(port), "--api-server-count", "1"]
        argv += [
            "--middleware",
            f"{Path(__file__).stem}_guard.Guard",
            "--shutdown-timeout",
            str(int(CANCEL_S)),
        ]
        if job.spec["nodes"] > 1:
            with _hold(job.bind) as held:
                master = str(held.getsockname()[1])
            _write(job.rendezvous, json.dumps([job.address, master]))
            argv += ["--node-rank", "0", "--master-addr", job.address, "--master-port", master]
        reader, self._lifeline = os.pipe()
        env = {"BIOLLM_START": self._start, "BIOLLM_KEY_FILE": str(key_file), "BIOLLM_LIFELINE": str(reader)}
        try:
            self._spawn(argv, env, reader)
        finally:
            os.close(reader)
        job.event(self.name, "starting", log=str(self._log), start=self._start, port=port)

    def _follow(self) -> None:
        """Serve as a further node of a model that spans several, until the first node leaves."""
        self._wait_while(lambda: not self.job.rendezvous.exists())
        address, port = json.loads(self.job.rendezvous.read_text())
        rank = ["--headless", "--node-rank", str(self.job.rank)]
        self._spawn([*self.model["argv"], *rank, "--master-addr", address, "--master-port", port], {})
        self.job.event(self.name, "starting", f"as rank {self.job.rank}", log=str(self._log))
        self._wait_while(self.job.rendezvous.exists)
        raise Ended("stopped", "the first node left", 0)

    def _wait_while(self, condition: Callable[[], bool]) -> None:
        while condition():
            self._check()
            self.wake.wait(1)

    def _spawn(self, argv: list[str], extra: dict[str, str], *descriptors: int) -> None:
        env = {**os.environ, **extra}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), env.get("PYTHONPATH")]))
        if self.devices is not None:
            env["CUDA_VISIBLE_DEVICES"] = self.devices
        if self.job.spec["nodes"] > 1:
            env.setdefault("VLLM_HOST_IP", socket.gethostbyname(self.job.address))
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                argv, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=descriptors,
                start_new_session=True,
            )  # fmt: skip
        self._process = process

        def wait() -> None:
            process.wait()
            self.wake.set()

        threading.Thread(target=wait, daemon=True).start()

    def _check(self) -> None:
        """Raise `Ended` when the job leaves or the process has ended."""
        code = self._process.poll() if self._process else None
        if code in (0, -signal.SIGTERM):  # Slurm signals every process of a job: our TERM may be on its way
            time.sleep(0.5)
        if self.job.why:
            raise Ended("stopped", self.job.why, 0)
        self._check_process()

    def _check_process(self) -> None:
        code = self._process.poll() if self._process else None
        if code is not None:  # unasked, so it has failed, even with exit code 0
            said = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise Ended("failed", f"the server ended by {said}", 128 - code if code < 0 else code or 70)

    def _await_ready(self) -> bool:
        """Wait until this very start answers /health; False when another process answers on the port.

        Until it has proved its start, whoever listens there does not get the key.
        """
        while True:
            self._check()
            if self._time_to_start() <= 0:
                limit = self.model["start_timeout"]
                raise Ended("failed", f"not ready within the start timeout of {limit} s", 75)
            nonce = secrets.token_hex(16)
            answer = self._ask("GET", f"/health?nonce={nonce}", timeout=5, known=False)
            if answer and answer[0] < 500:
                proof = hmac.new(self._key.encode(), (nonce + self._start).encode(), "sha256").hexdigest()
                if not hmac.compare_digest(answer[1].get("x-biollm-proof", "").encode(), proof.encode()):
                    return False
                if answer[0] == 200:
                    return True
            self.wake.wait(0.25)

    def _time_to_start(self) -> float:
        return self._began + self.model["start_timeout"] - time.monotonic()

    def _complete(self) -> None:
        """Have the server complete one token: of several nodes /health is fine while one is dead."""
        body = json.dumps({"model": self.name, "prompt": "Hello", "max_tokens": 1})
        answer = self._ask("POST", "/v1/completions", body, timeout=max(1.0, self._time_to_start()))
        self._check()
        if not answer or answer[0] != 200:
            said = f"HTTP {answer[0]}: {answer[2][:300]}" if answer else "no answer"
            raise Ended("failed", f"healthy, but the first completion failed: {said}", 70)

    def _ask(self, method: str, path: str, body: str | None = None, *, timeout: float, known: bool = True) -> Any:
        """Return (status, headers, text) of one request to the server, or None; no proxy is in between.

        The key goes with it where the server is `known`.
        """
        host = "127.0.0.1" if self.job.bind == ANYWHERE else self.job.bind
        connection = http.client.HTTPConnection(host, self._port, timeout=timeout)
        headers = {"Content-Type": "application/json"}
        if known:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read().decode()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    @property
    def _folder(self) -> Path:
        return self.job.run / "starts" / self._start

    @property
    def _record(self) -> Path:
        return self.job.run / "records" / f"{self._start}.json"

    def _publish(self) -> None:
        job, options, up = self.job, self.job.options, time.monotonic() - self._began
        record = {"v": 1, "start": self._start, "cluster": job.spec["cluster"], "job": job.id,
                  "ticket": job.ticket, "restart": job.restart, "model": self.name, "host": job.host,
                  "address": job.address, "port": self._port, "left_s": int(job.left()), "up_s": int(up),
                  "chain": options.chain, "link": options.link}  # fmt: skip
        new = self._record.with_suffix(".new")
        _write(new, json.dumps(record))
        job.share(new, 0o640)
        new.replace(self._record)

    def _renew(self) -> None:
        """Publish again; a full disk costs the record its seconds left, not the server its place."""
        try:
            self._publish()
        except OSError as error:
            _say(f"cannot renew the record: {error}")
            with contextlib.suppress(OSError):
                os.utime(self._record)

    def _unpublish(self) -> None:
        if self._start:
            with contextlib.suppress(OSError):
                self._record.unlink()

    def _serve(self) -> None:
        """Renew the record while the server answers; return when the job leaves."""
        self.job.event(self.name, "ready", took_s=int(time.monotonic() - self._began), start=self._start)
        while not self.job.why:
            self._check_process()
            answer = self._ask("GET", "/health", timeout=10)
            if answer and answer[0] == 200 and answer[1].get("x-biollm-start") == self._start:
                self._renew()
                self.idle = float(answer[1]["x-biollm-idle"])
                self.job.check_idle()
            self.wake.wait(self.job.beat)
        while self._waits_for_successor():
            self._check_process()
            self._renew()
            time.sleep(1)

    def _waits_for_successor(self) -> bool:
        """Is a later link of the chain to come, not yet published with this model, and time left to wait?"""
        job, options = self.job, self.job.options
        if job.why != "walltime" or options.link >= options.links or job.left() < HANDOVER_S:
            return False
        for path in self._record.parent.glob("*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                other = json.loads(path.read_text())
                same = (other["chain"], other["model"]) == (options.chain, self.name)
                if same and other["link"] > options.link:
                    return False
        return True

    def _drain(self) -> None:
        """Leave routing and let the requests in flight end."""
        job = self.job
        self._unpublish()
        job.event(self.name, "draining", job.why)
        limit = CANCEL_S if job.why == "cancelled" else min(job.spec["drain"], job.left() - KILL_S - 5)
        deadline = time.monotonic() + limit
        time.sleep(job.grace)
        while time.monotonic() < deadline and self._process and self._process.poll() is None:
            answer = self._ask("GET", "/health", timeout=2)
            if answer and answer[1].get("x-biollm-flying") == "0":
                break
            time.sleep(0.5)
        raise Ended("stopped", job.why, 0)

    def _clear(self) -> None:
        """Unpublish, TERM, then KILL the group: a dead API server leaves its engine and workers behind."""
        self._unpublish()
        if not self.job.rank:  # the further nodes stop with this one
            with contextlib.suppress(OSError):
                self.job.rendezvous.unlink()
        if process := self._process:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(KILL_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._process = None
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        if self._start:
            with contextlib.suppress(OSError):  # what else lies there is not ours
                (self._folder / "key").unlink()
                self._folder.rmdir()
        self.wake.clear()


def _hold(host: str) -> socket.socket:
    """Hold a free port: bound, not listening, so vLLM (SO_REUSEADDR, too) gets it and no bind(0) does."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind((host, 0))
    return held


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} biollm: {text.rstrip()}", file=sys.stderr, flush=True)


def _write(path: Path, text: str) -> None:
    """Write a new 0600 file, or replace one of the same name."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def slices(gpus: list[int], granted: str | None) -> list[str | None]:
    """Cut the devices that Slurm granted ("2,3,6,7") into one piece for each model; None leaves them alone.

    Raises:
        ValueError: Fewer devices were granted than the models need.
    """
    devices = [str(n) for n in range(sum(gpus))] if granted is None else [d for d in granted.split(",") if d]
    if sum(gpus) > len(devices):
        raise ValueError(f"the models need {sum(gpus)} GPUs, the job was granted {len(devices)}")
    ends = [sum(gpus[: index + 1]) for index in range(len(gpus))]
    return [",".join(devices[end - n : end]) if n else None for end, n in zip(ends, gpus)]


def main() -> int:
    """Run the servers of the spec on standard input until all have ended; return the job's exit code."""
    parser = argparse.ArgumentParser()
    for name in ("--ticket", "--chain", "--share"):
        parser.add_argument(name, default="")
    for name in ("--link", "--links"):
        parser.add_argument(name, type=int, default=1)
    options = parser.parse_args()
    os.umask(0o077)
    job = Job(json.load(sys.stdin), options)
    models = job.spec["models"]
    try:
        for folder in (job.jobs, job.run / "records", job.run / "starts", Path(job.spec["log_dir"])):
            folder.mkdir(parents=True, exist_ok=True)
        if job.told_to_stop():
            job.event("*", "stopped", "it was stopped before this job began", code=0)
            return 0
        pieces = slices([model["gpus"] for model in models], os.environ.get("CUDA_VISIBLE_DEVICES"))
    except (OSError, ValueError) as error:
        job.event("*", "failed", str(error), code=78)
        return 78
    job.servers = [Server(job, model, piece) for model, piece in zip(models, pieces)]
    return _supervise(job)


def _supervise(job: Job) -> int:
    """Run each server in a thread; this one waits for signals, for the servers and for the parent's death."""
    parent = os.getppid()
    woken, waker = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno())  # a signal may arrive in any thread

    def leave(number: int, _: Any) -> None:
        if number == signal.SIGTERM:
            job.leave("cancelled")
        elif not job.rank:  # the first node decides for all
            job.leave("down" if job.told_to_stop() else "walltime")

    signal.signal(signal.SIGUSR1, leave)
    signal.signal(signal.SIGTERM, leave)

    def run(server: Server) -> None:
        try:
            server.run()
        finally:
            server.code = 70 if server.code is None else server.code
            waker.send(b"\0")

    for server in job.servers:
        threading.Thread(target=run, args=(server,)).start()
    while any(server.code is None for server in job.servers):
        if select.select([woken], [], [], job.beat)[0]:
            woken.recv(64)
        if os.getppid() != parent:
            job.leave("orphaned")
    return next((server.code for server in job.servers if server.code), 0)


if __name__ == "__main__":
    sys.exit(main())
