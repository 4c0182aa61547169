"""Supervises the model servers of one Slurm job on its compute node: starts, publishes, drains and stops them.

Standard library only, because it runs under the serving environment's Python (3.9 or later); bash loses signals in
subshells. Slurm does not know whether a server answers or is idle, and a second vLLM on a taken port reports a
successful start. So every start gets an id, which each of its answers carries, and a key; it is published only after it
has answered a completion. In the run directory, two levels up:

    records/START.json       the record, renewed every 5 s while the server answers; removed before the server stops
    starts/START/key         the key (0600; readable by a group with --share)
    jobs/SUBMISSION.events   one line of JSON for each change of state
    jobs/NAME.stop           written by `biollm down` for a submission or a chain, and by an idle chain
"""

from __future__ import annotations

import argparse
import contextlib
import hmac
import http.client
import itertools
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
from pathlib import Path
from typing import Any

KILL_S = 10.0  # from TERM to KILL
HANDOVER_S = 20.0  # a predecessor leaves this long before the end of its job, even without a successor
CANCEL_S = 20.0  # for requests in flight after Slurm's TERM; its KILL comes 30 s after (KillWait)
ANY_INTERFACE = "0.0.0.0"  # noqa: S104 - the middleware requires the key on every interface


class ServerFailedError(Exception):
    """A server could not start, or ended unasked; `code` is its share of the job's exit code."""

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason)
        self.code = code


class Allocation:
    """What the servers of one job share: options, folders, the end of the walltime, the reason to stop."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.id = os.environ.get("SLURM_JOB_ID", "0")
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        self.rank = int(os.environ.get("SLURM_PROCID") or 0) if options.nodes > 1 else 0
        self.submission: str = options.submission or f"{options.cluster}-{self.id}"
        self.run_dir = Path(__file__).parent.parent
        self.jobs = self.run_dir / "jobs"
        self.rendezvous = self.jobs / f"{self.submission}-{self.restart}.master"
        self.host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self.address, self.bind = self._addresses()
        self.stop_reason = ""  # empty while the job is to stay
        self.servers: list[Server] = []
        # The walltime is an option, since Slurm gives a job its end only from 23.02 on, and by the controller's clock
        walltime = options.walltime
        if end := os.environ.get("SLURM_JOB_END_TIME"):
            walltime = min(walltime, max(float(end) - time.time(), 60.0))
        self._end = time.monotonic() + walltime

    def _addresses(self) -> tuple[str, str]:
        """Return the address to publish (the controller's for this node) and the one to listen on."""
        nodes: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError):
            nodes = json.loads((self.run_dir / f"nodes-{self.options.cluster}.json").read_text())
        address = nodes.get(self.host, self.host)
        try:
            found = socket.gethostbyname(address)
            _reserve_port(found).close()
        except OSError:  # unknown here, or the outer side of an address translation
            return address, ANY_INTERFACE
        # Debian's /etc/hosts maps a machine's own name to 127.0.1.1, which no other machine reaches
        return address, ANY_INTERFACE if found.startswith("127.") and found != address else found

    def left_s(self) -> float:
        """Return the seconds of walltime left."""
        return self._end - time.monotonic()

    def stop(self, reason: str) -> None:
        """Make every server drain and stop."""
        self.stop_reason = self.stop_reason or reason
        for server in self.servers:
            server.wake.set()

    def stop_requested(self) -> bool:
        """Return whether the stop mark of this submission or chain exists."""
        return any((self.jobs / f"{name}.stop").exists() for name in (self.submission, self.options.chain) if name)

    def event(self, model: str, state: str, reason: str = "", **detail: Any) -> None:
        """Write one change of state to the job's log and to the events that `biollm up` and `status` read."""
        _log(f"{model} {state} {reason}")
        if self.rank and state != "failed":
            return  # the first node reports for the server
        entry = {"at": time.time(), "model": model, "state": state, "reason": reason, "restart": self.restart}
        line = json.dumps({**entry, "job": self.id, "host": self.host, **detail}) + "\n"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        try:
            with os.fdopen(os.open(self.jobs / f"{self.submission}.events", flags, 0o600), "a") as file:
                file.write(line)
        except OSError as error:
            _log(f"cannot write the event: {error}")

    def share(self, path: Path, mode: int) -> None:
        """Open `path` to the group of --share."""
        if self.options.share:
            shutil.chown(path, group=self.options.share)
            path.chmod(mode)

    def stop_if_idle(self) -> None:
        """Stop once every running server has been idle long enough: their GPUs are billed together."""
        limit = self.options.idle_timeout
        if limit and all(server.idle >= limit for server in self.servers if server.code is None):
            if self.options.chain:
                with contextlib.suppress(OSError):
                    (self.jobs / f"{self.options.chain}.stop").touch()
            self.stop("idle")


