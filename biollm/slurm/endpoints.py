"""Reads the records that running model servers leave in the run directory, and finds those that are alive.

Slurm knows jobs, not servers; LiteLLM knows configured URLs, not what came and went. A record counts while it is
renewed, its walltime is not about to end, its owner is trusted, its host is a node of the cluster, and the server
at its address names the same start (a port can have a new owner before a record is gone).
"""

from __future__ import annotations

import hmac
import json
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from biollm._files import file_time
from biollm._ownership import is_this_host, uids
from biollm.config.paths import biollm_dir

if TYPE_CHECKING:
    from biollm.config import Cluster

STALE_S = 20.0  # a record is renewed every 5 s, or 10 s later by a server that is slow to answer
ENDING_S = 10.0  # a server with less walltime left gets no new requests
PROBE_S, _RETRY_S = 15.0, 2.0  # between two probes of a server; after one without an answer
_FIRST_S = 2.0  # the longest wait for the first refresh
_UNUSED_S = 60.0  # an unused watch stops reading
_SKEW_S = 60.0  # how long a measured difference of clocks is used
START, PROOF = "x-biollm-start", "x-biollm-proof"  # headers of a server's answers
_RECORD = re.compile(r"[0-9a-f]{32}\.json")
_METRIC = re.compile(
    r"^vllm:(num_requests_running|num_requests_waiting|(?:kv|gpu)_cache_usage_perc)(?:\{.*\})? (\d[\d.e+-]*)\s*$", re.M
)


@dataclass(frozen=True)
class Endpoint:
    """A server that is alive."""

    start: str  # id of this start; every answer has it as `x-biollm-start`
    job: str
    submission: str
    model: str
    host: str  # the node's name
    base_url: str  # "http://ADDRESS:PORT/v1"
    key_file: Path  # see `read_key`
    owner: int  # user id of the record's owner
    left_s: float  # walltime left when it was read
    link: int  # place in the chain, from 1
    adapters: tuple[str, ...] = ()  # models that it serves beside its own


def _fresh_stat(path: str) -> os.stat_result:
    """Return a file's attributes as they are now: network file systems keep old ones for a minute, but not over an open."""
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return os.fstat(file)
    finally:
        os.close(file)


class Records:
    """The records of a cluster's run directory."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self._folder = cluster, biollm_dir(cluster)
        self._owners = uids(cluster.trusted_owners)
        self._skew = (-_SKEW_S, 0.0)

    def read(self) -> tuple[list[Endpoint], dict[str, str]]:
        """Return the servers that are alive by their records, and for every other record (by start) why it is not used."""
        alive: list[Endpoint] = []
        others: dict[str, str] = {}
        entries: list[os.DirEntry[str]] = []
        with suppress(OSError):
            entries = [entry for entry in os.scandir(self._folder / "records") if _RECORD.fullmatch(entry.name)]
        now, nodes = (self.now(), self._nodes()) if entries else (0.0, {})
        for entry in entries:
            try:
                file = _fresh_stat(entry.path)
                record, owner = _load(entry.path, file.st_mtime_ns, file.st_ino)
                found = self._check(Path(entry.path), record, owner, now - file.st_mtime, nodes)
            except FileNotFoundError:  # removed just now
                continue
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                found = "cannot be read, or is no record"
            if isinstance(found, str):
                others[entry.name[:-5]] = found
            else:
                alive.append(found)
        return alive, others

    def now(self) -> float:
        """Return the time by the file system's clock: nodes' and servers' clocks may differ by minutes."""
        measured, skew = self._skew
        if time.monotonic() - measured >= _SKEW_S:
            skew = file_time(self._folder) - time.time()
            self._skew = (time.monotonic(), skew)
        return time.time() + skew

    def _check(self, path: Path, record: Any, owner: int, age: float, nodes: Mapping[str, str]) -> Endpoint | str:
        """Return the endpoint of a record, or why it does not count."""
        name = path.stem
        left = float(record["left_s"]) - age
        address, host = str(record["address"]), str(record["host"])
        if record["cluster"] != self._cluster.name:
            return f"belongs to the cluster {record['cluster']!r}"
        if owner not in self._owners:
            return f"its owner (user id {owner}) is not trusted"
        if record["start"] != name:
            return "its file has another name"
        if age > STALE_S:
            return f"was not renewed for {age:.0f} s"
        if left < ENDING_S:
            return "its walltime is about to end"
        if nodes.get(host) != address and not is_this_host(address):
            return f"{host} ({address}) is not known as a node of the cluster"
        return Endpoint(
            start=name, job=str(record["job"]), submission=str(record["submission"]), model=str(record["model"]), host=host,
            base_url=f"http://{address}:{int(record['port'])}/v1", key_file=path.parent.with_name("starts") / name / "key",
            owner=owner, left_s=left, link=int(record["link"]),
            adapters=tuple(filter(None, str(record.get("adapters", "")).split(","))),
        )  # fmt: skip

    def _nodes(self) -> dict[str, str]:
        """Return node name -> address, as written by the last `biollm up` or `render-slurm`."""
        path = self._folder / f"nodes-{self._cluster.name}.json"
        with suppress(OSError, ValueError):
            file = path.stat()
            nodes, owner = _load(str(path), file.st_mtime_ns, file.st_ino)
            return nodes if owner in self._owners else {}
        return {}