class Server:
    """One model's server in its own process group, from its start to its end."""

    def __init__(self, job: Allocation, model: argparse.Namespace, devices: str | None) -> None:
        self.job, self.model, self.devices = job, model, devices
        self.name: str = model.model
        self.idle = 0.0  # seconds; stays 0 until the first ready, so that a slow start is not idleness
        self.wake = threading.Event()  # set when the process ends or the job is to stop
        self.code: int | None = None  # the exit code; None while it runs
        rank = f"-rank{job.rank}" if job.rank else ""
        self._log = Path(job.options.log_dir) / f"{self.name.replace('/', '_')}-{job.id}{rank}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._began = time.monotonic()
        self._start_by = self._began + model.start_timeout
        self._lifeline = self._port = -1
        self._start = self._key = ""
        self._record = self._folder = Path()  # of this start

    def run(self) -> None:
        """Start, publish, renew, drain and stop the server."""
        # The server inherits the mask. Without it the signal, which Slurm sends to every process of a step, kills it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        code, failure = 0, ""
        try:
            (self._follow if self.job.rank else self._lead)()
        except ServerFailedError as error:
            code, failure = error.code, str(error)
        except Exception as error:
            code, failure = 71, f"cannot run the server: {error!r}"
        last = {"code": code, "log": str(self._log)}
        if failure:  # reported at once; a stop only when it is complete
            self.job.event(self.name, "failed", failure, **last)
            self._clear()
        else:
            self._clear()
            self.job.event(self.name, "stopped", self.job.stop_reason or "the first node left", **last)
        self.code = code

    def _lead(self) -> None:
        for _ in range(3 if self.job.options.nodes == 1 else 1):
            with _reserve_port(self.job.bind) as reserved:
                self._launch(reserved.getsockname()[1])
                if self._await_ready():
                    break
            self.job.event(self.name, "restarting", f"another process answers on port {self._port}")
            self._clear()
        else:
            raise ServerFailedError("its ports were taken by other processes", 69)
        self._complete()
        if not self.job.stop_reason:
            self._publish()
            self._serve()
            self._drain()

    def _launch(self, port: int) -> None:
        """Start the server with an id and a key of its own, which are not among its arguments."""
        job, self._start, self._key, self._port = self.job, uuid.uuid4().hex, secrets.token_urlsafe(32), port
        self._record = job.run_dir / "records" / f"{self._start}.json"
        self._folder = job.run_dir / "starts" / self._start
        self._folder.mkdir(parents=True)
        key_file = self._folder / "key"
        _write(key_file, self._key)
        job.share(key_file, 0o640)
        job.share(self._folder, 0o750)
        arguments = ["--host", job.bind, "--port", str(port), "--api-server-count", "1", "--shutdown-timeout"]
        arguments += [str(int(CANCEL_S)), "--middleware", f"{Path(__file__).stem}_auth.AuthMiddleware"]
        if job.options.nodes > 1:
            with _reserve_port(job.bind) as reserved:
                master = str(reserved.getsockname()[1])
            _write(job.rendezvous, json.dumps([job.address, master]))
            arguments += ["--node-rank", "0", "--master-addr", job.address, "--master-port", master]
        reader, self._lifeline = os.pipe()
        env = {"BIOLLM_START": self._start, "BIOLLM_KEY_FILE": str(key_file), "BIOLLM_LIFELINE": str(reader)}
        try:
            self._spawn(arguments, env, reader)
        finally:
            os.close(reader)
        job.event(self.name, "starting", log=str(self._log), start=self._start, port=port)

    def _follow(self) -> None:
        """Serve as a further node of a model that spans several, until the first node leaves."""
        rendezvous = self.job.rendezvous
        while self._may_continue() and not rendezvous.exists():
            self.wake.wait(1)
        if self.job.stop_reason:
            return
        address, port = json.loads(rendezvous.read_text())
        rank = ["--headless", "--node-rank", str(self.job.rank), "--master-addr", address, "--master-port", port]
        self._spawn(rank, {})
        self.job.event(self.name, "starting", f"as rank {self.job.rank}", log=str(self._log))
        while self._may_continue() and rendezvous.exists():
            self.wake.wait(1)

    def _spawn(self, arguments: list[str], extra: dict[str, str], *descriptors: int) -> None:
        env = {**os.environ, **extra}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), env.get("PYTHONPATH")]))
        if self.devices is not None:
            env["CUDA_VISIBLE_DEVICES"] = self.devices
        if self.job.options.nodes > 1:
            env.setdefault("VLLM_HOST_IP", socket.gethostbyname(self.job.address))
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [*self.model.command, *arguments], env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=descriptors, start_new_session=True,
            )  # fmt: skip
        self._process = process
        threading.Thread(target=lambda: (process.wait(), self.wake.set()), daemon=True).start()

    def _may_continue(self) -> bool:
        """Return False when the job is to stop; raise ServerFailedError if the process has ended unasked."""
        if self._process and self._process.poll() in (0, -signal.SIGTERM):
            time.sleep(0.5)  # Slurm signals every process of a job: our own TERM may be on its way
        if not self.job.stop_reason:
            self._check_process()
        return not self.job.stop_reason

    def _check_process(self) -> None:
        code = self._process.poll() if self._process else None
        if code is not None:  # a failure even with exit code 0
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise ServerFailedError(f"the server ended by {how}", 128 - code if code < 0 else code or 70)

    def _await_ready(self) -> bool:
        """Wait until this very start proves itself on /health, or the job is to stop; False if another process answers."""
        while self._may_continue():
            if time.monotonic() >= self._start_by:
                raise ServerFailedError(f"not ready within the start timeout of {self.model.start_timeout} s", 75)
            nonce = secrets.token_hex(16)
            answer = self._request("GET", f"/health?nonce={nonce}", timeout=5, authenticate=False)
            if answer and answer[0] < 500:
                proof = hmac.new(self._key.encode(), (nonce + self._start).encode(), "sha256").hexdigest()
                if not hmac.compare_digest(answer[1].get("x-biollm-proof", "").encode(), proof.encode()):
                    return False
                if answer[0] == 200:
                    return True
            self.wake.wait(0.25)
        return True

    def _complete(self) -> None:
        """Request a completion of one token: with several nodes, /health is fine while one is dead."""
        body = json.dumps({"model": self.name, "prompt": "Hello", "max_tokens": 1})
        answer = self._request("POST", "/v1/completions", body, timeout=max(1.0, self._start_by - time.monotonic()))
        if self._may_continue() and (not answer or answer[0] != 200):
            what = f"HTTP {answer[0]}: {answer[2][:300]}" if answer else "no answer"
            raise ServerFailedError(f"healthy, but the first completion failed: {what}", 70)

    def _request(
        self, method: str, path: str, body: str | None = None, *, timeout: float, authenticate: bool = True
    ) -> tuple[int, http.client.HTTPMessage, str] | None:
        """Return (status, headers, text) of one request to the server, past any proxy; None without an answer."""
        host = "127.0.0.1" if self.job.bind == ANY_INTERFACE else self.job.bind
        connection = http.client.HTTPConnection(host, self._port, timeout=timeout)
        key = {"Authorization": f"Bearer {self._key}"} if authenticate else {}
        try:
            connection.request(method, path, body, {"Content-Type": "application/json", **key})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read().decode()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def _publish(self) -> None:
        job, options = self.job, self.job.options
        record = {"start": self._start, "cluster": options.cluster, "job": job.id, "submission": job.submission,
                  "model": self.name, "host": job.host, "address": job.address, "port": self._port,
                  "left_s": int(job.left_s()), "chain": options.chain, "link": options.link,
                  "adapters": self.model.adapters}  # fmt: skip
        new = self._record.with_suffix(".new")
        _write(new, json.dumps(record))
        job.share(new, 0o640)
        new.replace(self._record)

    def _renew(self) -> None:
        try:
            self._publish()
        except OSError as error:
            _log(f"cannot renew the record: {error}")
            with contextlib.suppress(OSError):
                os.utime(self._record)  # possible on a full disk

    def _serve(self) -> None:
        """Renew the record while the server answers; return when the job is to stop and a successor may take over."""
        self.job.event(self.name, "ready", took_s=int(time.monotonic() - self._began), start=self._start)
        while self._may_continue():
            answer = self._request("GET", "/health", timeout=10)
            if answer and answer[0] == 200 and answer[1].get("x-biollm-start") == self._start:
                self._renew()
                self.idle = float(answer[1]["x-biollm-idle"])
                self.job.stop_if_idle()
            self.wake.wait(self.job.options.heartbeat)
        while self._awaits_successor():
            self._check_process()
            self._renew()
            time.sleep(1)

    def _awaits_successor(self) -> bool:
        """Return whether the chain's next link is yet to publish this model, and there is time to wait for it."""
        job, options = self.job, self.job.options
        if job.stop_reason != "walltime" or options.link >= options.links or job.left_s() < HANDOVER_S:
            return False
        for path in self._record.parent.glob("*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                other = json.loads(path.read_text())
                if (other["chain"], other["model"]) == (options.chain, self.name) and other["link"] > options.link:
                    return False
        return True

    def _drain(self) -> None:
        """Leave routing and wait until the requests in flight have ended."""
        job = self.job
        _remove(self._record)
        job.event(self.name, "draining", job.stop_reason)
        limit = CANCEL_S if job.stop_reason == "cancelled" else min(job.options.drain, job.left_s() - KILL_S - 5)
        deadline = time.monotonic() + limit
        time.sleep(job.options.grace)
        while time.monotonic() < deadline and self._process and self._process.poll() is None:
            answer = self._request("GET", "/health", timeout=2)
            if answer and answer[1].get("x-biollm-in-flight") == "0":
                return
            time.sleep(0.5)

    def _clear(self) -> None:
        """Unpublish, TERM, then KILL the group: a dead API server leaves its engine and workers behind."""
        _remove(self._record)
        if not self.job.rank:  # the further nodes stop with this one
            _remove(self.job.rendezvous)
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
            _remove(self._folder / "key")
            with contextlib.suppress(OSError):  # it holds something that is not ours
                self._folder.rmdir()
        self.wake.clear()


def _reserve_port(host: str) -> socket.socket:
    """Bind a free port without listening: vLLM (SO_REUSEADDR, too) can bind it as well, no bind(0) gets it."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind((host, 0))
    return reserved


def _remove(file: Path) -> None:
    with contextlib.suppress(OSError):
        file.unlink()


def _log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} biollm: {text.rstrip()}", file=sys.stderr, flush=True)


def _write(path: Path, text: str) -> None:
    """Write a new 0600 file, or replace one of the same name."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def assign_devices(gpus: list[int], granted: str | None) -> list[str | None]:
    """Divide the devices that Slurm granted ("2,3,6,7") among the models; None leaves them alone."""
    devices = [str(n) for n in range(sum(gpus))] if granted is None else [d for d in granted.split(",") if d]
    if sum(gpus) > len(devices):
        raise ValueError(f"the models need {sum(gpus)} GPUs, the job was granted {len(devices)}")
    remaining = iter(devices)
    return [",".join(itertools.islice(remaining, count)) if count else None for count in gpus]


def parse(words: list[str]) -> list[argparse.Namespace]:
    """Read `[OPTIONS] --model NAME -- COMMAND... [--and ...]`: one namespace for each model, the first with the options."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("--submission", "--chain", "--share", "--cluster", "--log-dir", "--model", "--adapters"):
        parser.add_argument(name, default="")
    for name, default in (("--link", 1), ("--links", 1), ("--nodes", 1), ("--gpus", 0), ("--start-timeout", 1800)):
        parser.add_argument(name, type=int, default=default)
    # in seconds; clients count a record as dead after 20, and need the grace to see that one is gone
    for name, default in (("--walltime", 0), ("--drain", 0), ("--idle-timeout", 0), ("--heartbeat", 5), ("--grace", 3)):
        parser.add_argument(name, type=float, default=float(default))
    parser.add_argument("command", nargs="+")
    ends = [place for place, word in enumerate(words) if word == "--and"] + [len(words)]
    starts = [0] + [end + 1 for end in ends[:-1]]
    return [parser.parse_args(words[start:end]) for start, end in zip(starts, ends)]


def main() -> int:
    """Run the servers of the command line until all have ended; return the job's exit code."""
    models = parse(sys.argv[1:])
    os.umask(0o077)
    job = Allocation(models[0])
    try:
        for folder in (job.jobs, job.run_dir / "records", job.run_dir / "starts", Path(job.options.log_dir)):
            folder.mkdir(parents=True, exist_ok=True)
        if job.stop_requested():
            job.event("*", "stopped", "it was stopped before this job began", code=0)
            return 0
        devices = assign_devices([model.gpus for model in models], os.environ.get("CUDA_VISIBLE_DEVICES"))
    except (OSError, ValueError) as error:
        job.event("*", "failed", str(error), code=78)
        return 78
    job.servers = [Server(job, model, each) for model, each in zip(models, devices)]
    return _supervise(job)


def _supervise(job: Allocation) -> int:
    """Run each server in a thread; this one waits for signals, for the servers and for the parent's death."""
    parent = os.getppid()
    woken, waker = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno())  # a signal may arrive in any thread

    def stop(number: int, _: Any) -> None:
        if number == signal.SIGTERM:
            job.stop("cancelled")
        elif not job.rank:  # the first node decides for all
            job.stop("down" if job.stop_requested() else "walltime")

    signal.signal(signal.SIGUSR1, stop)
    signal.signal(signal.SIGTERM, stop)

    def run(server: Server) -> None:
        try:
            server.run()
        finally:
            server.code = 70 if server.code is None else server.code
            waker.send(b"\0")

    for server in job.servers:
        threading.Thread(target=run, args=(server,)).start()
    while any(server.code is None for server in job.servers):
        if select.select([woken], [], [], job.options.heartbeat)[0]:
            woken.recv(64)
        if os.getppid() != parent:
            job.stop("orphaned")
    return next((server.code for server in job.servers if server.code), 0)


if __name__ == "__main__":
    sys.exit(main())