class Watch:
    """The servers that are alive, kept in memory and refreshed in the background: a look-up needs no file access."""

    def __init__(self, cluster: Cluster, interval: float = 0.5) -> None:
        self._records, self._interval = Records(cluster), interval
        self._alive: tuple[Endpoint, ...] = ()
        self._probed: dict[str, tuple[float, bool]] = {}  # start -> when, and whether it answered
        self._thread: threading.Thread | None = None
        self._refreshed, self._wait_until = threading.Event(), 0.0
        self._used = self._read_s = 0.0
        self._numbers, self._newest = count(1), 0  # of reads: one that began earlier may end later

    def alive(self) -> tuple[Endpoint, ...]:
        """Return the servers alive at most an interval ago; after a minute without use, wait up to 2 s for them."""
        self.latest()
        self._refreshed.wait(max(0.0, self._wait_until - time.monotonic()))
        return self._alive

    def latest(self) -> tuple[Endpoint, ...]:
        """Return the servers known to be alive, without waiting, and start refreshing if that has stopped."""
        self._used = time.monotonic()
        if self._thread is None or not self._thread.is_alive():  # also in the child of a fork
            self._refreshed, self._wait_until = threading.Event(), self._used + _FIRST_S
            self._thread = threading.Thread(
                target=self._run, args=(self._refreshed,), name="biollm-endpoints", daemon=True
            )
            self._thread.start()
        return self._alive

    @property
    def awake(self) -> bool:
        """Return whether `alive` would not wait."""
        waited = self._refreshed.is_set() or time.monotonic() >= self._wait_until
        return waited and self._thread is not None and self._thread.is_alive()

    def settle(self, seconds: float) -> bool:
        """Wait for the first refresh; return whether it has come: before that, it is not known whether there are servers."""
        self.latest()
        return self._refreshed.wait(seconds)

    def refresh(self) -> tuple[Endpoint, ...]:
        """Read the records, and probe the servers that are new or were not probed for a while."""
        began, number = time.monotonic(), next(self._numbers)
        found, _ = self._records.read()
        now = time.monotonic()
        self._read_s = now - began
        probed = self._probed = {e.start: self._probed[e.start] for e in found if e.start in self._probed}
        due = [e for e in found if (p := probed.get(e.start)) is None or now - p[0] > (PROBE_S if p[1] else _RETRY_S)]
        with ThreadPoolExecutor(64) as pool:
            for endpoint, named in zip(due, pool.map(_probe, due), strict=True):
                # A slow one counts as before, a new one by its record: it proves its start before a request is sent.
                answered = probed.get(endpoint.start, (0.0, True))[1] if named is None else named == endpoint.start
                probed[endpoint.start] = (now, answered)
        alive = tuple(e for e in found if probed.get(e.start, (0.0, False))[1])
        if number > self._newest:
            self._newest, self._alive = number, alive
        return alive

    def _run(self, refreshed: threading.Event) -> None:
        while time.monotonic() - self._used < _UNUSED_S:
            try:
                self.refresh()
            except RuntimeError:  # the interpreter is ending, and starts no more threads
                return
            refreshed.set()
            time.sleep(max(self._interval, 20 * self._read_s))  # a slow file system is read less often


def read_key(endpoint: Endpoint) -> str:
    """Return the key of an endpoint; raise OSError if it is gone, empty, or not of the record's owner."""
    with endpoint.key_file.open() as file:
        if os.fstat(file.fileno()).st_uid != endpoint.owner:
            raise PermissionError(f"{endpoint.key_file} does not belong to the owner of its record.")
        if not (key := file.read().strip()):
            raise PermissionError(f"{endpoint.key_file} holds no key.")
        return key


def challenge() -> tuple[str, str]:
    """Return a nonce, and the path at which a server proves with its key that it is the start of its record."""
    nonce = secrets.token_hex(16)
    return nonce, f"/health?nonce={nonce}"


def proof(key: str, nonce: str, start: str) -> str:
    """Return the answer to a nonce, which only a server with the key of the start can compute."""
    return hmac.new(key.encode(), f"{nonce}{start}".encode(), "sha256").hexdigest()


def unproven(base_url: str, model: str) -> str:
    """Return one sentence about a server that does not prove its start."""
    restart = f"biollm down {model} && biollm up {model}"
    return f"{base_url} does not prove to be its server: another program, or one of an older biollm ({restart})"


def ask(endpoint: Endpoint, method: str, path: str, body: Any = None, *, timeout: float) -> tuple[int, str]:
    """Return status and text of one request to the server itself, with its key and past any proxy, within `timeout` s.

    Raises:
        OSError: It did not answer, or another server did; the key was not sent to that.
    """
    status, start, text = _request(endpoint, method, path, body, timeout, read_key(endpoint))
    if start != endpoint.start:
        raise ConnectionError(f"Another server answers at {endpoint.base_url}.")
    return status, text


@dataclass(frozen=True)
class Figures:
    """The load of a vLLM server: running and waiting requests, and the share of the key-value cache in use."""

    running: int
    waiting: int
    cache: float


def load(endpoint: Endpoint) -> tuple[int, int] | None:
    """Return the numbers of running and waiting requests, or None if they are unknown."""
    with suppress(OSError):
        if found := figures(ask(endpoint, "GET", "/metrics", timeout=3)[1]):
            return found.running, found.waiting
    return None


def figures(text: str) -> Figures | None:
    """Return the load in vLLM's /metrics, of all its engines; None if it is not there."""
    found: dict[str, list[float]] = {}
    for name, value in _METRIC.findall(text):
        found.setdefault(name, []).append(float(value))
    if "num_requests_running" not in found:
        return None
    running, waiting = sum(found["num_requests_running"]), sum(found.get("num_requests_waiting", []))
    used = found.get("kv_cache_usage_perc") or found.get("gpu_cache_usage_perc") or [0.0]  # the latter before v0.10
    return Figures(int(running), int(waiting), max(used))


@lru_cache(2048)
def _load(path: str, *_version: int) -> tuple[Any, int]:
    """Return the JSON of a file and its owner; a link, or a file that others may write, is an error."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)) as file:
        seen = os.fstat(file.fileno())
        if not stat.S_ISREG(seen.st_mode) or seen.st_mode & 0o022:
            raise ValueError("others can write it")
        return json.load(file), seen.st_uid


def _probe(endpoint: Endpoint) -> str | None:
    """Return the start that a server reports: "" for none or no connection, None for no answer in time."""
    try:
        return _request(endpoint, "GET", "/health", None, 1.0, None)[1]
    except OSError as error:
        return None if isinstance(error, TimeoutError) else ""


def _request(
    endpoint: Endpoint, method: str, path: str, body: Any, timeout: float, key: str | None
) -> tuple[int, str, str]:
    """Return (status, start id, text) of one request; with a key, the server proves its start on the connection first."""
    import http.client

    url = urlsplit(endpoint.base_url)
    connection = http.client.HTTPConnection(str(url.hostname), url.port, timeout=timeout)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        if key:
            nonce, where = challenge()
            connection.request("GET", where)
            answer = connection.getresponse()
            answer.read()
            given = answer.headers.get(PROOF) or ""
            if not hmac.compare_digest(given.encode(), proof(key, nonce, endpoint.start).encode()):
                raise ConnectionError(unproven(endpoint.base_url, endpoint.model))
            connection.auto_open = 0  # a new connection could lead to another server
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, answer.headers.get(START) or "", answer.read().decode(errors="replace")
    except http.client.HTTPException as error:
        raise ConnectionError(f"{endpoint.base_url} does not speak HTTP: {error!r}") from error
    finally:
        connection.close()
